"""The settings: one seed, two arms."""

import dataclasses

from experiments.protocol import arms, checks, inputs, settings
from experiments.protocol.settings import Protocol
from jaxpref.training.pairset import PairSet


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers."""

    trained: int = 16
    seeds: int = 1
    rate: float = 1e-5
    epochs: int = 2
    """Of preference training."""


SMOKE = Config(
    pairs=4, unseen=4, trained=2, batch=2, supervised_epochs=1, epochs=1, resamples=50
)  # fmt: skip


def looks(config: Config) -> list[int]:
    """Updates after which arms are looked at: every epoch's end."""
    return arms.looks_of(config, range(1, config.epochs + 1))


def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    checks.at_least(1, config, "epochs")
    return settings.load(config)
