"""The loop around the step: metrics, checkpoints, and a run that may be killed at any time."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxpref.training.checkpoints import Checkpoints
from jaxpref.training.step import State, Step


class NotFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names the step and the data's rows."""


def fit(
    step: Step,
    state: State,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    run: Any,
    checkpoint_every: int,
    keep: int = 2,
    metric: Callable[[State], float] | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> State:
    """Train up to update ``steps``, from the run's latest checkpoint if it has one.

    Guarantees:

    - A line of ``metrics.jsonl`` is written after each update, a checkpoint after every
      ``checkpoint_every`` and after the last.
    - On CPU a run that is killed at any time, ``kill -9`` included, and started again by the same
      call ends with the same bits in ``metrics.jsonl`` and in the parameters as one that was not.
      What came after the latest checkpoint is done again.
    - A loss or gradient that is not finite stops the run. The state before that update is saved,
      and the error names the step and the rows of its batch.
    - A batch whose shape the step refuses (micro-batches or devices that do not divide a short last
      one, say) is refused before the first update: the shapes of an epoch are tried, without
      compiling, up to where a row comes again.

    Args:
      step: of `jaxpref.training.step.make_step`, or another whose metrics have ``loss``.
      state: before the first update; a checkpoint replaces it. Its arrays are used up.
      batch_at: ``step -> batch``, a pure function: a batch must not depend on those before it. A
        field ``index [pairs]`` holds the rows of the data that an error names.
      steps: number of updates when the run is done, those before a restart included.
      run: of `jaxpref.runs.create`: its ``path``, ``log`` and ``truncate``. Checkpoints go to
        ``path / "checkpoints"``.
      checkpoint_every: updates between checkpoints.
      keep: latest checkpoints to keep, beside the best.
      metric: of the parameters in a checkpoint, lower is better; the best checkpoint is kept.
      data: what, with the step, decides a batch (seed, batch size, hash of the data); a checkpoint
        of other data is refused.
      progress: show a bar (needs tqdm).

    Returns:
      The state after the last update.

    Raises:
      NotFiniteError: see above.
      ValueError: ``steps`` or ``checkpoint_every`` below 1; a checkpoint of another model,
        optimizer or data; a batch of this epoch that the step refuses, by its number.
      OSError: a line or a checkpoint could not be saved; what was saved before is kept.
    """
    for name, value in (("steps", steps), ("checkpoint_every", checkpoint_every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    with Checkpoints(run.path / "checkpoints", keep=keep) as checkpoints:

        def save(state: State) -> None:
            measured = None if metric is None else float(metric(state))
            checkpoints.save(state, metric=measured, data=data)

        if checkpoints.latest is not None:
            state = checkpoints.restore(state, data=data)
        start = int(state.step)
        _try_shapes(step, state, batch_at, range(start, steps))
        run.truncate(start)
        for number in _shown(range(start, steps), steps, progress=progress):
            batch = batch_at(number)
            state, metrics, scores = step(state, batch)
            metrics = {name: np.asarray(value) for name, value in metrics.items()}
            reason = _not_finite(metrics)
            if reason:
                if checkpoints.latest != number:
                    checkpoints.save(state, data=data)
                kept = checkpoints.folder / str(number)
                rows = _rows(batch, scores)
                raise NotFiniteError(f"step {number}: {reason}, {rows}; the state before is {kept}")
            run.log(number, metrics)
            if (number + 1) % checkpoint_every == 0 or number + 1 == steps:
                save(state)
    return state


def _try_shapes(step: Step, state: State, batch_at: Callable[[int], Any], numbers: range) -> None:
    """Traces the step for every shape to come, until a row of the data comes again: an epoch."""
    # A jitted step, or one that says which it calls.
    both: list[Any] = [step, getattr(step, "__wrapped__", None)]
    traced = [f for f in both if hasattr(f, "eval_shape")]
    tried, rows = set(), set()
    for number in numbers if traced else ():
        batch = batch_at(number)
        shapes = repr(jax.eval_shape(lambda x: x, batch))
        if shapes not in tried:
            try:
                traced[0].eval_shape(state, batch)
            except ValueError as error:
                raise ValueError(f"step {number}: {error}") from None
        index = getattr(batch, "index", None)
        new = set() if index is None else set(np.asarray(index).tolist())
        if not new or new & rows:
            return
        tried.add(shapes)
        rows |= new


def _not_finite(metrics: Mapping[str, np.ndarray]) -> str:
    """Which of the two is not finite, and its value; empty if both are."""
    for name in ("loss", "gradient_norm"):
        if name in metrics and not math.isfinite(metrics[name]):
            return f"{name} is {metrics[name]}"
    return ""


def _rows(batch: Any, scores: Any) -> str:
    """The batch's rows of the data, and which of them have scores that are not finite."""
    if getattr(batch, "index", None) is None:
        return "in a batch without index"
    index = np.asarray(batch.index)
    bad = np.zeros(len(index), bool)
    for leaf in jax.tree.leaves(scores):
        values = np.asarray(leaf, np.float64)
        if values.shape[:1] == index.shape:
            bad |= ~np.isfinite(values).reshape(len(index), -1).all(axis=1)
    said = f"in the batch of rows {index.tolist()}"
    return f"{said}, scores not finite in {index[bad].tolist()}" if bad.any() else said


def _shown(numbers: range, total: int, *, progress: bool) -> Any:
    # Any: a checker of Iterable[int] would take the bar's first item.
    if not progress:
        return numbers
    from tqdm import tqdm

    return tqdm(numbers, initial=numbers.start, total=total, unit="update")
