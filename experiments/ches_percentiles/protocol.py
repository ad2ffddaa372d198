"""The scores, the subsets that they choose, and the settings."""

import dataclasses

import numpy as np

from experiments.protocol import arms, checks, inputs, settings
from experiments.protocol.changes import CONTROLS
from experiments.protocol.settings import Protocol
from jaxpref.training.objectives import objective
from jaxpref.training.pairset import PairSet

SCORES = {  # larger: a fall of the chosen response is expected
    "ches": "CHES",
    "ches_length_normalised": "CHES, length-normalised",
    "alpha_weighted_ches": "alpha-weighted CHES",
    "edit_similarity": "edit similarity",
    "last_hidden_similarity": "last hidden states",
    "length_difference": "length difference",
    "random": "random",
    "displacement_rate": "exact rate",
}


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers. The preference part is the pool that subsets are taken from."""

    scores: tuple[str, ...] = tuple(SCORES)[:-1]
    """What chooses subsets; also ``displacement_rate``, which costs a gradient a pair."""
    percentiles: tuple[int, ...] = (0, 50, 100)
    """Of each score, in rising order: the lowest pairs at 0, the highest at 100."""
    subset: int = 32
    """Pairs that are trained on."""
    trained: int = 32
    """Of each subset, those that are measured."""
    epochs: int = 1
    """Over each subset."""
    losses: tuple[str, ...] = ("dpo",)
    """Of the catalogue, hyperparameters as in the papers or their code; the two controls are
    trained beside them."""


SMOKE = Config(
    scores=("ches", "edit_similarity", "random"), percentiles=(0, 100), pairs=6, subset=4,
    trained=3, unseen=3, batch=2, seeds=2, supervised_epochs=1, resamples=50,
)  # fmt: skip


def names(config: Config) -> tuple[str, ...]:
    """All arms: the losses, then the controls."""
    return (*config.losses, *CONTROLS)


def looks(config: Config) -> list[int]:
    """Updates after which arms are looked at: those of the whole training."""
    return arms.looks_of(dataclasses.replace(config, pairs=config.subset), (config.epochs,))


def quantile_slice(scores: np.ndarray, percentile: float, size: int) -> np.ndarray:
    """Places of the `size` scores around a percentile, in rising order of place.

    The window is centred at rank ``round(percentile (n - 1) / 100)`` and pushed inside at both
    ends. Equal scores rank by place.
    """
    centre = round(percentile / 100 * (len(scores) - 1))
    begin = min(max(centre - size // 2, 0), len(scores) - size)
    return np.sort(np.argsort(scores, kind="stable")[begin : begin + size])


def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    checks.at_least(1, config, "subset", "epochs", "batch")
    for name in config.losses:
        objective(name)
    if len(set(names(config))) < len(names(config)) or not config.losses:
        raise ValueError(f"losses: got {config.losses}, expected names, each once and no control")
    some, steps = config.scores, config.percentiles
    if not some or not set(some) <= set(SCORES) or len(set(some)) < len(some):
        raise ValueError(f"scores: got {some}, expected some of {', '.join(SCORES)}, once each")
    if len(steps) < 2 or list(steps) != sorted({x for x in steps if 0 <= x <= 100}):
        raise ValueError(f"percentiles: got {steps}, expected two or more from 0 to 100, rising")
    for name, most in (("subset", config.pairs), ("trained", config.subset)):
        if (value := getattr(config, name)) > most:
            raise ValueError(f"{name}: got {value}, expected at most {most}")
    if config.subset % config.batch:
        raise ValueError(f"batch: got {config.batch}, expected a divisor of {config.subset} pairs")
    return settings.load(config)
