"""Exact toy policies: a free row of parameters for every prefix.

A *prefix table* holds one row for each prompt and each sequence of tokens that may follow it. The
first token of a row of `tokens` is the prompt's number, the rest walk the tree::

    tokens   [prompt, y_1, y_2]        row of prefix (), (y_1), (y_1, y_2)  predicts  y_1, y_2, y_3

They are `Policy` values like a real decoder's, so all that reads a policy works on them, with
padding on either side and any layout: with `attend` the prefix of a position is what it attends
to, in order. A position whose prefix is empty reads zeros. One whose prefix is longer than the
table, or holds an id that the table does not know, reads NaN, so that no other row's numbers pass
for its own; padding that nothing attends to is harmless. Positions are not read.
`jaxpref.models.enumeration` sums over all responses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from jaxpref.models.bounds import Bounds
from jaxpref.models.decoder import Policy

MAX_ROWS = 200_000  # of a prefix table, over all prompts
MAX_IDENTITY = 4_096  # tokens of a table of logits, whose unembedding is an identity matrix


def softmax(logits: Float[Array, "prompts vocab"]) -> tuple[Policy, PyTree]:
    r"""Single-token policies that share nothing: one free logit for each prompt and answer.

    .. math:: \pi(z|x) = \mathrm{softmax}(\theta_x)_z

    The null model of likelihood displacement: under a loss of one pair's margin the chosen answer
    never falls. The policy's unembedding is an identity of ``[vocab vocab]``; for a real
    vocabulary take ``jax.nn.log_softmax(logits)``, which is the same policy.

    Args:
        logits: The initial ``theta``.

    Returns:
        ``(policy, params)``, ``params["logits"]`` of ``[prompts 1 vocab]``.

    Raises:
        ValueError: an empty axis, more than `MAX_IDENTITY` tokens or `MAX_ROWS` prompts.

    >>> policy, params = softmax(jnp.log(jnp.array([[0.2, 0.8]])))
    >>> hidden = policy.hidden(params, jnp.array([[0]]))
    >>> jax.nn.softmax(hidden @ policy.unembedding(params).T).round(3).tolist()
    [[[0.2, 0.8]]]

    Source: the tabular setting of every "no shared parameters" argument, for example
    Ren & Sutherland (2025), section 3, https://arxiv.org/abs/2407.10490
    """
    prompts, vocab = logits.shape
    _check_table(prompts=prompts, vocab=vocab, width=vocab, length=1)
    return _table_policy(vocab, 1), {"logits": logits[:, None, :]}


def language_model(
    key: Array,
    *,
    vocab: int,
    length: int,
    prompts: int = 1,
    scale: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Policy, PyTree]:
    r"""Every distribution over sequences: free logits for each prefix.

    .. math:: \pi(y|x) = \prod_k \mathrm{softmax}(\theta_{x, y_{<k}})_{y_k}

    Args:
        key: Random key of the initial logits.
        vocab: Number of tokens.
        length: Longest response in tokens.
        prompts: Number of prompts, the ids that a first token may have.
        scale: Standard deviation of the initial logits.
        dtype: Of the logits.

    Returns:
        ``(policy, params)``, ``params["logits"]`` of ``[prompts rows vocab]`` with
        ``rows = 1 + vocab + .. + vocab**(length - 1)``, shorter prefixes first.

    Raises:
        ValueError: a size below one, more than `MAX_IDENTITY` tokens or `MAX_ROWS` rows.

    Source: the chain rule of probability.
    """
    rows = _check_table(prompts=prompts, vocab=vocab, width=vocab, length=length)
    logits = scale * jax.random.normal(key, (prompts, rows, vocab), dtype)
    return _table_policy(vocab, length), {"logits": logits}


def unconstrained_features(
    key: Array,
    *,
    vocab: int,
    width: int,
    length: int = 1,
    prompts: int = 1,
    scale: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Policy, PyTree]:
    r"""The unconstrained features model: an unembedding and one free hidden state per prefix.

    .. math:: \pi(y|x) = \prod_k \mathrm{softmax}(W h_{x, y_{<k}})_{y_k}

    All coupling between tokens goes through ``W`` and between prefixes through ``W`` alone: the
    setting in which the displacement theorems are exact.

    Args:
        key: Random key of the initial values.
        vocab: Number of tokens.
        width: Of the hidden states.
        length: Longest response in tokens.
        prompts: Number of prompts.
        scale: Standard deviation of all initial entries.
        dtype: Of the parameters.

    Returns:
        ``(policy, params)``: ``params["unembedding"]`` of ``[vocab width]`` and
        ``params["hidden"]`` of ``[prompts rows width]``, rows as in `language_model`.

    Raises:
        ValueError: a size below one, or a table of more than `MAX_ROWS` rows.

    References:
        Razin et al. (2024), section 4, https://arxiv.org/abs/2410.08847
    """
    rows = _check_table(prompts=prompts, vocab=vocab, width=width, length=length)
    for_unembedding, for_hidden = jax.random.split(key)
    params = {
        "unembedding": scale * jax.random.normal(for_unembedding, (vocab, width), dtype),
        "hidden": scale * jax.random.normal(for_hidden, (prompts, rows, width), dtype),
    }

    def hidden(params, tokens, positions=None, attend=None):
        table = jnp.asarray(params["hidden"])
        prefix = _prefixes(tokens, attend, prompts=len(table), vocab=vocab, length=length)
        return _look_up(table, prefix)

    bounds = Bounds(longest=length)
    policy = Policy(hidden, lambda params: jnp.asarray(params["unembedding"]), bounds=bounds)
    return policy, params


class _Prefixes(NamedTuple):
    """Where in a table each position looks."""

    prompt: Int[Array, "batch time"]
    row: Int[Array, "batch time"]
    empty: Bool[Array, "batch time"]  # attends to nothing
    outside: Bool[Array, "batch time"]  # past the table's end, or of unknown ids


def _table_policy(vocab: int, length: int) -> Policy:
    if vocab > MAX_IDENTITY:
        raise ValueError(f"vocab: got {vocab}, expected at most {MAX_IDENTITY} for free logits")

    def hidden(params, tokens, positions=None, attend=None):
        table = jnp.asarray(params["logits"])
        prefix = _prefixes(tokens, attend, prompts=len(table), vocab=vocab, length=length)
        return _look_up(table, prefix)

    def unembedding(params):
        return jnp.eye(vocab, dtype=params["logits"].dtype)

    return Policy(hidden, unembedding, bounds=Bounds(longest=length))


def _prefixes(
    tokens: Int[Array, "batch time"],
    attend: Bool[Array, "batch time time"] | None,
    *,
    prompts: int,
    vocab: int,
    length: int,
) -> _Prefixes:
    batch, time = tokens.shape
    if attend is None:
        attend = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (batch, time, time))
    upto = jnp.cumsum(attend, axis=-1, dtype=tokens.dtype)
    count = upto[..., -1]
    after = count[..., None] - upto
    # The prefix read as a number in base `vocab`, its last token the ones.
    places = jnp.array([vocab**k for k in range(length)], tokens.dtype)
    keys = jnp.broadcast_to(tokens[:, None, :], attend.shape)
    digits = keys * places[jnp.clip(after, 0, length - 1)]
    row = jnp.where(attend & (upto > 1), digits, 0).sum(axis=-1, dtype=tokens.dtype)
    prompt = jnp.where(attend & (upto == 1), keys, 0).sum(axis=-1, dtype=tokens.dtype)
    shorter = jnp.cumsum(places, dtype=tokens.dtype) - places  # rows of all shorter prefixes
    known = (keys >= 0) & (keys < jnp.where(upto == 1, prompts, vocab))
    outside = (count > length) | (attend & ~known).any(axis=-1)
    row = row + shorter[jnp.clip(count - 1, 0, length - 1)]
    return _Prefixes(prompt, row, count == 0, outside)


def _look_up(table: Array, prefix: _Prefixes) -> Array:
    found = table[prefix.prompt, prefix.row]
    found = jnp.where(prefix.empty[..., None], jnp.zeros_like(found), found)
    return jnp.where(prefix.outside[..., None], jnp.nan, found)


def _check_table(**sizes: int) -> int:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    rows = sum(sizes["vocab"] ** depth for depth in range(sizes["length"]))
    if rows * sizes["prompts"] > MAX_ROWS:
        raise ValueError(
            f"length: got {sizes['length']} with vocab {sizes['vocab']} and prompts "
            f"{sizes['prompts']}, a table of {rows * sizes['prompts']} rows, expected at most "
            f"{MAX_ROWS}"
        )
    return rows
