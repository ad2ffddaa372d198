"""The sets of pairs, and when they are looked at."""

import dataclasses
from typing import Any

from experiments.protocol import arms, checks, inputs, settings
from experiments.protocol.settings import Protocol
from jaxpref.data import sentiment
from jaxpref.training.pairset import PairSet


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers."""

    sets: tuple[sentiment.Kind, ...] = ("single", "short", "long")
    """What follows the label: nothing, a short text, a long one."""
    data: str | None = None
    """A file of pairs, also of HH-RLHF and packed (.gz): one more set, named `data`."""
    epochs: tuple[float, ...] = (1, 2, 3)
    """When to look, in epochs over the preference part."""
    grams: int = 24
    """Unseen pairs whose gradients are taken, before training and at every look of DPO."""
    pairs: int = 48
    trained: int = 24
    end: str = "none"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``. A token that closes both responses is a shared text, too."""


SMOKE = Config(
    pairs=4, unseen=3, trained=2, grams=2, batch=2, seeds=1, epochs=(0.5, 1), supervised_epochs=1,
    resamples=50,
)  # fmt: skip


def sets_of(config: Config) -> dict[str, Config]:
    """The sets of a run by name, in the order of their texts, each with settings of its own."""
    kinds = [kind for kind in sentiment.SUFFIXES if kind in config.sets]
    found = {kind: dataclasses.replace(config, data=kind) for kind in kinds}
    return {**found, "data": config} if config.data else found


def looks(config: Config) -> list[int]:
    """Updates after which every arm is looked at."""
    return arms.looks_of(config, config.epochs)


def load(config: Config) -> dict[str, tuple[inputs.Subject, PairSet]]:
    """Model and pairs of every set; raises for settings that cannot be run."""
    checks.at_least(1, config, "grams")
    if config.grams > config.unseen:
        raise ValueError(f"grams: got {config.grams}, expected at most the {config.unseen} unseen")
    if not sets_of(config):
        raise ValueError("sets: got none, expected one or more, or data")
    if min(config.epochs, default=0) <= 0 or not looks(config):
        raise ValueError(f"epochs: got {config.epochs}, expected numbers above 0")
    found = {name: settings.load(each) for name, each in sets_of(config).items()}
    # The sentences are of like length: one size costs little, and compiles once.
    return {name: (subject, pairs if name == "data" else dataclasses.replace(
        pairs, sizes=pairs.sizes[-1:])) for name, (subject, pairs) in found.items()}  # fmt: skip


def hashes(config: Config) -> dict[str, Any]:
    """Of the model, and of the data of every set, for the provenance."""
    found = [inputs.hashes(*each) for each in load(config).values()]
    return found[-1] | {"data": [each["data"] for each in found]}  # no sentence is skipped
