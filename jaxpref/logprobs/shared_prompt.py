"""Pairs in one row, what both sequences begin with encoded once."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from jaxpref.data.pairs import TokenPair
from jaxpref.logprobs.chunked import require_positive, token_logprobs_chunked
from jaxpref.logprobs.responses import (
    AnyArray,
    Head,
    Responses,
    Scores,
    find_targets,
    gather,
    read_out,
    right_padded,
    summed,
)
from jaxpref.models.decoder import Policy


def shared_prompt_scores(
    policy: Policy,
    params: PyTree,
    tokens: Int[AnyArray, "pairs 2 time"],
    is_token: Bool[AnyArray, "pairs 2 time"],
    is_response: Bool[AnyArray, "pairs 2 time"],
    *,
    packed_time: int,
    max_response: int | None = None,
    head: Head = token_logprobs_chunked,
) -> Scores:
    """`pair_scores` that encodes what both sequences begin with once: the same numbers, faster.

    Each pair becomes one row, ``common | rest of chosen | rest of rejected``, in which the rest of
    the rejected sequence sees the common part and itself only. The common part is all that the two
    sequences share from their first token on, so prompts that differ are scored rightly too, with
    less gain. A sequence's last token predicts nothing and is left out.

    Args:
        policy: The model; its `hidden` must honour `positions` and `attend`.
        params: Its parameters.
        tokens: Prompt and response.
        is_token: False on padding, which may be on either side.
        is_response: True on scored tokens.
        packed_time: Length of the rows: static, at least the largest of `packed_lengths`.
        max_response: Most scored tokens of one response; ``None``: `time`.
        head: As in `response_scores`.

    Returns:
        `Scores` of ``[pairs 2]``. A pair that needs more than `packed_time` is refused whole: NaN.

    Raises:
        ValueError: `packed_time` or `max_response` is not positive.

    >>> from jaxpref.models import tabular
    >>> policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.8]])))
    >>> tokens, real = jnp.array([[[0, 1], [0, 0]]]), jnp.array([[[True, True]] * 2])
    >>> scored = jnp.array([[[False, True]] * 2])
    >>> need = int(jax.jit(packed_lengths)(tokens, real).max())  # the prompt's one token
    >>> fast = jax.jit(shared_prompt_scores, static_argnums=0, static_argnames="packed_time")
    >>> scores = fast(policy, params, tokens, real, scored, packed_time=need)
    >>> need, jnp.exp(scores.logp).round(3).tolist()
    (1, [[0.8, 0.2]])

    Source: the definition of causal attention.
    """
    responses = shared_prompt_hidden(
        policy,
        params,
        tokens,
        is_token,
        is_response,
        packed_time=packed_time,
        max_response=max_response,
    )
    return summed(responses, read_out(policy, params, responses, head))


def shared_prompt_hidden(
    policy: Policy,
    params: PyTree,
    tokens: Int[AnyArray, "pairs 2 time"],
    is_token: Bool[AnyArray, "pairs 2 time"],
    is_response: Bool[AnyArray, "pairs 2 time"],
    *,
    packed_time: int,
    max_response: int | None = None,
) -> Responses:
    """`response_hidden` of pairs in the layout of `shared_prompt_scores`.

    Args:
        policy: The model; its `hidden` must honour `positions` and `attend`.
        params: Its parameters.
        tokens: As in `shared_prompt_scores`, like the rest.
        is_token: False on padding.
        is_response: True on scored tokens.
        packed_time: Length of the packed rows.
        max_response: Most scored tokens of one response; ``None``: `time`.

    Returns:
        `Responses` with leading axes ``[pairs 2]``.

    Raises:
        ValueError: `packed_time` or `max_response` is not positive.

    Source: the definition of causal attention.
    """
    require_positive(packed_time=packed_time)
    tokens, is_token, is_response = right_padded(tokens, is_token, is_response)
    columns, found = find_targets(tokens, is_token, is_response, max_response)
    common, encoded = _common(tokens, is_token)

    def one_pair(
        tokens: Int[Array, "2 time"], common: Int[Array, ""], encoded: Int[Array, "2"]
    ) -> tuple[Array, Array, Array]:
        slot = jnp.arange(packed_time, dtype=jnp.int32)
        rejected = slot >= encoded[0]
        column = jnp.where(rejected, slot - encoded[0] + common, slot)
        column = jnp.minimum(column, tokens.shape[-1] - 1)  # room left over: a known position
        packed = jnp.where(rejected, tokens[1, column], tokens[0, column])
        visible = ~rejected[:, None] | (slot < common)[None] | rejected[None]
        return packed, column, visible & (slot[None] <= slot[:, None])

    hidden = policy.hidden(params, *jax.vmap(one_pair)(tokens, common, encoded))
    before = jnp.maximum(columns - 1, 0)
    moved = before - common[:, None, None] + encoded[:, :1, None]
    own = jnp.array([False, True])[None, :, None] & (before >= common[:, None, None])
    place = jnp.minimum(jnp.where(own, moved, before), packed_time - 1)
    fits = encoded.sum(axis=-1, dtype=jnp.int32) - common <= packed_time
    return Responses(
        gather(hidden, place),
        *found._replace(refused=found.refused | ~fits[:, None]),
    )


def packed_lengths(
    tokens: Int[AnyArray, "pairs 2 time"], is_token: Bool[AnyArray, "pairs 2 time"]
) -> Int[Array, " pairs"]:
    """Tokens that each pair needs in one row of `shared_prompt_scores`.

    Args:
        tokens: Prompt and response.
        is_token: False on padding.

    Returns:
        Both sequences without their last tokens, the common beginning counted once. Round the
        largest up to one of a few sizes: each size compiles once.

    >>> tokens = jnp.array([[[7, 8, 1, 0], [7, 8, 2, 3]]])
    >>> packed_lengths(tokens, tokens > 0)  # 7 8 | nothing | 2
    Array([3], dtype=int32)

    Source: the definition.
    """
    tokens, is_token, _ = right_padded(tokens, is_token, is_token)
    common, encoded = _common(tokens, is_token)
    return encoded.sum(axis=-1, dtype=jnp.int32) - common


def packed_length(pair: TokenPair) -> int:
    """`packed_lengths` of one pair that is no padded array yet.

    Args:
        pair: Token ids.

    Returns:
        A number of tokens.

    >>> ids = np.array([7, 8, 1]), np.array([7, 8, 2, 3])
    >>> packed_length(TokenPair(ids, (2, 2), (False, False)))
    3

    Source: the definition.
    """
    first, second = (ids[:-1] for ids in pair.tokens)
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return len(first) + len(second) - int(differ[0] if differ.size else shorter)


def _common(tokens: Array, is_token: Array) -> tuple[Array, Array]:
    """Length of each pair's common beginning, and of its two sequences without the last token."""
    encoded = jnp.maximum(is_token.sum(axis=-1, dtype=jnp.int32) - 1, 0)
    inside = jnp.arange(tokens.shape[-1], dtype=jnp.int32)[None] < encoded.min(axis=-1)[:, None]
    same = inside & (tokens[:, 0] == tokens[:, 1])
    return jnp.cumprod(same.astype(jnp.int32), axis=-1).sum(axis=-1, dtype=jnp.int32), encoded
