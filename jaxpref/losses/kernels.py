r"""DPO with kernels between embeddings of the prompt and of a response.

Kernels are given as logarithms, ``[*batch width], [*batch width] -> [*batch]``: that of a far pair
would be 0, and the losses read ``log K`` only. Embeddings may be functions of the policy, and then
a gradient enters them. If they are frozen, ``log K_w - log K_l`` is a constant of the pair: inside
a sigmoid it is a margin, and outside of one it has no effect on training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxpref.losses._inputs import (
    AnyArray,
    Hyperparameter,
    nonnegative,
    per_token,
    positive,
    wide,
)
from jaxpref.losses.pairwise import margin


def dpo_kernels(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    log_kernel: Float[AnyArray, "*pairs 2"],
    divergence: Float[AnyArray, "*pairs 2"],
    *,
    gamma: Hyperparameter = 0.5,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""DPO-Kernels inside a sigmoid: likelihood, likeness of embeddings, and a divergence.

    .. math:: -\log\sigma\left(a_w - a_l + \gamma (\log K_w - \log K_l) - \alpha (D_w - D_l)\right),
        \quad a = \frac{\log\pi}{n}

    Our transcription. Equal kernels and divergences leave `simpo` with ``β = 1, γ = 0``.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        log_kernel: ``log K`` of the prompt's embedding and each response's; see the file's text on
            frozen embeddings.
        divergence: ``D`` of policy and reference along each response, nats, of
            `jaxpref.losses.divergences`; gets a gradient.
        gamma: Weight of the kernels, 0 or above.
        alpha: Weight of the divergences, 0 or above.

    Returns:
        One loss a pair, nats. An empty response has a mean of 0.

    Raises:
        ValueError: `gamma` or `alpha` is not a finite number, 0 or above.

    Differs:
        The form of the authors' code for images, where ``a`` is a mean over elements; none for text
        is released. The paper prints `dpo_kernels_linear`.

    References:
        Das et al. (2025), as in the authors' code for images, https://arxiv.org/abs/2501.03271
    """
    a = per_token(wide(logp), lengths)
    return -jax.nn.log_sigmoid(_hybrid(a, log_kernel, divergence, gamma, alpha))


def dpo_kernels_linear(
    logp: Float[AnyArray, "*pairs 2"],
    log_kernel: Float[AnyArray, "*pairs 2"],
    prompt_divergence: Float[AnyArray, "*pairs"],
    *,
    kappa: Hyperparameter = 1.0,
    gamma: Hyperparameter = 0.5,
    alpha: Hyperparameter = 0.5,
) -> Float[Array, "*pairs"]:
    r"""DPO-Kernels without a sigmoid, the hybrid objective as the paper prints it.

    .. math:: -\kappa\left(\log\pi_w - \log\pi_l + \gamma (\log K_w - \log K_l)\right) + \alpha D

    Our transcription, not checked against the paper. The pull never ends, ``d_w = d_l = κ``, so
    that only the divergence bounds it.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        log_kernel: ``log K`` of the prompt's embedding and each response's.
        prompt_divergence: ``D`` of policy and reference, one a prompt, nats; gets a gradient.
        kappa: Scale, above 0.
        gamma: Weight of the kernels, 0 or above.
        alpha: Weight of the divergence, 0 or above.

    Returns:
        One loss a pair, nats, without lower bound.

    Raises:
        ValueError: `kappa` is not a finite number above 0, or a weight not one of 0 or above.

    References:
        Das et al. (2025), the hybrid loss, https://arxiv.org/abs/2501.03271
    """
    x = wide(logp)
    kappa, alpha = positive("kappa", kappa, x), nonnegative("alpha", alpha, x)
    zeros = jnp.zeros_like(x)
    gain = _hybrid(x, log_kernel, zeros, gamma, 0.0)
    return -kappa * gain + alpha * wide(prompt_divergence).astype(x.dtype)


def log_rbf_kernel(
    x: Float[AnyArray, "*batch width"],
    y: Float[AnyArray, "*batch width"],
    *,
    sigma: Hyperparameter = 1.0,
) -> Float[Array, "*batch"]:
    r"""Logarithm of the Gaussian kernel.

    .. math:: \log K = -\frac{\lVert x - y \rVert^2}{2\sigma^2}

    Args:
        x: Embeddings, of prompts say.
        y: Embeddings of responses.
        sigma: Width, in units of the embeddings, above 0.

    Returns:
        At most 0.

    Raises:
        ValueError: `sigma` is not a finite number above 0.

    >>> float(log_rbf_kernel(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
    -2.0

    References:
        Das et al. (2025), the RBF kernel, https://arxiv.org/abs/2501.03271
    """
    x, y = _alike(x, y)
    sigma = positive("sigma", sigma, x)
    return -_square(x - y) / (2 * sigma * sigma)


def log_polynomial_kernel(
    x: Float[AnyArray, "*batch width"],
    y: Float[AnyArray, "*batch width"],
    *,
    degree: int = 2,
    offset: Hyperparameter = 1.0,
) -> Float[Array, "*batch"]:
    r"""Logarithm of the polynomial kernel.

    .. math:: \log K = d \log \lvert x \cdot y + c \rvert

    An odd power of a negative number has no logarithm and gives NaN: use an even degree, or
    embeddings of length 1 and ``c > 1``.

    Args:
        x: Embeddings, of prompts say.
        y: Embeddings of responses.
        degree: ``d``, a whole number above 0.
        offset: ``c``, 0 or above.

    Returns:
        Any number. A base smaller than the dtype's `eps` counts as `eps`, with slope 0.

    Raises:
        ValueError: `degree` is not a whole number above 0, or `offset` not a finite one of 0 or
            above.

    >>> round(float(log_polynomial_kernel(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]))), 4)
    2.7726

    References:
        Das et al. (2025), the polynomial kernel, https://arxiv.org/abs/2501.03271
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise ValueError(f"degree: got {degree!r}, expected a whole number above 0")
    x, y = _alike(x, y)
    base = jnp.einsum("...w,...w->...", x, y, precision="highest")
    base = base + nonnegative("offset", offset, x)
    log_kernel = degree * jnp.log(jnp.maximum(jnp.abs(base), jnp.finfo(x.dtype).eps))
    return jnp.where((base < 0) & (degree % 2 == 1), jnp.nan, log_kernel)


def log_mahalanobis_kernel(
    x: Float[AnyArray, "*batch width"],
    y: Float[AnyArray, "*batch width"],
    precision: Float[AnyArray, "width width"],
) -> Float[Array, "*batch"]:
    r"""Logarithm of the Gaussian kernel with a covariance.

    .. math:: \log K = -\tfrac12 (x - y)^\top \Sigma^{-1} (x - y)

    Args:
        x: Embeddings, of prompts say.
        y: Embeddings of responses.
        precision: ``Σ^-1``, the inverse covariance of embeddings, positive definite; gets no
            gradient.

    Returns:
        At most 0.

    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
    >>> float(log_mahalanobis_kernel(x, y, jnp.diag(jnp.array([9.0, 0.25]))))
    -0.5

    References:
        Das et al. (2025), the Mahalanobis kernel, https://arxiv.org/abs/2501.03271
    """
    x, y = _alike(x, y)
    apart = x - y
    inverse = jax.lax.stop_gradient(wide(precision).astype(x.dtype))
    return -jnp.einsum("...i,ij,...j->...", apart, inverse, apart, precision="highest") / 2


def log_spectral_kernel(
    x: Float[AnyArray, "*batch width"],
    y: Float[AnyArray, "*batch width"],
    weights: Float[AnyArray, " terms"],
    rates: Float[AnyArray, " terms"],
) -> Float[Array, "*batch"]:
    r"""Logarithm of a sum of Gaussian kernels of several widths.

    .. math:: \log K = \log \sum_k \lambda_k e^{-a_k \lVert x - y \rVert^2}

    Args:
        x: Embeddings, of prompts say.
        y: Embeddings of responses.
        weights: ``λ``, above 0: 1 and 0.5 in the code that we know; get no gradient.
        rates: ``a``, 0 or above: 1 and 0.1 there; get no gradient.

    Returns:
        At most the logarithm of the sum of the weights.

    >>> same, two = jnp.ones(3), jnp.array([1.0, 0.5])
    >>> round(float(log_spectral_kernel(same, same, two, jnp.array([1.0, 0.1]))), 4)  # log 1.5
    0.4055

    References:
        Das et al. (2025), the spectral kernel, https://arxiv.org/abs/2501.03271
    """
    x, y = _alike(x, y)
    weights, rates = (jax.lax.stop_gradient(wide(v).astype(x.dtype)) for v in (weights, rates))
    lead = (1,) * (x.ndim - 1)
    square = _square(x - y)[..., None]
    logs = jnp.log(weights).reshape(*lead, -1) - rates.reshape(*lead, -1) * square
    return jax.nn.logsumexp(logs, axis=-1)


def log_kernel_mixture(
    log_kernels: Float[AnyArray, "*batch groups kernels"],
    kernel_logits: Float[AnyArray, "groups kernels"],
    group_logits: Float[AnyArray, " groups"],
) -> Float[Array, "*batch"]:
    r"""Logarithm of a hierarchical mixture of kernels, with learned weights.

    .. math:: \log K = \log \sum_g \tau_g \sum_k \alpha_{g,k} K_{g,k}, \quad
        \tau = \mathrm{softmax}(s), \; \alpha_g = \mathrm{softmax}(r_g)

    The paper's groups are the local kernels (RBF, polynomial) and the global ones (spectral,
    Mahalanobis). That the weights sum to 1 in each group is our transcription.

    Args:
        log_kernels: ``log K``, finite.
        kernel_logits: ``r``, parameters.
        group_logits: ``s``, parameters.

    Returns:
        Between the smallest and the largest of the kernels.

    >>> logs = jnp.log(jnp.array([[1.0, 3.0], [4.0, 8.0]]))
    >>> round(float(jnp.exp(log_kernel_mixture(logs, jnp.zeros((2, 2)), jnp.zeros(2)))), 4)
    4.0

    References:
        Das et al. (2025), the hierarchical mixture of kernels, https://arxiv.org/abs/2501.03271
    """
    logs = wide(log_kernels)
    inner = jax.nn.log_softmax(wide(kernel_logits).astype(logs.dtype), axis=-1)
    outer = jax.nn.log_softmax(wide(group_logits).astype(logs.dtype), axis=-1)
    weights = (inner + outer[:, None]).reshape(*(1,) * (logs.ndim - 2), *inner.shape)
    return jax.nn.logsumexp(logs + weights, axis=(-2, -1))


def _hybrid(
    x: Array,
    log_kernel: AnyArray,
    divergence: AnyArray,
    gamma: Hyperparameter,
    alpha: Hyperparameter,
) -> Array:
    gamma, alpha = nonnegative("gamma", gamma, x), nonnegative("alpha", alpha, x)
    likeness, apart = (wide(v).astype(x.dtype) for v in (log_kernel, divergence))
    return margin(x) + gamma * margin(likeness) - alpha * margin(apart)


def _alike(x: AnyArray, y: AnyArray) -> tuple[Array, Array]:
    """Both in the wider of their dtypes, at least float32."""
    x, y = wide(x), wide(y)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(dtype), y.astype(dtype)


def _square(x: Array) -> Array:
    return (x * x).sum(axis=-1)
