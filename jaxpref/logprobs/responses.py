"""Log-probabilities of whole responses and pairs. The only place that reads masks.

A token is predicted by the hidden state of the real token before it. So a scored token with no
token before it, like a mask or a buffer that does not fit, has no number: its response's ``logp``
is NaN, under ``jit`` too, never a sum with something left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpref.logprobs.chunked import require_positive, token_logprobs_chunked
from jaxpref.models.decoder import Policy


class Responses(NamedTuple):
    """The hidden states that predict scored tokens, gathered: ``response`` = `max_response`.

    Attributes:
        hidden: One for each scored token, in order of time; unused room holds other states.
        targets: The scored tokens, 0 in unused room.
        is_target: False in unused room.
        lengths: Number of scored tokens.
        refused: Responses that have no log-probability (see `response_scores`).
    """

    hidden: Float[Array, "*batch response width"]
    targets: Int[Array, "*batch response"]
    is_target: Bool[Array, "*batch response"]
    lengths: Int[Array, "*batch"]
    refused: Bool[Array, "*batch"]


class Scores(NamedTuple):
    """What losses read.

    Attributes:
        logp: Sum over scored tokens, nats.
        lengths: Number of scored tokens, in the dtype of `logp`.
    """

    logp: Float[Array, "*batch"]
    lengths: Float[Array, "*batch"]


AnyArray = Array | np.ndarray
Head = Callable[..., Array]  # token_logprobs and its relatives


def pair_scores(
    policy: Policy,
    params: PyTree,
    tokens: Int[AnyArray, "pairs 2 time"],
    is_token: Bool[AnyArray, "pairs 2 time"],
    is_response: Bool[AnyArray, "pairs 2 time"],
    *,
    max_response: int | None = None,
    head: Head = token_logprobs_chunked,
) -> Scores:
    """`response_scores` of pairs, chosen first: ``logp`` and ``lengths`` are ``[pairs 2]``.

    Args:
        policy: The model.
        params: Its parameters.
        tokens: Prompt and response.
        is_token: False on padding, which may be on either side.
        is_response: True on scored tokens.
        max_response: Most scored tokens of one response; ``None``: `time`.
        head: As in `response_scores`.

    Returns:
        `Scores`; see `response_scores` for empty and refused responses.

    >>> from jaxpref.models import tabular
    >>> policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.8]])))
    >>> tokens = np.array([[[0, 1], [0, 0]]])  # prompt 0; answers 1 and 0
    >>> fast, scored = jax.jit(pair_scores, static_argnums=0), np.array([[[False, True]] * 2])
    >>> np.exp(fast(policy, params, tokens, tokens >= 0, scored).logp).round(3).tolist()
    [[0.8, 0.2]]

    Source: the definition.
    """
    return response_scores(
        policy, params, tokens, is_token, is_response, max_response=max_response, head=head
    )


def response_scores(
    policy: Policy,
    params: PyTree,
    tokens: Int[AnyArray, "*batch time"],
    is_token: Bool[AnyArray, "*batch time"],
    is_response: Bool[AnyArray, "*batch time"],
    *,
    max_response: int | None = None,
    head: Head = token_logprobs_chunked,
) -> Scores:
    r"""Summed log-probability of each response given what stands before it, and its length.

    .. math:: \log \pi(y|x) = \sum_{t \in y} \log \pi(y_t \mid x, y_{<t})

    Only positions that predict a scored token meet the unembedding: `max_response` of them a
    sequence. Padding is moved to the right first, so its side changes no bit of the result.

    Args:
        policy: The model.
        params: Its parameters.
        tokens: Any leading axes, ``[examples time]`` for unpaired data.
        is_token: False on padding, which may be anywhere and is removed.
        is_response: True on scored tokens; they need not be next to one another.
        max_response: Most scored tokens of one response: static, the smaller the faster; ``None``:
            `time`.
        head: ``(hidden, unembedding, targets) -> log-probabilities``: `token_logprobs_chunked`,
            the same with other chunks by ``functools.partial``, or `token_logprobs`, which allows
            ``jax.jvp``. For a model that caps its logits it also takes ``cap``.

    Returns:
        `Scores` of ``[*batch]``. An empty response has logp 0, length 0 and no gradient. A
        response is refused, with logp NaN, when it scores its sequence's first token or padding,
        or has more than `max_response` scored tokens.

    Raises:
        ValueError: `max_response` is not positive.

    >>> from jaxpref.models import tabular
    >>> policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.8]])))
    >>> tokens, real = np.array([[0, 1], [0, 1]]), np.full((2, 2), True)
    >>> scored = np.array([[False, True], [True, False]])  # the second scores its first token
    >>> fast = jax.jit(response_scores, static_argnums=0)
    >>> np.round(fast(policy, params, tokens, real, scored).logp, 1).tolist()
    [-0.2, nan]

    Source: the definition.
    """
    responses = response_hidden(
        policy, params, tokens, is_token, is_response, max_response=max_response
    )
    return summed(responses, read_out(policy, params, responses, head))


def response_hidden(
    policy: Policy,
    params: PyTree,
    tokens: Int[AnyArray, "*batch time"],
    is_token: Bool[AnyArray, "*batch time"],
    is_response: Bool[AnyArray, "*batch time"],
    *,
    max_response: int | None = None,
) -> Responses:
    """The hidden states that predict scored tokens: what per-token numbers are computed from.

    Args:
        policy: The model.
        params: Its parameters.
        tokens: As in `response_scores`, like the rest.
        is_token: False on padding.
        is_response: True on scored tokens.
        max_response: Most scored tokens of one response; ``None``: `time`.

    Returns:
        `Responses`, ready for `token_logprobs`, `token_statistics` and `token_kl`.

    Raises:
        ValueError: `max_response` is not positive.

    >>> from jaxpref.models import tabular
    >>> policy, params = tabular.softmax(jnp.log(jnp.array([[0.2, 0.8]])))
    >>> tokens, real = np.array([[0, 1]]), np.full((1, 2), True)
    >>> fast = jax.jit(response_hidden, static_argnums=0)
    >>> found = fast(policy, params, tokens, real, np.array([[False, True]]))
    >>> found.targets.tolist(), found.is_target.tolist()
    ([[1, 0]], [[True, False]])

    Source: the definition.
    """
    tokens, is_token, is_response = right_padded(tokens, is_token, is_response)
    columns, found = find_targets(tokens, is_token, is_response, max_response)
    hidden = policy.hidden(params, tokens.reshape(-1, tokens.shape[-1]))
    before = jnp.maximum(columns - 1, 0)
    gathered = gather(hidden, before.reshape(-1, before.shape[-1]))
    return Responses(gathered.reshape(*before.shape, -1), *found)


def right_padded(*arrays: AnyArray) -> tuple[Array, ...]:
    """Tokens, is_token and is_response with all padding moved behind the tokens."""
    order = jnp.argsort(jnp.logical_not(arrays[1]), axis=-1, stable=True)
    return tuple(jnp.take_along_axis(array, order, axis=-1) for array in arrays)


class Targets(NamedTuple):
    """`Responses` without their hidden states."""

    targets: Array
    is_target: Array
    lengths: Array
    refused: Array


def find_targets(
    tokens: Array, is_token: Array, is_response: Array, max_response: int | None
) -> tuple[Array, Targets]:
    """Columns of the scored tokens of right-padded sequences, first ones first, and the tokens.

    Padding may be what a model refuses with NaN, which would spoil gradients even where masked.
    """
    require_positive(max_response=max_response)
    columns = jnp.argsort(~is_response, axis=-1, stable=True)[..., :max_response].astype(jnp.int32)
    is_target = jnp.take_along_axis(is_response, columns, axis=-1)
    targets = jnp.where(is_target, jnp.take_along_axis(tokens, columns, axis=-1), 0)
    lengths = is_response.sum(axis=-1, dtype=jnp.int32)
    columns = jnp.where(is_target, columns, 0)  # unused room reads the text, never padding
    unpredicted = is_response[..., 0] | (is_response & ~is_token).any(axis=-1)
    refused = unpredicted | (lengths > columns.shape[-1])
    return columns, Targets(targets, is_target, lengths, refused)


def read_out(
    policy: Policy, params: PyTree, responses: Responses, head: Head
) -> Float[Array, "*batch response"]:
    """Log-probabilities of the targets; `head` is told of a cap where the model has one."""
    table, cap = policy.head(params)
    named = {} if cap is None else {"cap": cap}
    return head(responses.hidden, table, responses.targets, **named)


def gather(
    states: Float[Array, "batch time width"], places: Int[Array, "batch *places"]
) -> Float[Array, "batch *places width"]:
    """The states at some places of each row."""
    return jax.vmap(lambda row, at: row[at])(states, places)


def summed(responses: Responses, token_logp: Float[Array, "*batch response"]) -> Scores:
    """`Scores` from the log-probability of each target."""
    logp = jnp.where(responses.is_target, token_logp, 0).sum(axis=-1)
    logp = jnp.where(responses.refused, jnp.nan, logp)
    return Scores(logp, responses.lengths.astype(logp.dtype))
