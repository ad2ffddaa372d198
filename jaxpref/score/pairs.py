"""Every score of every pair of a data set, one forward pass a pair."""

import functools
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from jaxpref import embeddings, gradients, logprobs
from jaxpref.data import batches
from jaxpref.data.files import DataError
from jaxpref.data.pairs import TokenPair, sha256
from jaxpref.models import bounds
from jaxpref.models.decoder import Policy
from jaxpref.training import parallel

Score = Literal[
    "ches", "ches_length_normalised", "last_hidden_similarity", "alpha_weighted_ches",
    "displacement_rate", "edit_similarity", "length_difference", "length_ratio",
]  # fmt: skip
COLUMNS: tuple[Score, ...] = get_args(Score)
"""All scores. Beyond `DEFAULT`: ``alpha_weighted_ches`` reads the unembedding as well, and
``displacement_rate`` costs a backward pass and a Jacobian-vector product a pair."""
STATES: dict[Score, Callable[[Any, Any], Any]] = {
    "ches": embeddings.ches,
    "ches_length_normalised": embeddings.ches_length_normalised,
    "last_hidden_similarity": embeddings.last_hidden_similarity,
}
TEXT: tuple[Score, ...] = ("edit_similarity", "length_difference", "length_ratio")
DEFAULT: tuple[Score, ...] = (*STATES, *TEXT)
"""What hidden states and token ids say."""


def score_pairs(
    policy: Policy,
    params: PyTree,
    pairs: Sequence[TokenPair],
    *,
    columns: Collection[str] = DEFAULT,
    places: Sequence[str] | None = None,
    tokens: int = 2048,
    mesh: jax.sharding.Mesh | None = None,
    folder: str | os.PathLike | None = None,
    made_with: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    r"""Scores of each pair, larger where the chosen response is expected to fall.

    The prompt is encoded once for both responses, and no logits are computed but for
    ``alpha_weighted_ches`` and ``displacement_rate``. Pairs of similar length share a batch; a
    program is compiled for each of a few lengths. With a progress bar of pairs.

    ``displacement_rate`` is how fast the chosen log-probability falls under gradient flow on all
    parameters with pulls of one:

    .. math:: \langle \nabla \log \pi_w, \nabla \log \pi_l \rangle - \|\nabla \log \pi_w\|^2

    Args:
        policy: The model; its `hidden` must honour `positions` and `attend`.
        params: Its parameters.
        pairs: From `jaxpref.data.pairs.encode`; CHES wants them with their end token. Edit
            similarity and lengths leave out what closes them, `ends`.
        columns: Names of `COLUMNS`.
        places: Where each pair stands, for errors.
        tokens: Of a batch, padding included: more is faster up to what fits the memory.
        mesh: Of `jaxpref.training.parallel.mesh`: the pairs of a batch are spread over it, the
            parameters lie there by the rules.
        folder: Where finished batches are kept. The same call finds them there, so that a run
            that was killed goes on; another data set, model or setting is refused.
        made_with: Further settings that decided `pairs`, for the folder; JSON's types.

    Returns:
        An array of ``[pairs]`` for each of the columns, and ``chosen_tokens``,
        ``rejected_tokens`` (without end tokens) and ``identical``. Identical responses score 0.

    Raises:
        ValueError: An unknown column, `tokens` below 1, or no pair.
        DataError: A pair that the model cannot read (an id outside its table, more positions than
            it knows) or whose hidden states are not finite, by its row; a `folder` of another run.

    References:
        Razin et al. (2024), https://arxiv.org/abs/2410.08847
    """
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ValueError(f"columns: got {unknown[0]!r}, expected some of {', '.join(COLUMNS)}")
    if tokens < 1 or not pairs:
        raise ValueError(f"got tokens={tokens} and {len(pairs)} pairs, expected at least 1")
    named = [f"{place}: {side}" for place in places or map("row {}".format, range(len(pairs)))
             for side in ("chosen", "rejected")]  # fmt: skip
    bounds.check(policy.bounds, (ids for pair in pairs for ids in pair.tokens), named)
    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    plan = list(_plan([logprobs.packed_length(pair) for pair in pairs], tokens, devices))
    if folder is not None:
        key = {"data": sha256(pairs), "parameters": logprobs.fingerprint(params)}
        _claim(
            Path(folder),
            {**key, "columns": sorted(columns), "tokens": tokens, **(made_with or {})},
        )
    compute = functools.partial(_scores, policy, tuple(sorted(columns)), mesh)
    params = params if mesh is None else parallel.put(params, parallel.shardings(params, mesh))
    found = _text_scores(pairs, columns)
    found |= {name: np.empty(len(pairs)) for name in columns if name not in TEXT}
    with tqdm(total=len(pairs), desc="scores", unit="pair") as bar:
        for part in plan:
            file = Path(folder) / f"{part.rows[0]}.npz" if folder is not None else None
            scores = _kept(file, functools.partial(_batch_scores, compute, params, pairs, part))
            _check(scores, part.rows, places)
            for name, values in scores.items():
                found[name][part.rows] = values
            bar.update(len(part.rows))
    return found


class _Part(NamedTuple):
    """A batch: which pairs, in rows of how many tokens, and how many rows its program has."""

    rows: np.ndarray
    length: int
    size: int


def _plan(lengths: Sequence[int], tokens: int, devices: int) -> Iterator[_Part]:
    """Batches of pairs of similar length, the longest first."""
    order = np.argsort(lengths, kind="stable")[::-1]
    while order.size:
        length = _rounded(lengths[order[0]])
        size = devices * max(1, tokens // (length * devices))
        rows, order = order[:size], order[size:]
        yield _Part(rows, length, min(size, -(-len(rows) // devices) * devices))


def _rounded(length: int) -> int:
    """Up to a multiple of an eighth of the power of two above it, at least of 16."""
    step = max(16, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _scores(policy: Policy, columns: tuple[str, ...], mesh: Any, length: int, params: PyTree,
            batch: Any) -> dict[str, jax.Array]:  # fmt: skip
    batch = batch if mesh is None else parallel.shard(batch, mesh)
    found = logprobs.shared_prompt_hidden(policy, params, *batch, packed_time=length)
    scores = {n: STATES[n](found.hidden, found.is_target) for n in columns if n in STATES}
    if "alpha_weighted_ches" in columns:
        gram = embeddings.unembedding_gram(
            found.hidden, found.targets, found.is_target, policy.unembedding(params)
        )
        scores["alpha_weighted_ches"] = embeddings.alpha_weighted_ches(gram)
    if "displacement_rate" in columns:
        scores["displacement_rate"] = jax.lax.map(
            functools.partial(_rate, policy, length, params), batch
        )
    return scores


def _rate(policy: Policy, length: int, params: PyTree, pair: Any) -> jax.Array:
    def logp(params):
        one = (x[None] for x in pair)
        return logprobs.shared_prompt_scores(policy, params, *one, packed_time=length).logp[0]

    _, rates = gradients.flow_rates(logp, lambda logp: logp[1] - logp[0], params)
    return -rates[0]


def _batch_scores(compute, params, pairs, part: _Part) -> dict[str, np.ndarray]:
    rows = np.resize(part.rows, part.size)  # of the last batch each device gets as many
    batch = batches.collate(pairs, rows, pad_id=0, buckets=[part.length + 1])[:3]
    scores = compute(part.length, params, batch)
    return {name: x[: len(part.rows)] for name, x in parallel.to_host(scores).items()}


def _text_scores(pairs, columns: Collection[str]) -> dict[str, np.ndarray]:
    answers = [
        [
            ids[start : len(ids) - end]
            for ids, start, end in zip(pair.tokens, pair.starts, pair.ends, strict=True)
        ]
        for pair in pairs
    ]
    lengths = np.array([[len(ids) for ids in pair] for pair in answers])
    found = {
        "chosen_tokens": lengths[:, 0],
        "rejected_tokens": lengths[:, 1],
        "identical": np.array([np.array_equal(*pair.tokens) for pair in pairs]),
    }
    if "edit_similarity" in columns:
        found["edit_similarity"] = np.array([embeddings.edit_similarity(*x) for x in answers])
    if "length_difference" in columns:
        found["length_difference"] = np.asarray(embeddings.length_difference(lengths))
    if "length_ratio" in columns:
        found["length_ratio"] = np.asarray(embeddings.length_ratio(lengths))
    return found


def _check(scores: dict[str, np.ndarray], rows: np.ndarray, places: Sequence[str] | None) -> None:
    for name, values in scores.items():
        bad = rows[~np.isfinite(values)]
        if bad.size:
            place = places[bad[0]] if places else f"row {bad[0]}"
            raise DataError(f"{place}: {name} is not finite, expected finite hidden states")


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """The folder belongs to this run, or is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "key.json"
    if not parallel.agreed(file.exists):
        _write(file, json.dumps(key).encode())
        return
    try:
        known = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise DataError(f"{file}: damaged; delete {folder} to begin again") from None
    other = [name for name in key if known.get(name) != key[name]]
    if other:
        raise DataError(
            f"{folder}: holds scores of other {', '.join(other)}; expected another folder"
        )


def _kept(file: Path | None, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if file is None:
        return make()
    if not parallel.agreed(file.exists):
        content, made = io.BytesIO(), make()
        np.savez(content, allow_pickle=False, **made)
        _write(file, content.getvalue())
        return made
    try:
        with file.open("rb") as stream, np.load(stream) as kept:
            return dict(kept)
    except Exception as error:  # of numpy and zipfile, which raise what they meet
        raise DataError(f"{file}: damaged ({error}); delete it to score it again") from None


def _write(file: Path, content: bytes) -> None:
    if jax.process_index():
        return
    temporary = file.with_suffix(".part")
    temporary.write_bytes(content)
    os.replace(temporary, file)
