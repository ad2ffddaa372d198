"""The settings, the arms, and the signals."""

import dataclasses

from experiments.protocol import arms, checks, inputs, settings
from experiments.protocol.settings import Protocol
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


def looks(config: Config, arm: str) -> list[int]:
    """Updates after which an arm is looked at."""
    last = max(config.epochs) if arm == "dpo" else config.control_epochs
    return arms.looks_of(config, (e for e in config.epochs if e <= last))


def horizon(config: Config) -> int:
    """Updates that are forecast."""
    return arms.updates_of(config, HORIZON)


def epoch_of(config: Config) -> arms.Arm:
    """DPO over the epoch that is forecast."""
    return arms.arm_of(config, "dpo", horizon(config))


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
