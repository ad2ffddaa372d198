"""What all experiments that train on pairs have in common, as flags of a command line."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np

from experiments.protocol import checks, inputs
from jaxpref.data import files, sentiment
from jaxpref.training.optimizers import Optimizer
from jaxpref.training.pairset import PairSet

Labels = Literal["given", "coin"]


@dataclasses.dataclass(frozen=True)
class Protocol(inputs.Source):
    """All that decides the numbers of a training on pairs."""

    pairs: int = 64
    """Of the preference part, trained on; every seed draws others."""
    unseen: int = 32
    """Pairs of other prompts, only measured."""
    trained: int = 32
    """Of the preference part, those that are measured."""
    supervised_on: Literal["same", "other"] = "same"
    """Whether supervision shows the chosen responses of the preference part, or of as many other
    pairs."""
    supervised_epochs: int = 2
    """Epochs on chosen responses before, by the same optimizer."""
    supervised_rate: float = 1e-5
    optimizer: Optimizer = "adam"
    """None of them clips the gradient or decays weights."""
    rate: float = 5e-6
    """Learning rate of preference training, of all arms."""
    warmup: float = 0.0
    """Share of an epoch's updates over which the rate rises to that."""
    batch: int = 8
    """Pairs of an update."""
    seeds: int = 3
    """Each draws parts, order and coins."""
    resamples: int = 2000
    """Of the bootstrap over seeds, and pairs in them."""
    limit: int = 80
    """Most tokens of prompt and response; longer pairs are not used."""
    data: str | None = None
    """A file of pairs, also of HH-RLHF and packed (.gz), or a sentiment set, `single`, `short` or
    `long`, whose responses share no, a short or a long text after one label; by default the
    shipped pairs."""


class Parts(NamedTuple):
    """Rows of the data, of one seed. No prompt is in two of preference and unseen."""

    preference: np.ndarray
    unseen: np.ndarray
    supervised: np.ndarray


def check(config: Protocol) -> None:
    """Raises for settings that cannot be run."""
    counts = ("pairs", "unseen", "trained", "batch", "seeds", "resamples", "limit")
    checks.at_least(1, config, *counts)
    checks.at_least(0, config, "supervised_epochs", "warmup")
    checks.above(0, config, "rate", "supervised_rate")
    for name in ("batch", "trained"):
        if (value := getattr(config, name)) > config.pairs:
            raise ValueError(f"{name}: got {value}, expected at most the {config.pairs} pairs")


@functools.lru_cache(maxsize=4)  # a run asks for it twice: for its hash, and to train
def load(config: Protocol) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    check(config)
    found = texts_of(config)
    subject = inputs.subject(config)
    fitting, counts = inputs.encoded(config, found.rows, subject, too_long="drop")
    pairs = PairSet.of(subject.policy, fitting, skipped=(*found.faults, *counts.faults))
    split(config, pairs, 0)
    return subject, pairs


def texts_of(config: Protocol) -> files.Found:
    """The texts of a run."""
    kinds: dict[str | None, sentiment.Kind] = {
        "single": "single", "short": "short", "long": "long",
    }  # fmt: skip
    if config.data not in kinds:
        return inputs.read(config)
    wanted = config.unseen + config.pairs * (1 + (config.supervised_on == "other"))
    return files.Found(sentiment.pairs(kinds[config.data], 3 * wanted, seed=0), [])


def split(config: Protocol, pairs: PairSet, seed: int) -> Parts:
    """The parts of a seed: prompts in random order, dealt out one part after the other.

    Raises:
        ValueError: a part would be empty or too small.
    """
    rng = np.random.default_rng([seed, 15])
    place = np.empty(pairs.prompts.max() + 1, np.int64)
    place[rng.permutation(len(place))] = np.arange(len(place))
    rows = np.argsort(place[pairs.prompts], kind="stable")  # pairs of a prompt stay together
    sizes = {"unseen": config.unseen, "pairs": config.pairs}
    if config.supervised_on == "other":
        sizes["pairs of supervision"] = config.pairs
    found = []
    for what, size in sizes.items():
        if size > len(rows):
            drawn = " + ".join(map(str, sizes.values()))
            raise ValueError(
                f"{what}: a seed draws {drawn} pairs, no prompt in two parts; expected at most the"
                f" {len(pairs)} that fit {config.limit} tokens"
            )
        found.append(rows[:size])
        rest = rows[size:]
        rows = rest[~np.isin(pairs.prompts[rest], pairs.prompts[found[-1]])]
    unseen, preference, *other = found
    return Parts(preference, unseen, other[0] if other else preference)
