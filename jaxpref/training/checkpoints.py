"""Checkpoints that hold all a run needs to go on bit by bit, by Orbax.

A checkpoint is the whole `State`: parameters, optimizer, step, key. Batches are a pure function of
the step and of the ``data`` a caller names (seed, hash, batch size), so this, too, is the position
in the data. Beside it lie the shapes of all leaves and the best metric so far.
"""

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxpref.training.step import State


class Best(NamedTuple):
    """The lowest metric so far, and the step of its checkpoint."""

    step: int
    metric: float


class Checkpoints:
    """The checkpoints of one run: the last ``keep``, and the best.

    A checkpoint is there whole or not at all, and older ones go only when it is: a kill or a full
    disk costs the one that is being written. `save` returns when it is on disk. With several
    processes all of them call `save` and `restore`.

    Args:
      folder: made if it is not there.
      keep: number of latest checkpoints that stay, at least 1.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1")
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["metric"],
            reverse=True,  # the first of the sorted ones is dropped first
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self.folder = Path(folder)
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> Best | None:
        """The best so far, as of the latest checkpoint; None without a metric."""
        if self.latest is None:
            return None
        found = self._about(self.latest)["best"]
        return None if found is None else Best(**found)

    def save(
        self,
        state: State,
        *,
        metric: float | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state under its step.

        Args:
          state: of the step.
          metric: of these parameters; the checkpoint with the lowest one is kept.
          data: what, with the step, decides a batch; JSON values. `restore` refuses another.

        Raises:
          ValueError: the metric is not finite, or there is a checkpoint of this step.
          OSError: it could not be saved (a full disk, say); names the path. Earlier ones are kept.
        """
        step, leaves = int(state.step), _leaves(state)
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"metric is {metric} at step {step}, expected a finite number")
        if step in self._manager.all_steps():
            raise ValueError(f"{self.folder / str(step)} exists; expected a later step")
        best = self.best
        if metric is not None and (best is None or metric < best.metric):
            best = Best(step, float(metric))
        about = {
            "leaves": {name: _described(leaf) for name, leaf in leaves.items()},
            "data": dict(data or {}),
            "best": best and best._asdict(),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            about=ocp.args.JsonSave(about),
        )
        metrics = None if metric is None else {"metric": float(metric)}
        try:
            _check_space(self.folder, leaves.values())
            with _quiet():
                self._manager.save(step, args=items, metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore has no class of its own
            for part in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            reason = str(error).strip().splitlines()[0]
            message = f"{self.folder / str(step)} is not saved, earlier checkpoints are kept"
            raise OSError(f"{message}: {reason}") from error

    def restore(
        self, like: State, *, step: int | None = None, data: Mapping[str, Any] | None = None
    ) -> State:
        """Read a state back, bit for bit.

        Args:
          like: a state of the same shapes; its arrays say where (on which devices) those of the
            checkpoint go.
          step: of the checkpoint; None is the latest.
          data: as given to `save`.

        Raises:
          FileNotFoundError: no such checkpoint.
          ValueError: a checkpoint of another model or optimizer: names the first leaf that differs,
            what was expected and found; or of other data: names what differs.
        """
        step = self.latest if step is None else step
        path = self.folder / str(step)
        if step is None or step not in self._manager.all_steps():
            known = list(self._manager.all_steps())
            raise FileNotFoundError(f"{path} is not a checkpoint, expected one of steps {known}")
        about, leaves = self._about(step), _leaves(like)
        _check_leaves(path, about["leaves"], {n: _described(leaf) for n, leaf in leaves.items()})
        _check_data(path, about["data"], dict(data or {}))
        wanted = {name: _shape(leaf) for name, leaf in leaves.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        found = self._manager.restore(step, args=items)["state"]
        return _rebuilt(like, found)

    def _about(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["about"]


def _check_space(folder: Path, leaves: Iterable[Any]) -> None:
    """Refuse before anything is written; Orbax notices late and says so at length."""
    needed, free = sum(leaf.nbytes for leaf in leaves), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free} of {needed} bytes are free"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log of an error that is raised anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _leaves(state: State) -> dict[str, Any]:
    """All leaves by their path, keys as their bits."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    if len(named) < len(jax.tree.leaves(state)):
        raise ValueError("state has two leaves of one path, expected names without dots")
    return {n: jax.random.key_data(x) if _is_key(x) else x for n, x in named.items()}


def _rebuilt(like: State, leaves: dict[str, Any]) -> State:
    olds, structure = jax.tree.flatten(like)
    news = [
        jax.random.wrap_key_data(leaves[name], impl=jax.random.key_impl(old))
        if _is_key(old)
        else leaves[name]
        for name, old in zip(_leaves(like), olds, strict=True)
    ]
    return structure.unflatten(news)


def _described(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_leaves(path: Path, found: dict[str, str], expected: dict[str, str]) -> None:
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if names:
        first, more = names[0], f" (and {len(names) - 1} more)" if names[1:] else ""
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: {first} is "
            f"{found.get(first, 'absent')}, expected {expected.get(first, 'none')}{more}"
        )


def _check_data(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in {**expected, **found}:
        now, was = expected.get(name, "absent"), found.get(name, "absent")
        if now != was:
            raise ValueError(
                f"{path} is a checkpoint of other data: {name} is {was}, expected {now}"
            )
