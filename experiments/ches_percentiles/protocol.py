"""Settings, model and pairs of a run, and which pairs a subset has."""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments import common
from jaxpref.data.pairs import TokenPair

SCORES = {  # larger: a fall of the chosen response is expected
    "ches": "CHES",
    "ches_length_normalised": "length-normalised CHES",
    "alpha_weighted_ches": "alpha-weighted CHES",
    "displacement_rate": "exact rate",
    "last_hidden_similarity": "last hidden states",
    "edit_similarity": "edit similarity",
    "length_difference": "length difference",
    "random": "random",
}
LOSSES = ("dpo", "ipo")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    scores: tuple[str, ...] = tuple(SCORES)
    percentiles: tuple[int, ...] = (0, 25, 50, 75, 100)
    """Of each score, in rising order: the lowest pairs at 0, the highest at 100."""
    losses: tuple[str, ...] = LOSSES
    rate: float = 1e-6
    """Of RMSprop, whose steps do not depend on the size of a loss: the same for both."""
    pairs: int = 96
    """The pool that is scored, drawn by the seed from all pairs that fit."""
    subset: int = 16
    """Pairs that are trained on, once each."""
    batch: int = 4
    seeds: int = 1
    """Each draws a pool, the order of its batches and the random score."""
    beta: float = 0.1
    """Of DPO."""
    tau: float = 0.01
    """Of IPO."""
    limit: int = 96
    """Most tokens of prompt, response and end; longer pairs are left out, and counted."""
    resamples: int = 1000
    """Of the bootstraps over pairs."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A JSONL file of pairs, HH-RLHF's too; by default the shipped ones."""
    bad: common.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    columns: str = ""
    """The data's own names of columns, ``chosen=good,rejected=bad``."""
    end: str = "eos"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = common.DATE
    """Today, for a chat template that asks."""


SMOKE = Config(
    scores=("ches", "edit_similarity", "length_difference", "random"), percentiles=(0, 100),
    pairs=10, subset=4, batch=2, resamples=50, limit=32,
)  # fmt: skip


class Loaded(NamedTuple):
    """What a run starts from."""

    subject: common.Subject
    encoded: list[TokenPair]
    problem: common.Problem
    left_out: dict[str, int]  # rows of the file that cannot be used, and too long ones


def _check(config: Config) -> None:
    common.at_least(1, config, "pairs", "subset", "batch", "seeds", "limit", "resamples")
    for name in ("rate", "beta", "tau"):
        if not 0 < (value := getattr(config, name)) < float("inf"):
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    for name, known in (("scores", tuple(SCORES)), ("losses", LOSSES)):
        some = getattr(config, name)
        if not some or not set(some) <= set(known) or len(set(some)) < len(some):
            raise ValueError(f"{name}: got {some}, expected some of {', '.join(known)}, once each")
    steps = config.percentiles
    if not steps or list(steps) != sorted({x for x in steps if 0 <= x <= 100}):
        raise ValueError(f"percentiles: got {steps}, expected rising numbers from 0 to 100")
    if config.subset % config.batch:
        raise ValueError(f"batch: got {config.batch}, expected a divisor of {config.subset} pairs")


def load(config: Config) -> Loaded:
    """Model and pairs of a run; raises for settings that cannot be run."""
    _check(config)
    found = common.read(config)
    subject = common.open_model(config.model, scan=True)
    encoded, counts = common.encoded(config, found.rows, subject, too_long="drop")
    if not config.subset <= config.pairs <= len(encoded):
        fit = f"{config.subset} to {len(encoded)}, the pairs that fit {config.limit} tokens"
        raise ValueError(f"pairs: got {config.pairs}, expected {fit}")
    skipped = (*found.faults, *counts.faults)
    left_out = {"unusable": len(skipped), "too_long": counts.dropped}
    problem = common.token_problem(subject.policy, encoded, skipped=skipped)
    return Loaded(subject, encoded, problem, left_out)


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    found = load(config)
    return common.hashes(found.subject, found.problem)


def quantile_slice(scores: np.ndarray, percentile: float, size: int) -> np.ndarray:
    """Places of the `size` scores around a percentile, in rising order of place.

    The window is centred at rank ``round(percentile (n - 1) / 100)`` and pushed inside at both
    ends. Equal scores rank by place.
    """
    centre = round(percentile / 100 * (len(scores) - 1))
    begin = min(max(centre - size // 2, 0), len(scores) - size)
    return np.sort(np.argsort(scores, kind="stable")[begin : begin + size])
