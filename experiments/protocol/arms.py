"""The arms of a comparison, the start that they share, and what is measured on the way."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from experiments.protocol import inputs, running
from experiments.protocol.settings import Labels, Parts, Protocol, split
from jaxpref import runs
from jaxpref.data import batches
from jaxpref.training import courses, parallel
from jaxpref.training.courses import Change, Course, Programs
from jaxpref.training.objectives import Objective
from jaxpref.training.optimizers import unit_optimizer
from jaxpref.training.pairset import PairSet


class Arm(NamedTuple):
    """One training."""

    loss: str
    updates: int
    rate: float
    labels: Labels = "given"
    """By ``coin`` half of the pairs are shown the wrong way round, the same ones every time."""
    warmup: int = 0

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of its updates, which rise to its own over the warm-up."""
        rises = (min(1.0, (n + 1) / (self.warmup + 1)) for n in range(self.updates))
        return tuple(self.rate * each for each in rises)


# DPO and the two controls of every comparison: loss and labels.
ARMS: dict[str, tuple[str, Labels]] = {
    "dpo": ("dpo", "given"), "coin": ("dpo", "coin"), "sft": ("sft", "given"),
}  # fmt: skip


def updates_of(config: Protocol, epochs: float) -> int:
    """So many epochs over the preference part."""
    return round(epochs * batches.steps_per_epoch(config.pairs, config.batch))


def looks_of(config: Protocol, epochs: Iterable[float]) -> list[int]:
    """Updates after which an arm is looked at, ascending, each once and none before the first."""
    return sorted({updates_of(config, each) for each in epochs} - {0})


def arm_of(config: Protocol, name: str, updates: int) -> Arm:
    """One of `ARMS`, or a loss by its name."""
    loss, labels = ARMS.get(name, (name, "given"))
    return Arm(loss, updates, config.rate, labels, updates_of(config, config.warmup))


class Begun(NamedTuple):
    """Where all arms of a seed begin."""

    config: Protocol
    run: Programs
    params: PyTree
    pairs: PairSet  # with the start's log-probabilities of all rows that are used
    parts: Parts
    seed: int

    @property
    def probes(self) -> np.ndarray:
        """Rows that are measured: trained ones first, then the unseen."""
        return np.concatenate([self.parts.preference[: self.config.trained], self.parts.unseen])

    def on(self, rows: np.ndarray) -> "Begun":
        """The same with these rows for the preference part."""
        config = dataclasses.replace(self.config, pairs=len(rows))
        return self._replace(config=config, parts=self.parts._replace(preference=rows))

    def course(self, labels: Labels) -> Course:
        """The preference part, in the order of the seed."""
        course = Course(self.parts.preference, self.config.batch, self.seed)
        coin = courses.coin(len(self.pairs), self.seed)
        return course._replace(swapped=coin) if labels == "coin" else course

    def look(self, names: Sequence[str] = ("lengths",)) -> dict[str, np.ndarray]:
        """Of the probes at the start ``lengths``, and ``logp``, nats, ``[probes 2]``."""
        found = {"lengths": self.pairs.lengths, "logp": self.pairs.known}
        return {name: found[name][self.probes] for name in names}


def starts(
    config: Protocol, subject: inputs.Subject, pairs: PairSet, losses: Mapping[str, Objective],
    folder: Path | None, changes: Mapping[str, Change] = MappingProxyType({}),
) -> Callable[[int], Begun]:  # fmt: skip
    """Of a seed its start, kept in the run's folder: for arms of these losses."""
    run = courses.programs(pairs, losses, changes)
    identity = identity_of(config, inputs.hashes(subject, pairs))
    return lambda seed: begin(config, run, pairs, subject.params, seed, folder, identity)


def begin(
    config: Protocol, run: Programs, pairs: PairSet, params: PyTree, seed: int,
    folder: Path | None = None, identity: str = "",
) -> Begun:  # fmt: skip
    """The supervised model of a seed, read if a run's folder has it, and its log-probabilities."""
    parts = split(config, pairs, seed)
    file = folder / "starts" / f"{seed}.npz" if folder else None
    if config.supervised_epochs and file and parallel.agreed(file.exists):
        params = _read(file, params, identity)
    elif config.supervised_epochs:
        course = Course(parts.supervised, config.batch, seed)
        rates = (config.supervised_rate,) * (config.supervised_epochs * course.epoch)
        params = supervised(run, pairs, params, course, rates, config.optimizer)
        leaves = _leaves(params) if file else {}
        if file and jax.process_index() == 0:
            file.parent.mkdir(exist_ok=True)
            runs.save_arrays(file, {"identity": _letters(identity), **leaves})
    used = np.concatenate([parts.preference, parts.unseen])
    return Begun(config, run, params, pairs.referring_to(params, used), parts, seed)


def supervised(
    run: Programs, pairs: PairSet, params: PyTree, course: Course, rates: Sequence[float],
    optimizer: str = "adam",
) -> PyTree:  # fmt: skip
    """Parameters after updates on chosen responses, by the loss ``sft``.

    Raises:
        ArithmeticError: They diverged.
    """
    if not rates:
        return params
    unread = pairs.with_reference(np.zeros((len(pairs), 2), np.float32))
    found = courses.train(
        run, unread, params, course, "sft", rates, optimizer=unit_optimizer(optimizer),
        title=f"supervised, seed {course.seed}",
    )  # fmt: skip
    if found.diverged >= 0:
        raise ArithmeticError(
            f"supervised_rate: at {max(rates):g} supervision of seed {course.seed} diverged,"
            " expected a rate that trains"
        )
    return found.params


def follow(
    begun: Begun,
    name: str,
    looks: Sequence[int],
    *,
    also: Callable[[int, PyTree, PyTree], None] = lambda updates, params, state: None,
    shown: PairSet | None = None,
) -> dict[str, np.ndarray]:
    """Trains one arm on the preference part and measures its probes on the way.

    Args:
        begun: The start.
        name: Of the arm, as of `arm_of`.
        looks: Updates after which it is looked at, the last of them the end.
        also: What else is done then, ``(updates, parameters, optimizer's state)``.
        shown: The pairs in another form, with its own references, in the same sizes.

    Returns:
        The arrays of `courses.Trained`, and ``change [looks probes 2]`` of log-probabilities since
        the start, in nats, NaN from where the arm diverged.
    """
    arm, probes = arm_of(begun.config, name, looks[-1]), begun.probes
    before = begun.pairs.known[probes]
    change = np.full((len(looks), len(probes), 2), np.nan, np.float32)

    def look(number, params, state):
        change[looks.index(number)] = begun.pairs.logps(params, probes) - before
        also(number, params, state)

    found = courses.train(
        begun.run, shown or begun.pairs, begun.params, begun.course(arm.labels), arm.loss,
        arm.rates, optimizer=unit_optimizer(begun.config.optimizer), looks=looks, look=look,
        title=f"{name}, seed {begun.seed}",
    )  # fmt: skip
    seen = {key: np.asarray(x) for key, x in found._asdict().items() if key != "params"}
    return {"change": change, **seen}


def identity_of(config: Protocol, hashes: Mapping[str, Any]) -> str:
    """What decides a start, as one hash: model, data, and the settings of supervision."""
    names = ("pairs", "unseen", "supervised_on", "supervised_epochs", "supervised_rate",
             "optimizer", "batch")  # fmt: skip
    decided = [hashes["model"], hashes["data"], *(repr(getattr(config, n)) for n in names)]
    return hashlib.sha256("\n".join(decided).encode()).hexdigest()


def _letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _leaves(params: PyTree) -> dict[str, np.ndarray]:
    found, _ = jax.tree.flatten_with_path(parallel.to_host(params))
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def _read(file: Path, like: PyTree, identity: str) -> PyTree:
    arrays = runs.load_arrays(file)
    if not np.array_equal(arrays.pop("identity", np.zeros(0)), _letters(identity)):
        raise ValueError(
            f"{file}: a start of another model, data or supervision, expected this run's"
        )
    where = jax.tree.map(lambda leaf: leaf.sharding, like)
    return parallel.put(jax.tree.unflatten(jax.tree.structure(like), arrays.values()), where)


def over_seeds(
    config: Protocol,
    folder: Path | None,
    begin: Callable[[int], Any],
    first: tuple[str, Callable[[Any], Mapping[str, Any]]],
    names: Iterable[Any],
    arm: Callable[[Any, Any], Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """All parts of a run, seed after seed, each made once and kept in the run's folder.

    Args:
        config: For the number of seeds.
        folder: Of the run.
        begin: What all parts of a seed begin from; called when the first of them is to be made.
        first: A part by name, whose arrays keep their names.
        names: Of further parts, which are put to their arrays' names, ``{part}_{array}``.
        arm: ``(name, what they begin from) ->`` the arrays of such a part.

    Returns:
        All arrays with a leading axis ``seeds``.
    """
    seeds = []
    for seed in range(config.seeds):
        begun = functools.cache(functools.partial(begin, seed))
        record = running.kept(folder, f"{seed}_{first[0]}", lambda begun=begun: first[1](begun()))
        for name in tqdm(names, f"seed {seed}", unit="part"):
            make = lambda name=name, begun=begun: arm(name, begun())  # noqa: E731
            made = running.kept(folder, f"{seed}_{name}", make)
            record |= {f"{name}_{key}": value for key, value in made.items()}
        seeds.append(record)
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
