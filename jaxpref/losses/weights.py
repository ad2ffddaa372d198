r"""What goes before a loss of pairs: a weight for each pair, a weight for each token.

Weights of pairs multiply the loss, ``wpo_weight(...) * dpo(...)``; weights of tokens make other
log-probabilities, ``dpo(ld_logp(policy), ld_logp(reference))``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxpref.losses._inputs import AnyArray, Hyperparameter, per_token, portion, wide


def wpo_weight(
    logp: Float[AnyArray, "*pairs 2"],
    collision: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
) -> Float[Array, "*pairs"]:
    r"""Weighted preference optimisation: how much a pair is like the policy's own samples.

    .. math:: \exp\left(\sum_{y \in \{w, l\}}\frac{1}{n_y}\sum_t
        \left(\log\pi_t - \log\sum_v \pi_{t,v}^2\right)\right)

    A token as probable as the policy's own on average counts 1. Multiply any loss of pairs by it.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        collision: Summed over the same tokens, the logarithm of the sum over the vocabulary of
            squared probabilities, nats.
        lengths: Number of scored tokens of each response.

    Returns:
        One weight a pair, without gradient. An empty response counts as like the policy's own.

    Differs:
        TRL up to 0.28 bounds the weight by 1, and reads its logits one position late.

    References:
        Zhou et al. (2024), weights with sampled alignment, https://arxiv.org/abs/2406.11827
    """
    logp = jax.lax.stop_gradient(wide(logp))
    collision = jax.lax.stop_gradient(wide(collision))
    return jnp.exp(per_token(logp - collision, lengths).sum(axis=-1))


def ld_logp(
    token_logp: Float[AnyArray, "*pairs 2 response"],
    is_target: Bool[AnyArray, "*pairs 2 response"],
    *,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs 2"]:
    r"""Length-desensitised log-probabilities: tokens beyond the shorter response count for less.

    .. math:: \sum_{t \le m}\log\pi_t + \alpha\sum_{t > m}\log\pi_t, \quad m = \min(n_w, n_l)

    Taken for policy and reference they make any loss of pairs length-desensitised; in `dpo`, they
    make LD-DPO. Positions count from the first scored token of a response.

    Args:
        token_logp: Log-probability of each token, nats.
        is_target: True at the scored tokens.
        alpha: Weight of the tokens beyond, from 0 to 1; 1 is the plain sum.

    Returns:
        One sum a response, nats.

    Raises:
        ValueError: `alpha` is not in [0, 1].

    Differs:
        TRL up to 0.28 weighs the policy only, and counts positions from the start of the prompt.

    References:
        Liu et al. (2024), LD-DPO, https://arxiv.org/abs/2409.06411
    """
    scored = jnp.asarray(is_target)
    logp = jnp.where(scored, wide(token_logp), 0.0)
    alpha = portion("alpha", alpha, logp)
    shared = scored.sum(axis=-1).min(axis=-1)[..., None, None]
    beyond = jnp.cumsum(scored, axis=-1) > shared
    return jnp.where(beyond, alpha * logp, logp).sum(axis=-1)
