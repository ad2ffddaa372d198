"""What is run: the settings, the pairs of each course of training, and when it is looked at."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import numpy as np

from experiments import common
from jaxpref.data import batches, files, sentiment


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    sets: tuple[Literal["single", "short", "long"], ...] = ("single", "short", "long")
    """What follows the label: nothing, a short suffix, a long one."""
    train: tuple[Literal["all", "last"], ...] = ("all",)
    """What DPO trains: all parameters, or a copy of the unembedding alone."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """Of DPO, at a constant learning rate; the supervised phase uses Adam."""
    learning_rate: float = 5e-6
    beta: float = 0.1
    updates: int = 20
    """Of DPO."""
    every: int = 4
    """Updates from one look to the next."""
    batch: int = 6
    """Pairs of an update, in both phases."""
    pairs: int = 48
    """To train on, in each set; each seed draws others."""
    probes: int = 8
    """Held-out pairs to look at."""
    supervised: int = 10
    """Updates on the chosen responses before DPO."""
    supervised_rate: float = 1.41e-5
    supervised_on: Literal["response", "text"] = "response"
    """Which tokens the supervised phase scores: the chosen response, or its prompt too."""
    seeds: int = 3
    """Each draws sentences and batches, and the weights of the small model."""
    limit: int = 96
    """Most tokens of prompt and response; longer prompts lose their beginning."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A JSONL file of pairs (also .gz, also HH-RLHF): one more set, named `data`."""
    bad: common.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    columns: str = ""
    """The data's own names of columns, ``chosen=good,rejected=bad``."""
    end: str = "none"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = common.DATE
    """Today, for a chat template that asks."""


SMOKE = Config(updates=2, every=1, batch=2, pairs=2, probes=2, supervised=1, seeds=1)


Set = Literal["single", "short", "long", "data"]


class Part(NamedTuple):
    """One course of training."""

    seed: int
    set: Set
    train: str


def sets_of(config: Config) -> tuple[Set, ...]:
    """The sets of a run, in the order of their suffixes."""
    known: tuple[sentiment.Kind, ...] = ("single", "short", "long")
    kinds: list[Set] = [kind for kind in known if kind in config.sets]
    return (*kinds, "data") if config.data else tuple(kinds)


def parts(config: Config) -> list[Part]:
    """All of them, in the order of the arrays."""
    return [Part(*x) for x in itertools.product(range(config.seeds), sets_of(config), config.train)]


def looks(config: Config) -> list[int]:
    """Numbers of updates done at the looks: the first is 0, the last the end."""
    return [*range(0, config.updates, config.every), config.updates]


def load(config: Config) -> tuple[common.Subject, common.Problem]:
    """Model, and the pairs of all sets and seeds as one array; raises for bad settings."""
    common.at_least(1, config, "updates", "every", "batch", "pairs", "probes", "seeds", "limit")
    common.above(0, config, "learning_rate", "beta", "supervised_rate")
    common.at_least(0, config, "supervised")
    if config.batch > config.pairs:
        raise ValueError(f"batch: got {config.batch}, expected at most pairs={config.pairs}")
    if not sets_of(config) or not config.train:
        raise ValueError(f"sets, train: got {config.sets}, {config.train}, expected one or more")
    count = config.pairs + config.probes
    own = common.read(config) if config.data else files.Found([], [])
    subject = common.open_model(config.model, scan=True)
    if config.data:  # each seed draws from the rows that can be used
        usable, counts = common.encoded(config, own.rows, subject, too_long="truncate_left")
        rows = [own.rows[pair.index] for pair in usable]
        own = files.Found(rows, [*own.faults, *counts.faults])
        if count > len(rows):
            raise ValueError(f"pairs: got {count} with the probes, expected at most {len(rows)}")
    texts = []
    for seed, kind in itertools.product(range(config.seeds), sets_of(config)):
        if kind == "data":
            texts += [own.rows[row] for row in batches.order(len(own.rows), count, seed, 0)]
        else:
            texts += sentiment.pairs(kind, count, seed=seed)
    every = files.Found(texts, own.faults)
    return subject, common.problem_of(config, subject, every, least=len(texts))


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    return common.hashes(*load(config))


def rows_of(config: Config, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the pairs to train on, and of the probes."""
    names, count = sets_of(config), config.pairs + config.probes
    begin = count * (part.seed * len(names) + names.index(part.set))
    rows = np.arange(begin, begin + count)
    return rows[: config.pairs], rows[config.pairs :]
