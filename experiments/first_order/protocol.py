"""The settings, the parts of a run, and the pairs."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from experiments.protocol import checks, inputs
from jaxpref.training.optimizers import Optimizer
from jaxpref.training.pairset import PairSet


@dataclasses.dataclass(frozen=True)
class Config(inputs.Source):
    """All that decides the numbers."""

    optimizers: tuple[Optimizer, ...] = ("sgd", "rmsprop", "adam")
    clips: tuple[float, ...] = (math.inf, 1.0)
    """Largest norm of the gradient; inf does not clip."""
    sgd_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Learning rates of plain gradient descent."""
    rmsprop_rates: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4)
    adam_rates: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4)
    pairs: int = 4
    """In the batch that is trained on."""
    others: int = 12
    """Further pairs that are only looked at."""
    steps: int = 10
    """Of the longer prediction, all on the same batch."""
    warm: int = 2
    """Updates on other batches before, at the smallest learning rate: they fill the state."""
    seeds: int = 2
    """Each draws other pairs."""
    beta: float = 0.1
    limit: int = 64
    """Most tokens of prompt and response; longer prompts lose their beginning."""
    supervised: int = 0
    """Updates of Adam on the chosen responses before, at `supervised_rate`."""
    supervised_rate: float = 1e-3
    end: str = "none"


SMOKE = Config(
    optimizers=("sgd", "adam"), clips=(1.0,), sgd_rates=(1e-5,), adam_rates=(1e-6,),
    pairs=2, others=1, steps=2, warm=1, seeds=1,
)  # fmt: skip


class Part(NamedTuple):
    """One optimizer, with or without clipping, on one draw of pairs."""

    seed: int
    optimizer: str
    clip: float


def parts(config: Config) -> list[Part]:
    """All of them, in the order of the arrays."""
    return [
        Part(*x) for x in itertools.product(range(config.seeds), config.optimizers, config.clips)
    ]


def rates_of(config: Config, optimizer: str) -> tuple[float, ...]:
    """The learning rates of an optimizer, sorted."""
    return tuple(sorted(getattr(config, f"{optimizer}_rates")))


@functools.lru_cache(maxsize=1)  # a run asks for it twice: for its hash, and to train
def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    checks.at_least(1, config, "pairs", "steps", "seeds", "limit")
    checks.at_least(0, config, "others", "warm", "supervised")
    checks.above(0, config, "beta", "supervised_rate")
    if not config.optimizers or not config.clips or min(config.clips) <= 0:
        got = f"{config.optimizers}, {config.clips}"
        raise ValueError(f"optimizers, clips: got {got}, expected one or more, clips above 0")
    counts = {len(rates_of(config, name)) for name in config.optimizers}
    if len(counts) != 1:
        raise ValueError(f"rates: got {sorted(counts)} learning rates, expected as many for each")
    found, drawn = inputs.read(config), config.pairs * (1 + config.warm) + config.others
    checks.enough("pairs", drawn, len(found.rows))
    subject = inputs.subject(config, scan=False)
    pairs, counts = inputs.encoded(config, found.rows, subject, too_long="truncate_left")
    checks.enough("pairs", drawn, len(pairs))
    skipped = (*found.faults, *counts.faults)
    return subject, PairSet.of(subject.policy, pairs, quantiles=(1.0,), skipped=skipped)
