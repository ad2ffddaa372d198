r"""DPO constrained in the features of a sparse autoencoder.

The codes of policy and reference come from one given, frozen encoder; those of the reference may be
computed once and kept, which is what the method saves against divergences of the vocabulary.
Arrays are ``[*pairs 2 response ...]``, chosen first; where `is_target` is False they are not read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    log_ratio,
    nonnegative,
    per_token,
    positive,
    wide,
)
from jaxpref.losses.pairwise import margin


def fpo(
    logp: Float[AnyArray, "*pairs 2"],
    reference: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    distance: Float[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 0.1,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""Feature-level constrained preference optimisation: `tdpo2` on token means and features.

    .. math:: -\log\sigma\left(\beta\Bigl(\frac{u_w}{n_w} - \frac{u_l}{n_l}\Bigr)
        - \alpha\beta (F_l - \mathrm{sg}(F_w))\right)

    Where policy and reference agree the distance has gradient 0, so the first step is that of DPO
    with token means.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        reference: The same under the frozen reference; gets no gradient.
        lengths: Number of scored tokens of each response.
        distance: ``F`` of `feature_distance`, a function of the policy, which gets a gradient
            through the rejected response's only.
        beta: Inverse temperature, tokens per nat, above 0.
        alpha: Weight of the distances, 0 (DPO with token means) or above.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `beta` is not a finite number above 0, or `alpha` not one of 0 or above.

    References:
        Yin et al. (2024), the FPO loss, https://arxiv.org/abs/2411.07618
    """
    u = per_token(log_ratio(logp, reference), lengths)
    beta, alpha = positive("beta", beta, u), nonnegative("alpha", alpha, u)
    distance = wide(distance).astype(u.dtype)
    apart = distance[..., 1] - jax.lax.stop_gradient(distance[..., 0])
    return -jax.nn.log_sigmoid(beta * (margin(u) - alpha * apart))


def feature_distance(
    codes: Float[AnyArray, "*batch features"],
    reference_codes: Float[AnyArray, "*batch features"],
    *,
    k: int = 50,
) -> Float[Array, "*batch"]:
    r"""How far the policy's strongest features are from the reference's.

    .. math:: F = \frac1k \sum_{i \in \text{top } k \text{ of } c} (c_i - c_{ref,i})^2

    Args:
        codes: ``c`` of `pooled_codes` under the policy, which also picks the features.
        reference_codes: The same under the reference; gets no gradient.
        k: How many features; all of them if there are no more.

    Returns:
        At least 0. Where policy and reference agree it is 0 and has gradient 0. Of equally strong
        features the first count.

    Raises:
        ValueError: `k` is not a whole number above 0.

    >>> codes, reference = jnp.array([3.0, 0.0, 2.0]), jnp.array([1.0, 9.0, 2.0])
    >>> float(feature_distance(codes, reference, k=2))
    2.0

    References:
        Yin et al. (2024), the feature constraint, https://arxiv.org/abs/2411.07618
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}, expected a whole number above 0")
    codes = wide(codes)
    top, places = jax.lax.top_k(codes, min(k, codes.shape[-1]))
    other = jax.lax.stop_gradient(wide(reference_codes).astype(codes.dtype))
    return ((top - jnp.take_along_axis(other, places, axis=-1)) ** 2).mean(axis=-1)


def pooled_codes(
    hidden: Float[AnyArray, "*batch response width"],
    is_target: Bool[AnyArray, "*batch response"],
    weight: Float[AnyArray, "width features"],
    bias: Float[AnyArray, " features"],
    threshold: Float[AnyArray, " features"],
) -> Float[Array, "*batch features"]:
    r"""Codes of a JumpReLU autoencoder, a mean over the response.

    .. math:: c = \frac1n \sum_t z_t\, [z_t > \max(\theta, 0)], \quad z_t = h_t W + b

    Over the scored tokens, as in the paper; the authors' code divides by the padded length instead.
    The encoder is frozen: a gradient enters `hidden` only, and not across the jump.

    Args:
        hidden: ``h``, hidden states of the layer that the autoencoder was trained on.
        is_target: The scored tokens.
        weight: ``W`` of the encoder.
        bias: ``b`` of the encoder.
        threshold: ``θ``; zeros for a ReLU.

    Returns:
        At least 0; an empty response has codes of 0.

    >>> hidden = jnp.array([[1.0, 5.0], [3.0, 1.0]])
    >>> both = jnp.array([True, True])
    >>> pooled_codes(hidden, both, jnp.eye(2), jnp.zeros(2), jnp.array([0.0, 2.0])).tolist()
    [2.0, 2.5]

    References:
        Yin et al. (2024), the feature constraint, https://arxiv.org/abs/2411.07618
    """
    h, scored = wide(hidden), jnp.asarray(is_target)[..., None]
    h = jnp.where(scored, h, jnp.zeros_like(h))
    frozen = (jax.lax.stop_gradient(wide(x).astype(h.dtype)) for x in (weight, bias, threshold))
    weight, bias, threshold = frozen
    lead = (1,) * (h.ndim - 1)
    z = jnp.einsum("...w,wf->...f", h, weight, precision="highest") + bias.reshape(*lead, -1)
    threshold = jax.nn.relu(threshold).reshape(*lead, -1)
    z = jnp.where(jnp.isnan(threshold), jnp.nan, z)
    silent = ~scored | (z <= threshold)  # which a NaN is not
    total = jnp.where(silent, jnp.zeros_like(z), z).sum(axis=-2)
    return total / jnp.maximum(scored.sum(axis=-2).astype(z.dtype), 1.0)
