"""Log-probabilities under the reference model: data, computed once and kept on disk."""

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, PyTree

from jaxpref.data.batches import Batch
from jaxpref.logprobs.responses import Scores


class ReferenceCacheError(ValueError):
    """A file of reference log-probabilities that cannot be trusted."""


def reference_logprobs(
    score: Callable[[PyTree, Batch], Scores],
    params: PyTree,
    batches: Sequence[Batch],
    *,
    cache: Path | None = None,
) -> Float[np.ndarray, "rows 2"]:
    """Log-probabilities of a whole data set under frozen parameters, by the policy's own scorer.

    `score` is the function that training scores with, so policy and reference go through the same
    program: at equal parameters and on the same batch, log-ratios are exactly zero.

    On disk a result is named by what decides its bits: the arrays, the parameters, the program
    that XLA gets (model, options, dtypes, shapes), and versions and device. Another value of any of
    them is another file. A file appears whole or not at all.

    Args:
        score: ``(params, batch) -> Scores``. It is jitted here.
        params: The reference parameters; leaves of this process.
        batches: The data set, each row once, in any order, of any padded lengths.
        cache: Folder of the files, made if absent; ``None``: compute always, keep nothing.

    Returns:
        Nats; row ``r`` belongs to ``batch.index == r``. `jaxpref.data.batches.collate` takes it
        whole; for a batch at hand, ``batch._replace(reference=result[batch.index])``.

    Raises:
        ValueError: Rows are missing or come twice, or a response has no finite log-probability
            (see `response_scores`); the row is named, and nothing is kept.
        ReferenceCacheError: The file for this key is damaged or holds another key. It is refused,
            not overwritten: damage to a file written whole says something about the disk.
        OSError: The file cannot be written; no part of it stays.

    >>> from jaxpref.logprobs.responses import pair_scores
    >>> from jaxpref.models import tabular
    >>> policy, params = tabular.softmax(jax.numpy.log(jax.numpy.array([[0.2, 0.8]])))
    >>> tokens = np.array([[[0, 1], [0, 0]]])
    >>> batch = Batch(tokens, tokens >= 0, np.array([[[False, True]] * 2]), None, np.array([0]))
    >>> score = lambda params, batch: pair_scores(policy, params, *batch[:3])
    >>> np.exp(reference_logprobs(score, params, [batch])).round(3).tolist()
    [[0.8, 0.2]]

    Source: the definition.
    """
    batches = [batch._replace(reference=None) for batch in batches]
    rows = _count_rows(batches)
    jitted = jax.jit(score)
    if cache is None:
        return _compute(jitted, params, batches, rows)
    key = _key(jitted, params, batches)
    path = Path(cache) / f"reference-{fingerprint(key)[:24]}.npz"
    if path.exists():
        return _read(path, key, rows)
    logp = _compute(jitted, params, batches, rows)
    _write(path, key, logp)
    return logp


def fingerprint(tree: PyTree) -> str:
    """SHA-256 of a pytree: the path, dtype, shape and bytes of every leaf.

    Args:
        tree: Leaves are arrays, numbers or strings.

    Returns:
        64 hexadecimal digits, the same on every machine of one byte order.

    >>> fingerprint({"a": np.zeros(2)}) == fingerprint({"a": np.zeros(2)})
    True
    >>> fingerprint({"a": np.zeros(2)}) == fingerprint({"b": np.zeros(2)})
    False

    Source: the definition.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _count_rows(batches: Sequence[Batch]) -> int:
    index = np.concatenate([np.asarray(batch.index) for batch in batches])
    row, times = np.unique(index, return_counts=True)
    if (times > 1).any():
        repeated = int(row[times > 1][0])
        raise ValueError(f"batches: row {repeated} comes {times.max()} times, expected once")
    if not np.array_equal(row, np.arange(row.size)):
        missing = int(np.setdiff1d(np.arange(row.max() + 1), row)[0])
        raise ValueError(f"batches: row {missing} is missing, expected all rows up to {row.max()}")
    return row.size


def _compute(
    jitted: Callable[[PyTree, Batch], Scores], params: PyTree, batches: Sequence[Batch], rows: int
) -> np.ndarray:
    parts = [np.asarray(jitted(params, batch).logp) for batch in batches]
    logp = np.empty((rows, 2), parts[0].dtype)
    for batch, part in zip(batches, parts, strict=True):
        logp[np.asarray(batch.index)] = part
    bad = np.argwhere(~np.isfinite(logp))
    if bad.size:
        row, side = bad[0]
        raise ValueError(
            f"batches: row {row}, {('chosen', 'rejected')[side]}: log-probability is "
            f"{logp[row, side]}, expected a finite number (a scored token needs a token before it, "
            "room in max_response and packed_time, and a model that knows its ids and positions)"
        )
    return logp


def _key(jitted: Callable, params: PyTree, batches: Sequence[Batch]) -> dict[str, str]:
    by_shape = {batch.tokens.shape: batch for batch in batches}
    programs = [jitted.lower(params, by_shape[shape]).as_text() for shape in sorted(by_shape)]
    device = jax.devices()[0]
    return {
        "data": fingerprint([tuple(batch) for batch in batches]),
        "parameters": fingerprint(params),
        "program": fingerprint(programs),
        "platform": f"jax {version('jax')}, jaxlib {version('jaxlib')}, {device.device_kind}",
    }


def _read(path: Path, key: dict[str, str], rows: int) -> np.ndarray:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found, logp = json.loads(str(file["key"])), file["logp"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        message = f"{path}: damaged ({error}); delete it to compute the reference again"
        raise ReferenceCacheError(message) from error
    wrong = [name for name in key if found.get(name) != key[name]]
    if wrong or logp.shape != (rows, 2):
        what = ", ".join(wrong) or f"an array of {logp.shape}"
        raise ReferenceCacheError(
            f"{path}: holds other {what} than its name says, expected those of this run; "
            "delete it to compute the reference again"
        )
    return logp


def _write(path: Path, key: dict[str, str], logp: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, logp=logp, key=np.array(json.dumps(key)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
