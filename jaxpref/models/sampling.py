"""Texts drawn from a policy, one token after the other.

Each token is encoded once: its keys and values stay in a cache of fixed size, which the loop over
tokens writes in place. The loop is one compiled program for each shape of the prompts, and ends
when every row has drawn a stop token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

from jaxpref.models import attention, blocks
from jaxpref.models.bounds import check
from jaxpref.models.decoder import Policy

ROWS = 1024  # of the unembedding in one product


class Samples(NamedTuple):
    """Responses, one a row, from their first token on.

    Attributes:
        tokens: Token ids; 0 after the response's end.
        is_token: The drawn tokens, the stop token among them; False after it.
        logp: Log-probability of each drawn token under the policy itself, nats: at temperature 1
            and of the whole vocabulary, whatever it was drawn with. 0 after the end, so that the
            sum over a row is the response's log-probability, stop token included.
    """

    tokens: Int[Array, "batch new"]
    is_token: Bool[Array, "batch new"]
    logp: Float[Array, "batch new"]


def sample(
    policy: Policy,
    params: PyTree,
    prompts: Int[Array | np.ndarray, "batch time"],
    is_prompt: Bool[Array | np.ndarray, "batch time"],
    *,
    max_new: int,
    key: Key[Array, ""],
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    rows: Int[Array | np.ndarray, " batch"] | None = None,
) -> Samples:
    r"""Draws a response to each prompt.

    .. math:: y_t \sim p_t, \qquad p_t \propto \pi(\cdot \mid x, y_{<t})^{1/T}\ \text{on}\ V_t

    with ``V_t`` the smallest set of the most probable tokens whose probability, at temperature
    ``T``, is at least `top_p`; tokens as probable as its last belong to it. Temperature 0 takes the
    most probable token, of equals the one with the smallest id.

    A row's tokens depend on its prompt, the key and the row's number, and not on the padding or the
    rest of the batch, but for rounding. Not for use under ``jit``: it is jitted here, and compiles
    anew for each shape of `prompts`, each policy and each `max_new`.

    Args:
        policy: A decoder's, or another with `Policy.cached`.
        params: Its parameters. NumPy arrays are copied to the device at each call.
        prompts: Token ids, padded on the left, on the right or in between.
        is_prompt: False on padding.
        max_new: Most tokens of a response.
        key: Random key, as ``jax.random.key(0)``. Without effect at temperature 0.
        temperature: ``T``, at least 0.
        top_p: In (0, 1]; 1 is the whole vocabulary.
        stop_ids: Tokens that end a response.
        rows: Number of each row, which its randomness depends on (as a row of the data set, so that
            batches may be cut in any way); None counts from 0.

    Returns:
        The responses.

    Raises:
        ValueError: an argument out of its range, a prompt without tokens, with an id that the
            policy does not know, or too long for `max_new` more in its longest text, a policy
            without a cache; the message names it.

    References:
        Holtzman et al. (2020), section 3.1 (top-p), https://arxiv.org/abs/1904.09751
    """
    _check(policy, params, prompts, is_prompt, max_new, temperature, top_p, stop_ids, rows)
    prompts, is_prompt = jnp.asarray(prompts), jnp.asarray(is_prompt)
    rows = jnp.arange(len(prompts)) if rows is None else jnp.asarray(rows)
    return _generate(
        policy,
        params,
        prompts,
        is_prompt,
        jax.vmap(jax.random.fold_in, (None, 0))(key, rows),
        None if temperature == 0 else temperature,
        None if top_p == 1 else top_p,
        jnp.asarray(stop_ids, prompts.dtype),
        max_new=max_new,
    )


def nucleus(logits: Float[Array, "batch vocab"], top_p: ArrayLike) -> Bool[Array, "batch vocab"]:
    """The smallest set of most probable tokens of probability `top_p` or more, with all ties.

    Args:
        logits: One distribution a row.
        top_p: In (0, 1].

    Returns:
        Whether each token belongs to it; at least one a row does.

    >>> nucleus(jnp.log(jnp.array([[0.125, 0.5, 0.25, 0.125]])), 0.7).tolist()
    [[False, True, True, False]]
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    # The least probability in the set, bit by bit from the highest: numbers of one sign are ordered
    # as their bits are. A sort of a real vocabulary takes twenty times as long.
    width = jnp.finfo(probabilities.dtype).bits
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.dtype(f"int{width}"))

    def settle(place: Array, least: Array) -> Array:
        trial = least | (jnp.ones_like(least) << (width - 3 - place).astype(least.dtype))
        mass = jnp.where(bits >= trial, probabilities, 0.0).sum(axis=-1, keepdims=True)
        return jnp.where(mass >= top_p, trial, least)

    # Of a number up to 1, the sign and the first bit of the exponent are 0.
    return bits >= jax.lax.fori_loop(0, width - 2, settle, jnp.zeros_like(bits[:, :1]))


class _State(NamedTuple):
    """Between two tokens."""

    step: Int[Array, ""]  # tokens drawn
    cache: PyTree
    last: Int[Array, " batch"]  # token
    running: Bool[Array, " batch"]
    samples: Samples


@partial(jax.jit, static_argnames=("policy", "max_new"))
def _generate(
    policy: Policy,
    params: PyTree,
    prompts: Int[Array, "batch time"],
    is_prompt: Bool[Array, "batch time"],
    keys: Key[Array, " batch"],
    temperature: ArrayLike | None,  # None: 0
    top_p: ArrayLike | None,  # None: 1
    stop_ids: Int[Array, " stops"],
    *,
    max_new: int,
) -> Samples:
    batch, time = prompts.shape
    # All padding to the left: every row's next token then goes to the same column of the cache.
    order = jnp.argsort(is_prompt, axis=1, stable=True)
    prompts, seen = (jnp.take_along_axis(x, order, axis=1) for x in (prompts, is_prompt))
    positions = jnp.clip(jnp.cumsum(seen, axis=1) - 1, 0)
    attend = jnp.tril(jnp.ones((time, time), bool))[None] & seen[:, None]
    hidden, cache = policy.cached(params, prompts, positions, attend)
    room = max_new - 1  # the last token is not encoded
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, room), (0, 0)]), cache)
    seen = jnp.pad(seen, ((0, 0), (0, room)), constant_values=True)
    table, cap = policy.head(params)
    head = _head(table.astype(hidden.dtype), cap)

    def draw(state: _State, hidden: Array) -> _State:
        """Adds a token to each running row."""
        logits = head(hidden)
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = _choose(logits, now, temperature, top_p).astype(prompts.dtype)
        logp = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        drawn = Samples(token, state.running, logp - jax.nn.logsumexp(logits, axis=1))

        def put(responses: Array, new: Array) -> Array:
            new = jnp.where(state.running, new, jnp.zeros_like(new))
            return responses.at[:, state.step].set(new)

        samples = jax.tree.map(put, state.samples, drawn)
        running = state.running & ~(token[:, None] == stop_ids[None]).any(axis=1)
        return _State(state.step + 1, state.cache, token, running, samples)

    def advance(state: _State) -> _State:
        """Encodes the last token and draws the next."""
        at = time + state.step - 1
        position = (positions[:, -1] + state.step)[:, None]
        attend = (seen & (jnp.arange(time + room) <= at)[None])[:, None]
        last = state.last[:, None]
        hidden, cache = policy.cached(params, last, position, attend, state.cache, at)
        return draw(state._replace(cache=cache), hidden[:, -1])

    nothing = jnp.zeros((batch, max_new), prompts.dtype)
    samples = Samples(nothing, nothing.astype(bool), nothing.astype(blocks.wide(hidden.dtype)))
    start = _State(jnp.array(0), cache, nothing[:, 0], jnp.ones(batch, bool), samples)
    start = draw(start, hidden[:, -1])
    return jax.lax.while_loop(
        lambda state: (state.step < max_new) & state.running.any(), advance, start
    ).samples


def _head(unembedding: Array, cap: float | None) -> Callable[[Array], Array]:
    """Hidden states ``[batch width]`` to logits in at least float32, at the highest precision.

    Piece by piece on CPU: XLA's product there of a few states with all tokens at once is ten times
    slower.
    """
    vocab, width = unembedding.shape
    rows, wide = min(vocab, ROWS), blocks.wide(unembedding.dtype)
    # Here and not where they are read: a table is padded once, and not for each token.
    pieces = jnp.pad(unembedding, ((0, -vocab % rows), (0, 0))).reshape(-1, rows, width)
    product = partial(jnp.matmul, precision="highest", preferred_element_type=wide)

    def by_pieces(hidden: Array) -> Array:
        found = jax.lax.map(lambda piece: product(piece, hidden.T), pieces)
        return found.reshape(-1, len(hidden))[:vocab].T

    def at_once(hidden: Array) -> Array:
        return product(hidden, unembedding.T)

    def logits(hidden: Array) -> Array:
        found = jax.lax.platform_dependent(hidden, cpu=by_pieces, default=at_once)
        return attention.capped(found, cap)

    return logits


def _choose(logits: Array, keys: Array, temperature, top_p) -> Int[Array, " batch"]:
    """One token a row: the largest logit after Gumbel noise, which draws from the softmax."""
    if temperature is None:
        return logits.argmax(axis=1)
    # From the largest down: no temperature overflows.
    logits = (logits - logits.max(axis=1, keepdims=True)) / temperature
    if top_p is not None:
        logits = jnp.where(nucleus(logits, top_p), logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))
    return (logits + noise(keys)).argmax(axis=1)


def _check(policy, params, prompts, is_prompt, max_new, temperature, top_p, stop_ids, rows) -> None:
    if is_prompt.shape != prompts.shape:
        raise ValueError(f"is_prompt: got {is_prompt.shape}, expected {prompts.shape} as prompts")
    if rows is not None and rows.shape != prompts.shape[:1]:
        raise ValueError(f"rows: got {rows.shape}, expected {prompts.shape[:1]}, one a prompt")
    if max_new < 1:
        raise ValueError(f"max_new: got {max_new}, expected at least 1")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: got {temperature}, expected a finite number of at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected in (0, 1]")
    vocab = jax.eval_shape(lambda params: policy.head(params)[0], params).shape[0]
    if not all(0 <= token < vocab for token in stop_ids):
        raise ValueError(f"stop_ids: got {tuple(stop_ids)}, expected ids from 0 to {vocab - 1}")
    lengths = np.asarray(is_prompt).sum(axis=1)
    if empty := np.flatnonzero(lengths == 0).tolist():
        raise ValueError(f"is_prompt: got no token in rows {empty}, expected at least one in each")
    texts = zip(np.asarray(prompts), np.asarray(is_prompt), strict=True)
    numbers = [f"prompts: row {row}" for row in range(len(prompts))]
    check(policy.bounds, (ids[real] for ids, real in texts), numbers)
    text, longest = int(lengths.max()) + max_new, policy.bounds.longest
    if longest is not None and text - 1 > longest:  # the last token is not encoded
        raise ValueError(
            f"max_new: got {max_new}, texts of {text} tokens, expected at most {longest + 1}"
        )
