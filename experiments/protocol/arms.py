"""Training from one start by any loss, with one compiled program for all of them."""

import functools
import hashlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from tqdm import tqdm

from experiments.protocol import optimizers, running
from experiments.protocol.settings import Labels, Parts, Protocol, split
from jaxpref import gradients, runs
from jaxpref.data import batches
from jaxpref.data.batches import Batch
from jaxpref.logprobs import Scores
from jaxpref.training.objectives import Objective, pull
from jaxpref.training.pairset import PairSet, joined


class Programs(NamedTuple):
    """What a run compiles once: for all arms and seeds, a program for each sizes of a batch."""

    step: Any  # (params, state, parts, loss, rate, is the first, gram) -> params, state, logp, pull
    slope: Any  # (params, parts, loss's number, gram=None) -> gradient of the mean loss
    losses: tuple[str, ...]
    grams: Any  # (params, part) -> [pairs 2 2]
    changed: frozenset[str]  # losses whose pulls are changed by the Gram of each pair

    def gram(self, params: PyTree, parts: Sequence[Batch], loss: str) -> Any:
        """``[pairs 2 2]`` of a batch, as `step` wants it: zeros for a loss that reads none."""
        if loss in self.changed:
            return jnp.concatenate([self.grams(params, part) for part in parts])
        return np.zeros((sum(len(part.tokens) for part in parts), 2, 2), np.float32)


Change = Callable[[Array, Array], Array]
"""``(gram [pairs 2 2], pull [pairs 2]) -> pull``, of `jaxpref.training.mitigations`."""


def programs(
    optimizer: str, pairs: PairSet, objectives: Mapping[str, Objective],
    changes: Mapping[str, Change] = MappingProxyType({}),
) -> Programs:  # fmt: skip
    """The loss is a number: its pull is tiny, and one backward pass carries it to parameters.

    `changes` are of some of the losses, by name: what becomes of their pulls before that pass. The
    Grams are of the parameters before the update, in a program of their own.
    """
    descend = optimizers.unit_optimizer(optimizer)

    def pull_of(name, scores, batch, gram):
        found = pull(objectives[name], scores, batch)
        return changes[name](gram, found).astype(found.dtype) if name in changes else found

    def gradient(params, parts, index, first, gram):
        batch = joined(parts)
        scores, back = jax.vjp(lambda p: pairs.score_parts(p, parts), params)
        # At the start the policy is its own reference, and log-ratios are exactly zero.
        logp = jnp.where(first, jnp.asarray(batch.reference, scores.logp.dtype), scores.logp)
        slopes = [functools.partial(pull_of, name) for name in objectives]
        pulls = jax.lax.switch(index, slopes, scores._replace(logp=logp), batch, gram)
        mean = (pulls / len(pulls)).astype(logp.dtype)
        (found,) = back(Scores(mean, jnp.zeros_like(scores.lengths)))
        return (scores.logp, pulls), found

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, parts, index, rate, first, gram):
        seen, found = gradient(params, parts, index, first, gram)
        update, state = descend.update(found, state, params)
        moved = jax.tree.map(lambda p, u: p + rate.astype(u.dtype) * u, params, update)
        return moved, state, *seen

    @jax.jit
    def slope(params, parts, index, gram=None):
        return gradient(params, parts, index, True, gram)[1]

    own = functools.partial(grams, pairs)
    return Programs(step, slope, tuple(objectives), own, frozenset(changes))


@functools.partial(jax.jit, static_argnums=0)
def grams(pairs: PairSet, params: PyTree, batch: Batch, metric: PyTree = None) -> Array:
    """Inner products ``[pairs 2 2]`` of each pair's two gradients, plain or in a metric."""
    found = gradients.pair_grams(pairs.logp, params, batch[:3], metric=metric, responses="together")
    return found.gram


class Arm(NamedTuple):
    """One training."""

    loss: str
    updates: int
    rate: float
    labels: Labels = "given"
    """By ``coin`` half of the pairs are shown the wrong way round, the same ones every time."""
    warmup: int = 0


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


def rate_at(arm: Arm, number: int) -> float:
    """Learning rate of an update, from 0 on."""
    return arm.rate * min(1.0, (number + 1) / (arm.warmup + 1))


def rates_of(arm: Arm) -> tuple[float, ...]:
    """Of all its updates."""
    return tuple(rate_at(arm, number) for number in range(arm.updates))


class Course(NamedTuple):
    """Which pairs an arm is shown when, and how."""

    rows: np.ndarray  # of the data
    batch: int
    seed: int
    swap: np.ndarray  # [pairs of the data], those shown the wrong way round

    @classmethod
    def of(
        cls, config: Protocol, pairs: PairSet, rows: np.ndarray, labels: Labels, seed: int
    ) -> "Course":
        """By ``coin`` half of the pairs are shown the wrong way round, the same every time."""
        coin = np.random.default_rng([seed, 16]).random(len(pairs)) < 0.5
        return cls(rows, config.batch, seed, coin if labels == "coin" else np.zeros_like(coin))

    def index(self, number: int) -> np.ndarray:
        """Rows of an update, from 0 on."""
        return self.rows[batches.order(len(self.rows), self.batch, self.seed, number)]

    def parts(self, pairs: PairSet, number: int) -> tuple[Batch, ...]:
        """Its batch, by length."""
        return tuple(self._shown(part) for part in pairs.parts(self.index(number)))

    def _shown(self, batch: Batch) -> Batch:
        names = ("tokens", "is_token", "is_response", "reference")
        turned = {name: self.turned(getattr(batch, name), batch.index) for name in names}
        return batch._replace(**turned)

    def turned(self, x: Any, index: Any) -> np.ndarray:
        """``[pairs 2 ...]`` with the responses of swapped pairs exchanged: there and back."""
        x, swap = np.asarray(x), self.swap[np.asarray(index)]
        return np.where(swap.reshape(-1, *[1] * (x.ndim - 1)), x[:, ::-1], x)


def train(
    config: Protocol,
    run: Programs,
    pairs: PairSet,
    params: PyTree,
    rows: np.ndarray,
    arm: Arm,
    seed: int,
    *,
    name: str,
    looks: Container[int],
    look: Callable[[int, PyTree, PyTree], Any],
) -> dict[str, np.ndarray]:
    """Trains one arm.

    Args:
        config: Batch size and optimizer.
        run: The programs.
        pairs: With reference log-probabilities of `rows`.
        params: The start.
        rows: Pairs to train on.
        arm: What is trained.
        seed: Of the order and the coins.
        name: For the progress bar.
        looks: Numbers of updates after which `look` is called.
        look: ``(updates done, parameters, optimizer's state)``.

    Returns:
        ``index [updates batch]``, the rows of each update; their log-probabilities *before* it,
        ``seen [updates batch 2]``, and the pulls of its loss on them, ``pull [updates batch 2]``,
        chosen first whatever was shown; ``diverged``, the update that met log-probabilities that
        are not finite, or -1. From there on nothing is trained, nor looked at.
    """
    course = Course.of(config, pairs, rows, arm.labels, seed)
    index = np.array([course.index(n) for n in range(arm.updates)])
    seen, pulls = np.full((2, *index.shape, 2), np.nan, np.float32)
    moving = jax.tree.map(jnp.copy, params)
    state = optimizers.unit_optimizer(config.optimizer).init(moving)
    loss = jnp.int32(run.losses.index(arm.loss))
    for number in tqdm(range(arm.updates), f"{name}, seed {seed}", unit="update", leave=False):
        parts, rate = course.parts(pairs, number), jnp.float32(rate_at(arm, number))
        gram = run.gram(moving, parts, arm.loss)
        first = jnp.bool_(number == 0)
        moving, state, *found = run.step(moving, state, parts, loss, rate, first, gram)
        order = np.concatenate([part.index for part in parts])
        back = np.argsort(order)[np.argsort(np.argsort(index[number]))]
        seen[number], pulls[number] = (course.turned(x, order)[back] for x in found)
        if not np.isfinite(seen[number]).all():
            return {"index": index, "seen": seen, "pull": pulls, "diverged": np.array(number)}
        if number + 1 in looks:
            look(number + 1, moving, state)
    return {"index": index, "seen": seen, "pull": pulls, "diverged": np.array(-1)}


def follow(
    config: Protocol,
    run: Programs,
    begun: "Begun",
    arm: Arm,
    *,
    name: str,
    looks: Sequence[int],
    also: Callable[[int, PyTree, PyTree], None] = lambda updates, params, state: None,
    shown: PairSet | None = None,
) -> dict[str, np.ndarray]:
    """Trains one arm on the preference part and measures its probes on the way.

    It may be `shown` the pairs in another form, with its own references, in the same sizes.

    Returns:
        What `train` does, and ``change [looks probes 2]`` of log-probabilities since the start, in
        nats, NaN from where the arm diverged.
    """
    probes = probes_of(config, begun.parts)
    before = begun.pairs.known[probes]
    change = np.full((len(looks), len(probes), 2), np.nan, np.float32)

    def look(number, params, state):
        change[looks.index(number)] = begun.pairs.logps(params, probes) - before
        also(number, params, state)

    seen = train(
        config, run, shown or begun.pairs, begun.params, begun.parts.preference, arm, begun.seed,
        name=name, looks=looks, look=look,
    )  # fmt: skip
    return {"change": change, **seen}


def probes_of(config: Protocol, parts: Parts) -> np.ndarray:
    """Rows that are measured: trained ones first, then the unseen."""
    return np.concatenate([parts.preference[: config.trained], parts.unseen])


class Begun(NamedTuple):
    """Where all arms of a seed begin."""

    params: PyTree
    pairs: PairSet  # with the start's log-probabilities of all rows that are used
    parts: Parts
    seed: int


def begin(
    config: Protocol, run: Programs, pairs: PairSet, params: PyTree, seed: int,
    folder: Path | None, identity: str,
) -> Begun:  # fmt: skip
    """The supervised model of a seed, read if a run's folder has it, and its log-probabilities."""
    parts = split(config, pairs, seed)
    file = folder / "starts" / f"{seed}.npz" if folder else None
    if config.supervised_epochs and file and file.exists():
        params = _read(file, params, identity)
    elif config.supervised_epochs:
        params = _supervised(config, run, pairs, params, parts.supervised, seed)
        if file:
            file.parent.mkdir(exist_ok=True)
            runs.save_arrays(file, {"identity": _letters(identity), **_leaves(params)})
    used = np.concatenate([parts.preference, parts.unseen])
    reference = np.full((len(pairs), 2), np.nan, np.float32)
    reference[used] = pairs.logps(params, used)
    return Begun(params, pairs.with_reference(reference), parts, seed)


def _supervised(config: Protocol, run: Programs, pairs: PairSet, params: PyTree, rows: np.ndarray,
                seed: int) -> PyTree:  # fmt: skip
    updates = config.supervised_epochs * batches.steps_per_epoch(len(rows), config.batch)
    arm, found = Arm("sft", updates, config.supervised_rate), []
    zero = pairs.with_reference(np.zeros((len(pairs), 2), np.float32))
    train(
        config, run, zero, params, rows, arm, seed, name="supervised", looks={updates},
        look=lambda number, trained, state: found.append(jax.tree.map(jnp.copy, trained)),
    )  # fmt: skip
    if not found:
        raise ArithmeticError(
            f"supervised_rate: at {config.supervised_rate:g} supervision of seed {seed} diverged,"
            " expected a rate that trains"
        )
    return found[0]


def identity_of(config: Protocol, hashes: Mapping[str, Any]) -> str:
    """What decides a start, as one hash: model, data, and the settings of supervision."""
    names = ("pairs", "unseen", "supervised_on", "supervised_epochs", "supervised_rate",
             "optimizer", "batch")  # fmt: skip
    decided = [hashes["model"], hashes["data"], *(repr(getattr(config, n)) for n in names)]
    return hashlib.sha256("\n".join(decided).encode()).hexdigest()


def _letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _leaves(params: PyTree) -> dict[str, np.ndarray]:
    found, _ = jax.tree.flatten_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def _read(file: Path, like: PyTree, identity: str) -> PyTree:
    arrays = runs.load_arrays(file)
    if not np.array_equal(arrays.pop("identity", np.zeros(0)), _letters(identity)):
        raise ValueError(
            f"{file}: a start of another model, data or supervision, expected this run's"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(x) for x in arrays.values()])


def over_seeds(
    config: Protocol,
    folder: Path | None,
    begin: Callable[[int], Any],
    first: tuple[str, Callable[[Any], Mapping[str, Any]]],
    parts: Mapping[str, Callable[[Any], Mapping[str, Any]]],
) -> dict[str, np.ndarray]:
    """All parts of a run, seed after seed, each made once and kept in the run's folder.

    Args:
        config: For the number of seeds.
        folder: Of the run.
        begin: What all parts of a seed begin from; called when the first of them is to be made.
        first: A part by name, whose arrays keep their names.
        parts: Further parts by name; to their arrays' names their own is put, ``{part}_{array}``.

    Returns:
        All arrays with a leading axis ``seeds``.
    """
    seeds = []
    for seed in range(config.seeds):
        begun = functools.cache(functools.partial(begin, seed))
        record = running.kept(folder, f"{seed}_{first[0]}", lambda begun=begun: first[1](begun()))
        for name, make in tqdm(parts.items(), f"seed {seed}", unit="part"):
            made = running.kept(folder, f"{seed}_{name}", lambda m=make, begun=begun: m(begun()))
            record |= {f"{name}_{key}": value for key, value in made.items()}
        seeds.append(record)
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}
