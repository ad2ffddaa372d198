"""The doses."""

import dataclasses
import itertools
from typing import NamedTuple

from experiments.protocol import arms, inputs, settings
from experiments.protocol.arms import ARMS
from experiments.protocol.settings import Protocol
from jaxpref.training.pairset import PairSet


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers."""

    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)
    """Learning rates of preference training; `rate` is not read."""
    starts: tuple[int, ...] = (0, 2, 8)
    """Epochs of supervision before it; `supervised_epochs` is not read."""
    epochs: tuple[float, ...] = (0.5, 1, 2, 4)
    """When to look, in epochs over the preference part."""
    supervised_rate: float = 1e-3


SMOKE = Config(
    rates=(1e-4, 1e-3), starts=(0, 1), epochs=(1, 2), pairs=4, unseen=3, trained=2, batch=2,
    seeds=2, resamples=50,
)  # fmt: skip


class Dose(NamedTuple):
    """One course of training."""

    start: int  # epochs of supervision
    rate: float
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}_{self.start}_{self.rate:g}"


def doses(config: Config) -> list[Dose]:
    """All of them, start after start."""
    return [Dose(*x) for x in itertools.product(config.starts, config.rates, ARMS)]


def looks(config: Config) -> list[int]:
    """Updates after which each is looked at."""
    return arms.looks_of(config, config.epochs)


def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    for name in ("rates", "starts", "epochs"):
        values = getattr(config, name)
        if len(set(values)) < len(values) or not values:
            raise ValueError(f"{name}: got {values}, expected numbers, each once")
    if min(config.rates) <= 0 or min(config.starts) < 0 or not looks(config):
        raise ValueError("rates, starts, epochs: expected rates and epochs above 0, starts from 0")
    return settings.load(config)
