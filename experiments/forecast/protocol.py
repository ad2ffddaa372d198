"""The settings, the arms, and the signals."""

import dataclasses
import functools

from experiments.protocol import checks, inputs, settings
from experiments.protocol.arms import ARMS, Arm
from experiments.protocol.settings import Protocol
from jaxpref.data import batches
from jaxpref.training.pairset import PairSet


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers."""

    epochs: tuple[float, ...] = (0.5, 1, 2, 4)
    """When to look, in epochs over the preference part; the forecast is made for the first whole
    one."""
    control_epochs: float = 2
    """The controls' last look."""
    beta: float = 0.1
    grams: int = 24
    """Trained probes whose own share of their change is taken."""
    texts: int = 10
    """Prompts whose answers are kept."""


SMOKE = Config(
    pairs=6, unseen=4, trained=4, batch=2, seeds=2, texts=2, grams=3, epochs=(0.5, 1, 2),
    control_epochs=1,
    supervised_epochs=1, resamples=50,
)  # fmt: skip
HORIZON = 1.0  # epochs: what is forecast


def updates(config: Config, epochs: float) -> int:
    """Of so many epochs."""
    return round(epochs * batches.steps_per_epoch(config.pairs, config.batch))


def looks(config: Config, arm: str) -> list[int]:
    """Updates after which an arm is looked at."""
    last = max(config.epochs) if arm == "dpo" else config.control_epochs
    return [updates(config, e) for e in sorted(config.epochs) if e <= last]


def arm_of(config: Config, name: str) -> Arm:
    """Loss, labels and length of an arm."""
    loss, labels = ARMS[name]
    return Arm(loss, looks(config, name)[-1], config.rate, labels, config.warmup)


def epoch_of(config: Config) -> Arm:
    """DPO over the epoch that is forecast."""
    return arm_of(config, "dpo")._replace(updates=updates(config, HORIZON))


def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    checks.above(0, config, "beta", "control_epochs")
    checks.at_least(1, config, "grams", "texts")
    if config.grams > config.trained:
        raise ValueError(
            f"grams: got {config.grams}, expected at most the {config.trained} trained"
        )
    if HORIZON not in config.epochs or min(config.epochs) <= 0:
        raise ValueError(
            f"epochs: got {config.epochs}, expected positive numbers with 1 among them"
        )
    return settings.load(config)


def hashes(config: Config) -> dict[str, object]:
    """Of model and data, for the provenance."""
    return _hashes(config)


@functools.lru_cache(maxsize=1)
def _hashes(config: Config) -> dict[str, object]:
    return inputs.hashes(*load(config))
