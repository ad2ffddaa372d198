"""Losses that read only some tokens: where the two responses differ, or where a mask learned to."""

import difflib

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxpref import losses
from jaxpref.training.mitigations._inputs import AnyArray, wide

STRETCH = 0.1  # how far `learned_mask` reaches beyond 0 and 1 before it is cut


def contrast_mask(
    tokens: Int[AnyArray, "*pairs 2 time"], is_target: Bool[AnyArray, "*pairs 2 time"]
) -> Bool[np.ndarray, "*pairs 2 time"]:
    """Which tokens of each response the other does not have, by aligning the two.

    The longest common runs are matched first (`difflib.SequenceMatcher`), so that a shared prefix,
    a shared suffix and what is equal between two differences are left out. It runs on the host,
    once for a data set.

    Args:
        tokens: Of both responses. Position ``t`` is the token whose log-probability stands at
            ``t`` in the arrays that the mask is to be used with.
        is_target: The scored tokens; only these are compared.

    Returns:
        True for a scored token without a partner. Nowhere true for two identical responses, which
        then have a loss of ``log 2`` and no gradient.

    >>> tokens = np.array([[[5, 7, 8, 9], [5, 6, 8, 9]]])
    >>> contrast_mask(tokens, np.ones(tokens.shape, bool)).astype(int).tolist()
    [[[0, 1, 0, 0], [0, 1, 0, 0]]]

    Source: the hard form of the token masks of Yuan et al. (2024),
    https://arxiv.org/abs/2410.13828, with an alignment in place of learning.
    """
    tokens, is_target = np.asarray(tokens), np.asarray(is_target)
    mask = is_target.copy()
    for pair in np.ndindex(*tokens.shape[:-2]):
        places = [np.flatnonzero(row) for row in is_target[pair]]
        words = [row[where].tolist() for row, where in zip(tokens[pair], places, strict=True)]
        matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
        for chosen, rejected, size in matcher.get_matching_blocks():
            for side, start in enumerate((chosen, rejected)):
                mask[(*pair, side, places[side][start : start + size])] = False
    return mask


def learned_mask(
    logits: Float[AnyArray, "*pairs 2 time"], is_target: Bool[AnyArray, "*pairs 2 time"]
) -> Float[Array, "*pairs 2 time"]:
    r"""A mask in [0, 1] of free numbers, that can reach both ends.

    .. math:: \min(1, \max(0, 1.2\,\sigma(x) - 0.1))

    A sigmoid stretched over its ends and cut: a hard-concrete gate without its noise. At an end the
    derivative is zero, so a token that was dropped stays dropped, exactly. Start inside, at 0 say.

    The paper is known to us only from reports, which do not say how its masks are computed. Here
    each token of each training pair has a number of its own, learned with the model: a mask that
    says which tokens of the *training* pairs matter, nothing about new ones.

    Args:
        logits: ``x``, parameters. Select those of a batch by its rows of the data set.
        is_target: The scored tokens.

    Returns:
        0 for a token that is not scored.

    >>> is_target = np.array([[True, True], [True, False]])
    >>> learned_mask(jnp.array([[-9.0, 0.0], [9.0, 9.0]]), is_target).tolist()
    [[0.0, 0.5], [1.0, 0.0]]

    References:
        Louizos et al. (2018), the stretched and cut gate, https://arxiv.org/abs/1712.01312
    """
    logits = jnp.asarray(logits)
    gate = (1 + 2 * STRETCH) * jax.nn.sigmoid(logits) - STRETCH
    return jnp.where(jnp.asarray(is_target), jnp.clip(gate, 0.0, 1.0), jnp.zeros_like(gate))


def masked_log_ratio(
    token_logp: Float[AnyArray, "*pairs 2 time"],
    token_reference: Float[AnyArray, "*pairs 2 time"],
    mask: Float[AnyArray, "*pairs 2 time"] | Bool[AnyArray, "*pairs 2 time"],
) -> Float[Array, "*pairs 2"]:
    r"""Log-ratio of each response, over the tokens that a mask leaves.

    .. math:: u = \sum_t m_t \left(\log\pi_t - \log\pi_{ref,t}\right)

    Give it to a loss as its ``logp``, with a reference of zeros. (A masked reference would be data
    to the loss, and a learned mask would get the gradient of ``log π`` alone.)

    Guarantee: where the mask is 0, the log-probability of the token gets a gradient of exactly 0.
    A token is also the context of later ones, and through those its representation is trained.

    Args:
        token_logp: Of each token under the policy, nats; finite wherever it stands.
        token_reference: The same under the frozen reference; gets no gradient.
        mask: Of `contrast_mask` or `learned_mask`, 0 for tokens that are not scored.

    Returns:
        Nats, at least float32.

    >>> logp, reference = jnp.array([[-1.0, -2.0], [-3.0, -2.0]]), jnp.full((2, 2), -1.5)
    >>> masked_log_ratio(logp, reference, np.array([[True, False], [True, False]])).tolist()
    [0.5, -1.5]

    References:
        Yuan et al. (2024), sparsity-regularised token masking, known to us from reports of the
        paper, https://arxiv.org/abs/2410.13828
    """
    token_logp = wide(token_logp)
    reference = jax.lax.stop_gradient(jnp.asarray(token_reference).astype(token_logp.dtype))
    return (jnp.asarray(mask).astype(token_logp.dtype) * (token_logp - reference)).sum(axis=-1)


def sparse_dpo(
    token_logp: Float[AnyArray, "*pairs 2 time"],
    token_reference: Float[AnyArray, "*pairs 2 time"],
    mask: Float[AnyArray, "*pairs 2 time"],
    *,
    beta: float = 0.1,
    lam: float,
) -> Float[Array, "*pairs"]:
    r"""DPO on masked tokens, and a price for each token that the mask leaves.

    .. math:: -\log\sigma\!\left(\beta (u_w - u_l)\right) + \lambda \sum_t (m_{w,t} + m_{l,t}),
        \qquad u = \sum_t m_t \left(\log\pi_t - \log\pi_{ref,t}\right)

    The mask is trained by the same loss. A token of the chosen response is worth its price while
    ``β σ(-β(u_w - u_l)) (log π_t - log π_ref,t) > λ``, of the rejected one with the opposite sign.
    Two consequences: while the policy is its reference only the price acts, so masks want a start
    above 0 and a small `lam`, or policies that have moved; and a chosen token that has *fallen* is
    dropped, not raised again.

    Args:
        token_logp: Of each token under the policy, nats; finite wherever it stands.
        token_reference: The same under the frozen reference; gets no gradient.
        mask: In [0, 1], of `learned_mask`; 0 for tokens that are not scored.
        beta: Inverse temperature, per nat, above 0.
        lam: Price of a token, nats, 0 or above. With a mask of ones and 0 it is DPO.

    Returns:
        One loss a pair, nats.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `lam` not one of 0 or above.

    >>> logp = jnp.full((2, 3), -1.0)
    >>> round(float(sparse_dpo(logp, logp, jnp.ones((2, 3)), lam=0.01)), 4)  # log 2 + 6 * 0.01
    0.7531

    References:
        Yuan et al. (2024), sparsity-regularised token masking, known to us from reports of the
        paper, https://arxiv.org/abs/2410.13828
    """
    if not isinstance(lam, Tracer) and not 0 <= lam < np.inf:
        raise ValueError(f"lam: got {lam}, expected a finite number, 0 or above")
    u = masked_log_ratio(token_logp, token_reference, mask)
    price = jnp.asarray(mask).astype(u.dtype).sum(axis=(-2, -1))
    return losses.dpo(u, jnp.zeros_like(u), beta=beta) + lam * price
