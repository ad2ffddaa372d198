"""The settings, and the pairs they are shown."""

import dataclasses
import functools
import itertools

import numpy as np

from experiments.protocol import checks, inputs
from jaxpref import losses
from jaxpref.training.objectives import NAMES, objective
from jaxpref.training.optimizers import Optimizer
from jaxpref.training.pairset import PairSet

FAMILIES = (
    *("pairwise", "links", "f_dpo", "anchored", "transport", "reference_free"),
    *("listwise", "logic", "batch", "unpaired"),
)


@dataclasses.dataclass(frozen=True)
class Config(inputs.Source):
    """All that decides the numbers; hyperparameters of the losses are their defaults."""

    losses: tuple[str, ...] = ()
    """Names; by default all of the catalogue that read log-probabilities of responses alone."""
    rates: tuple[float, ...] = (2e-6, 5e-6, 1.5e-5)
    """Learning rates, of which the validation pairs choose one for each loss."""
    optimizer: Optimizer = "adam"
    updates: int = 4
    batch: int = 4
    """Pairs of an update."""
    looks: int = 1
    """Moments of measurement after the start, evenly spaced; the last is the end."""
    train: int = 8
    """Pairs trained on; every seed draws others."""
    validation: int = 6
    """Pairs that choose the rate."""
    test: int = 8
    """Pairs that choose nothing."""
    seeds: int = 1
    """Each draws pairs, and their order."""
    supervised: int = 0
    """Updates of Adam on the training pairs' chosen responses before."""
    supervised_rate: float = 1e-3
    limit: int = 28
    """Most tokens of prompt and response; longer pairs are not used."""
    end: str = "none"


SMOKE = Config(
    losses=("dpo", "simpo", "sft"), rates=(5e-6, 5e-5), updates=2, looks=2, batch=2, train=2,
    validation=2, test=2,
)  # fmt: skip


def family(name: str) -> str:
    """The file of the catalogue that a loss is in."""
    return getattr(losses, name).__module__.rpartition(".")[2]


def names(config: Config) -> list[str]:
    """The losses of a run, by family."""
    wanted = config.losses or NAMES
    order = {name: i for i, name in enumerate(FAMILIES)}
    key = {name: order.get(family(name), len(order)) for name in wanted}
    return sorted(wanted, key=lambda name: (key[name], name))


def look_steps(config: Config) -> list[int]:
    """Updates done at each look, 0 first."""
    wanted = np.linspace(0, config.updates, config.looks + 1)
    return list(dict.fromkeys(round(float(x)) for x in wanted))


def drawn(config: Config) -> int:
    """Pairs of a seed: training, then validation, then test."""
    return config.train + config.validation + config.test


def rows_of(config: Config, part: str) -> slice:
    """Which of a seed's pairs are ``train``, ``validation`` or ``test``."""
    sizes = {name: getattr(config, name) for name in ("train", "validation", "test")}
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    return slice(ends[part] - sizes[part], ends[part])


def _check(config: Config) -> None:
    counts = ("updates", "batch", "looks", "train", "validation", "test", "seeds", "limit")
    checks.at_least(1, config, *counts)
    checks.at_least(0, config, "supervised")
    checks.above(0, config, "supervised_rate")
    rates = config.rates
    if not rates or min(rates) <= 0 or list(rates) != sorted(set(rates)):
        raise ValueError(f"rates: got {rates}, expected numbers above 0, rising")
    if config.batch > config.train:
        raise ValueError(f"batch: got {config.batch}, expected at most the {config.train} pairs")
    for name in config.losses:
        objective(name)
    if len(set(config.losses)) != len(config.losses):
        raise ValueError(f"losses: got {config.losses}, expected names, each once")


@functools.lru_cache(maxsize=1)  # a run asks for it twice: for its hash, and to train
def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run.

    Of the pairs that fit a fixed sample is taken, as many as all seeds draw together.
    """
    _check(config)
    found = inputs.read(config)
    subject = inputs.subject(config)
    usable, counts = inputs.encoded(config, found.rows, subject, too_long="drop")
    if (count := drawn(config)) > len(usable):
        raise ValueError(
            f"train, validation, test: got {count} pairs, expected at most the {len(usable)} that"
            f" fit into {config.limit} tokens"
        )
    pool = np.random.default_rng(0).permutation(len(usable))[: config.seeds * count]
    skipped = (*found.faults, *counts.faults)
    some = [usable[i] for i in pool]
    return subject, PairSet.of(subject.policy, some, quantiles=(1.0,), skipped=skipped)
