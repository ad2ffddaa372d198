"""What a run is: its settings and its parts."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

from experiments import common

Optimizer = Literal["sgd", "adam"]


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    methods: tuple[str, ...] = (
        *("dpo", "dpo + sft", "dpo_shift", "normalised", "calibrated"),
        *("projected", "pcgrad", "contrast mask", "learned mask"),
    )
    optimizers: tuple[Optimizer, ...] = ("sgd",)
    length: float = 1e-3
    """Of each step of gradient descent in the space of parameters, the same for all methods."""
    adam_rate: float = 1e-6
    pairs: int = 16
    """Trained on; as many others are held out."""
    batch: int = 4
    updates: int = 20
    every: int = 5
    """Updates between looks."""
    seeds: int = 2
    """Each draws other pairs."""
    beta: float = 0.1
    sft_weight: float = 0.1
    """Of the likelihood term, per nat."""
    shift: float = 0.75
    """Of DPO-Shift."""
    price: float = 1e-3
    """Of a token that a learned mask leaves, nats."""
    mask_rate: float = 10.0
    """Learning rate of learned masks."""
    supervised: int = 0
    """Updates of Adam on the chosen responses of all pairs before, at `supervised_rate`."""
    supervised_rate: float = 1e-3
    limit: int = 64
    """Most tokens of prompt and response; longer prompts lose their beginning."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str = "long"
    """A JSONL file of pairs, `preferences` for the shipped ones, or a sentiment set: `single`,
    `short` or `long`, whose two responses share no, a short or a long text after one label."""
    bad: common.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    columns: str = ""
    """The data's own names of columns, ``chosen=good,rejected=bad``."""
    end: str = "none"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = common.DATE
    """Today, for a chat template that asks."""


SMOKE = Config(
    methods=("dpo", "normalised", "learned mask"), pairs=2, batch=2, updates=2, every=1, seeds=1
)


class Part(NamedTuple):
    """One training run."""

    seed: int
    optimizer: str
    method: str


def parts(config: Config) -> list[Part]:
    """All of them, in the order of the arrays."""
    grid = itertools.product(range(config.seeds), config.optimizers, config.methods)
    return [Part(*x) for x in grid]


def looks(config: Config) -> list[int]:
    """Updates done at each look."""
    return sorted({*range(0, config.updates + 1, config.every), config.updates})
