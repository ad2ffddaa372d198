"""Exact sums over all responses of a policy small enough to count them.

Works on any `Policy`: the tables of `jaxpref.models.tabular`, or a real decoder with a tiny
vocabulary. Written apart from `jaxpref.logprobs`, with all logits held, so that it can check it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxpref.models.attention import capped
from jaxpref.models.decoder import Policy

MAX_VOCAB = 8
MAX_LENGTH = 4


def sequences(*, vocab: int, length: int) -> Int[Array, "sequences length"]:
    """All sequences of `length` tokens, in counting order (the last token changes fastest).

    Args:
        vocab: Number of tokens, at most `MAX_VOCAB`.
        length: Number of tokens, at most `MAX_LENGTH`.

    Returns:
        ``vocab**length`` rows of int32.

    Raises:
        ValueError: a size outside its limits.

    >>> sequences(vocab=2, length=2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]

    Source: counting in base `vocab`.
    """
    for name, value, limit in (("vocab", vocab, MAX_VOCAB), ("length", length, MAX_LENGTH)):
        if not 1 <= value <= limit:
            raise ValueError(f"{name}: got {value}, expected 1 to {limit} to enumerate all")
    return jnp.asarray(np.indices((vocab,) * length).reshape(length, -1).T, jnp.int32)


def sequence_logprobs(
    policy: Policy, params: PyTree, prompt: Int[Array, " prompt"], *, length: int
) -> Float[Array, " sequences"]:
    r"""Log-probability of every response of `length` tokens, under any policy small enough.

    .. math:: \ln \pi(y|x) = \sum_{k=1}^{L} \ln \pi(y_k | x, y_{<k})

    Args:
        policy: Any, with a vocabulary of at most `MAX_VOCAB`.
        params: The policy's parameters.
        prompt: Tokens before the response, at least one (a table takes exactly one).
        length: Tokens of the responses. There is no end token: all have this length, so the
            probabilities sum to one.

    Returns:
        Nats, in the order of `sequences`; at least float32.

    Raises:
        ValueError: an empty prompt, or a size outside the limits of `sequences`.

    Source: the chain rule of probability.
    """
    if prompt.size == 0:
        raise ValueError("prompt: got no tokens, expected at least one")
    W, cap = policy.head(params)
    responses = sequences(vocab=W.shape[0], length=length).astype(prompt.dtype)
    prompts = jnp.broadcast_to(prompt, (responses.shape[0], prompt.size))
    tokens = jnp.concatenate([prompts, responses[:, :-1]], axis=1)
    hidden = policy.hidden(params, tokens)[:, prompt.size - 1 :]
    dtype = hidden.dtype if jnp.finfo(hidden.dtype).bits >= 32 else jnp.float32
    hidden, W = hidden.astype(dtype), W.astype(dtype)
    logits = capped(jnp.matmul(hidden, W.T, precision=jax.lax.Precision.HIGHEST), cap)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), responses[..., None], axis=-1)
    return logp.sum(axis=(1, 2))


def expectation(
    logp: Float[Array, " sequences"], values: Float[Array, "sequences *value"]
) -> Float[Array, "*value"]:
    r"""Exact mean of a function of the response, ``sum_y pi(y|x) f(y)``.

    Args:
        logp: Log-probabilities of all responses, from `sequence_logprobs`.
        values: ``f`` of each, with any further axes.

    Returns:
        The mean over responses. A response of probability zero counts nothing, whatever its value.

    >>> float(expectation(jnp.log(jnp.array([0.25, 0.75])), jnp.array([4.0, 8.0])))
    7.0

    Source: the definition of the expectation.
    """
    p = jnp.exp(logp).reshape(-1, *(1,) * (values.ndim - 1))
    possible = jnp.broadcast_to(p > 0, values.shape)
    return (p * jnp.where(possible, values, jnp.zeros_like(values))).sum(axis=0)


def kl(
    logp: Float[Array, "*batch outcomes"], logq: Float[Array, "*batch outcomes"]
) -> Float[Array, "*batch"]:
    r"""Exact ``KL(p || q)`` of two distributions given by all their log-probabilities.

    .. math:: \sum_y p(y) (\ln p(y) - \ln q(y))

    Args:
        logp: Log-probabilities under ``p``, summing to one.
        logq: The same under ``q``.

    Returns:
        Nats, ``[*batch]``. Outcomes with ``p = 0`` add nothing; ``q = 0 < p`` gives infinity.

    >>> float(kl(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.5]))))
    0.0

    References:
        Kullback & Leibler (1951), eq. 2.4, https://doi.org/10.1214/aoms/1177729694
    """
    possible = logp > -jnp.inf
    finite = jnp.where(possible, logp, 0.0)  # so that no derivative is 0 * inf
    return jnp.where(possible, jnp.exp(finite) * (finite - logq), 0.0).sum(axis=-1)
