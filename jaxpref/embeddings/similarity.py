"""Scores of a pair of responses from hidden states: how alike, before any training.

**The states of a response** are the final-norm hidden states that *predict* its tokens,
``h_{x,y_<k}`` for ``k = 1..|y|``: that of the prompt's last token first, that of the response's own
last token never. Where a response is scored with its end token (``end="eos"`` in
`jaxpref.data.pairs.encode`), ``|y|`` counts it and the last state has read the whole response: the
convention of the paper's results. `jaxpref.logprobs.Responses` are gathered in this way.

Arrays are ``[*pairs 2 response ...]``, chosen first; ``is_target`` is False in unused room, whose
states are never read, NaN or not. Sums run in float32 or wider at the highest matrix precision.
A larger score means more alike: a fall of the chosen response is expected.

Source: Razin et al. (2024), https://arxiv.org/abs/2410.08847
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.embeddings.geometry import AnyArray, wide

Lengths = Float[AnyArray, "*pairs 2"] | Int[AnyArray, "*pairs 2"]
PRECISION = jax.lax.Precision.HIGHEST


def ches(
    hidden: Float[AnyArray, "*pairs 2 response width"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
) -> Float[Array, "*pairs"]:
    r"""Centered hidden embedding similarity (CHES).

    .. math:: \langle S_w, S_l \rangle - \|S_w\|^2 = \langle S_w, S_l - S_w \rangle, \qquad
        S_y = \sum_{k=1}^{|y|} h_{x, y_{<k}}

    Computed in the second form, in which nearly equal numbers do not cancel. It grows with the
    responses' lengths: where all states point alike it is about ``|y_w| (|y_l| - |y_w|)``. Two
    responses of one token share their only state: 0, whatever the tokens.

    Args:
        hidden: Final-norm hidden states that predict the tokens.
        is_target: False in unused room.

    Returns:
        The score, in squared units of `hidden`; 0 for identical responses. Not symmetric.

    >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [3.0, 9.0]]])
    >>> is_target = jnp.array([[True, True], [True, False]])
    >>> float(ches(hidden, is_target))  # <(1, 2), (1, 0)> - 5
    -4.0

    References:
        Razin et al. (2024), Definition 2, https://arxiv.org/abs/2410.08847
    """
    return _centred(_sums(hidden, is_target))


def ches_length_normalised(
    hidden: Float[AnyArray, "*pairs 2 response width"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
) -> Float[Array, "*pairs"]:
    r"""CHES of mean states instead of sums.

    .. math:: \frac{\langle S_w, S_l \rangle}{|y_w| |y_l|} - \frac{\|S_w\|^2}{|y_w|^2}
        = \langle m_w, m_l - m_w \rangle, \qquad m_y = S_y / |y|

    Args:
        hidden: Final-norm hidden states that predict the tokens.
        is_target: False in unused room.

    Returns:
        The score, in squared units of `hidden`. NaN where a response is empty.

    >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [3.0, 9.0]]])
    >>> is_target = jnp.array([[True, True], [True, False]])
    >>> float(ches_length_normalised(hidden, is_target))  # <(1/2, 1), (1/2, -1)>
    -0.75

    References:
        Razin et al. (2024), Definition 3, https://arxiv.org/abs/2410.08847
    """
    sums = _sums(hidden, is_target)
    lengths = jnp.asarray(is_target).sum(axis=-1).astype(sums.dtype)
    return _centred(sums / lengths[..., None])


def ches_contributions(
    hidden: Float[AnyArray, "*pairs 2 response width"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
) -> Float[Array, "*pairs 2 response"]:
    r"""Which states make the score: `ches` is the sum of these numbers.

    .. math:: -\langle S_w, h_{x, y_{w,<k}} \rangle \quad\text{and}\quad
        \langle S_w, h_{x, y_{l,<k}} \rangle

    Args:
        hidden: Final-norm hidden states that predict the tokens.
        is_target: False in unused room.

    Returns:
        One number a state, 0 in unused room.

    >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [3.0, 9.0]]])
    >>> is_target = jnp.array([[True, True], [True, False]])
    >>> ches_contributions(hidden, is_target).tolist()
    [[-1.0, -4.0], [1.0, 0.0]]

    References:
        Razin et al. (2024), Definition 2, https://arxiv.org/abs/2410.08847
    """
    kept = _kept(hidden, is_target)
    chosen = _total(kept[..., 0, :, :], axis=-2)
    each = jnp.einsum("...jtd,...d->...jt", kept, chosen, precision=PRECISION)
    return each * jnp.array([[-1.0], [1.0]], each.dtype).reshape(*[1] * (each.ndim - 2), 2, 1)


def last_hidden_similarity(
    hidden: Float[AnyArray, "*pairs 2 response width"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
) -> Float[Array, "*pairs"]:
    r"""Inner product of the responses' last states.

    With end tokens among the targets these are the states after the last word, as in the paper.

    Args:
        hidden: Final-norm hidden states that predict the tokens.
        is_target: False in unused room.

    Returns:
        The inner product, in squared units of `hidden`. NaN where a response is empty.

    >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [3.0, 9.0]]])
    >>> is_target = jnp.array([[True, True], [True, False]])
    >>> float(last_hidden_similarity(hidden, is_target))  # <(0, 2), (3, 4)>
    8.0

    References:
        Razin et al. (2024), Section 5, https://arxiv.org/abs/2410.08847
    """
    kept, mask = _kept(hidden, is_target), jnp.asarray(is_target)
    is_last = mask & (jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] == 1)
    last = jnp.where(is_last[..., None], kept, jnp.zeros_like(kept)).sum(axis=-2)
    last = jnp.where(mask.any(axis=-1)[..., None], last, jnp.nan)
    return _inner(last[..., 0, :], last[..., 1, :])


def unembedding_gram(
    hidden: Float[AnyArray, "*pairs 2 response width"],
    targets: Int[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    unembedding: Float[AnyArray, "vocab width"],
    *,
    vocab_chunk: int = 4096,
) -> Float[Array, "*pairs 2 2"]:
    r"""Gram matrix of the log-probabilities' gradients for the unembedding, hidden states fixed.

    .. math:: \langle G_y, G_{y'} \rangle = \sum_{k,k'} \alpha_{kk'} \langle h_k, h'_{k'} \rangle,
        \qquad \alpha_{kk'} = \langle e_{y_k} - \pi_k, \; e_{y'_{k'}} - \pi'_{k'} \rangle

    Exact, from products between tokens: no gradient of the unembedding's size is held, and the
    logits of one chunk of the vocabulary at a time. Embeddings tied to the unembedding count as
    held fixed. One forward pass and ``(2 response)^2`` products over the vocabulary.

    Args:
        hidden: Final-norm hidden states that predict the tokens.
        targets: The tokens, any id in unused room.
        is_target: False in unused room.
        unembedding: One row a token of the vocabulary.
        vocab_chunk: Rows of it at a time.

    Returns:
        The Gram matrices, chosen first. ``-gram @ pull`` is the first-order change of both
        log-probabilities when the unembedding alone is trained.

    Raises:
        ValueError: `vocab_chunk` is not positive.

    >>> hidden, targets = jnp.array([[[3.0, 4.0]], [[3.0, 4.0]]]), jnp.array([[0], [1]])
    >>> table = jnp.zeros((2, 2))  # both tokens at 1/2: residuals (1/2, -1/2), (-1/2, 1/2)
    >>> unembedding_gram(hidden, targets, jnp.full((2, 1), True), table).tolist()
    [[12.5, -12.5], [-12.5, 12.5]]

    References:
        Razin et al. (2024), the coefficients of Theorem 6, https://arxiv.org/abs/2410.08847
    """
    if vocab_chunk < 1:
        raise ValueError(f"vocab_chunk: got {vocab_chunk}, expected at least 1")
    states, table = _kept(hidden, is_target), wide(unembedding)
    table = table.astype(jnp.promote_types(states.dtype, table.dtype))
    states, (*pairs, _, time) = states.astype(table.dtype), jnp.shape(targets)
    flat = states.reshape(*pairs, 2 * time, states.shape[-1])
    ids = jnp.where(jnp.asarray(is_target), jnp.asarray(targets), 0).reshape(*pairs, 2 * time)
    shift = _product(flat, table[ids])  # [token, token']: the logit of token' where token stood
    peaks, masses, inner = _softmax_products(flat, table, vocab_chunk)
    other = jnp.exp(shift - peaks[..., None]) / masses[..., None]
    inner = inner / (masses[..., :, None] * masses[..., None, :])
    same = (ids[..., :, None] == ids[..., None, :]).astype(inner.dtype)
    products = (same - other - other.swapaxes(-1, -2) + inner) * _product(flat, flat)
    return products.reshape(*pairs, 2, time, 2, time).sum(axis=(-3, -1))


def alpha_weighted_ches(gram: Float[AnyArray, "*pairs 2 2"]) -> Float[Array, "*pairs"]:
    r"""What CHES approximates by taking every coefficient for 1.

    .. math:: \langle G_w, G_l \rangle - \|G_w\|^2

    Its negative is the rate at which the chosen log-probability rises per unit of equal pulls
    when the unembedding alone is trained.

    Args:
        gram: From `unembedding_gram`; that of other parameters gives their part of the rate.

    Returns:
        The score; a positive one means a fall.

    >>> float(alpha_weighted_ches(jnp.array([[2.0, 3.0], [3.0, 9.0]])))
    1.0

    References:
        Razin et al. (2024), Theorem 6, https://arxiv.org/abs/2410.08847
    """
    gram = wide(gram)
    return gram[..., 0, 1] - gram[..., 0, 0]


def edit_similarity(
    chosen: Sequence[int] | Int[AnyArray, " time"],
    rejected: Sequence[int] | Int[AnyArray, " other_time"],
) -> float:
    r"""One minus the edit distance over the longer length: the share of tokens that may stay.

    .. math:: 1 - \mathrm{Levenshtein}(y_w, y_l) / \max(|y_w|, |y_l|)

    Args:
        chosen: Token ids of the response, without its end token.
        rejected: Token ids of the other.

    Returns:
        0 to 1; 1 for two empty responses. The paper's baseline is this minus one.

    Raises:
        ModuleNotFoundError: `rapidfuzz` is not installed.

    >>> edit_similarity([5, 6, 7, 8], [5, 7, 9])  # 6 left out, 8 replaced
    0.5

    References:
        Razin et al. (2024), Section 5, https://arxiv.org/abs/2410.08847
    """
    from rapidfuzz.distance import Levenshtein

    first, second = ([int(token) for token in tokens] for tokens in (chosen, rejected))
    return float(Levenshtein.normalized_similarity(first, second))


def length_difference(lengths: Lengths) -> Float[Array, "*pairs"] | Int[Array, "*pairs"]:
    """Length of the rejected response minus that of the chosen: what CHES mostly orders by.

    Args:
        lengths: Tokens of both responses, chosen first.

    Returns:
        Tokens.

    >>> length_difference(jnp.array([[2.0, 5.0]])).tolist()
    [3.0]

    Source: the definition.
    """
    lengths = jnp.asarray(lengths)
    return lengths[..., 1] - lengths[..., 0]


def length_ratio(lengths: Lengths) -> Float[Array, "*pairs"]:
    """Length of the rejected response over that of the chosen.

    Args:
        lengths: Tokens of both responses, chosen first.

    Returns:
        The ratio; infinite where the chosen response is empty.

    >>> length_ratio(jnp.array([[2.0, 5.0]])).tolist()
    [2.5]

    Source: the definition.
    """
    lengths = jnp.asarray(lengths)
    return lengths[..., 1] / lengths[..., 0]


def _softmax_products(states: Array, table: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Of the softmax over the table at each state: largest logit, mass, and all inner products.

    Mass and inner products ``[*batch time time]`` are those of ``exp(logit - largest)``, rescaled
    whenever a chunk has a larger one.
    """
    rows = min(chunk, len(table))
    chunks = jnp.pad(table, ((0, -len(table) % rows), (0, 0))).reshape(-1, rows, table.shape[1])
    starts = jnp.arange(len(chunks), dtype=jnp.int32) * rows

    def add(carry: tuple[Array, Array, Array], each: tuple[Array, Array]):
        (peaks, masses, inner), (part, start) = carry, each
        inside = start + jnp.arange(rows, dtype=jnp.int32) < len(table)
        logits = jnp.where(inside, _product(states, part), -jnp.inf)
        higher = jnp.maximum(peaks, logits.max(axis=-1))
        scale, weights = jnp.exp(peaks - higher), jnp.exp(logits - higher[..., None])
        masses = masses * scale + weights.sum(axis=-1)
        inner = inner * scale[..., :, None] * scale[..., None, :] + _product(weights, weights)
        return (higher, masses, inner), None

    shape = states.shape[:-1]
    start = (
        jnp.full(shape, -jnp.inf, states.dtype),
        jnp.zeros(shape, states.dtype),
        jnp.zeros((*shape, shape[-1]), states.dtype),
    )
    return jax.lax.scan(add, start, (chunks, starts))[0]


def _kept(hidden: AnyArray, is_target: AnyArray) -> Array:
    """The states in float32 or wider, zero in unused room."""
    hidden = wide(hidden)
    return jnp.where(jnp.asarray(is_target)[..., None], hidden, jnp.zeros_like(hidden))


def _sums(hidden: AnyArray, is_target: AnyArray) -> Array:
    return _total(_kept(hidden, is_target), axis=-2)


def _centred(x: Array) -> Array:
    chosen, rejected = x[..., 0, :], x[..., 1, :]
    return _inner(chosen, rejected - chosen)


def _inner(x: Array, y: Array) -> Array:
    return _total(x * y, axis=-1)


def _total(x: Array, axis: int) -> Array:
    """Sum of 64 at a time: one running float32 sum of 4,096 numbers loses the fifth digit."""
    x = jnp.moveaxis(x, axis, -1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 64)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // 64, 64).sum(axis=-1).sum(axis=-1)


def _product(x: Array, y: Array) -> Array:
    return jnp.einsum("...sd,...td->...st", x, y, precision=PRECISION)
