"""First-order change of outputs along one direction in parameter space, exact and matrix-free."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, PyTree

from jaxpref import plain
from jaxpref.gradients import _inputs


def directional(
    fn: Callable[[PyTree], PyTree], params: PyTree, tangent: PyTree
) -> tuple[PyTree, PyTree]:
    r"""Value of ``fn(params)`` and its exact first-order change along `tangent`.

    .. math:: f(\theta), \qquad \left. \frac{d}{ds} f(\theta + s v) \right|_{s=0} = J_f(\theta)\, v

    One Jacobian-vector product: about twice the time of ``fn`` whatever the number of outputs, and
    no Jacobian is held. With ``tangent = -gradient`` it is the rate of gradient flow; with an
    optimizer's own update it is what that update does to first order.

    Args:
        fn: Function of `params` with any pytree of arrays as output. It must allow forward-mode
            derivatives (a function with only a custom VJP does not; JAX says so. This library's
            own are plain operations here).
        params: Any pytree of floating arrays.
        tangent: Direction, of the structure, shapes and dtypes of `params`.

    Returns:
        ``(value, change)``, both of the structure of ``fn(params)``. Matrix products inside `fn`
        that name no precision run at the highest one: the sign of a small change is the finding.

    Raises:
        ValueError: a parameter that is no floating array.
        TypeError: from JAX, when `tangent` does not match `params`.

    >>> import jax.numpy as jnp
    >>> value, change = directional(lambda x: x**2, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.5]))
    >>> value.tolist(), change.tolist()
    ([1.0, 9.0], [2.0, 3.0])

    Source: the definition of the directional derivative.
    """
    _inputs.require_floating(params)
    with jax.default_matmul_precision("highest"), plain.ASKED(True):
        return jax.jvp(fn, (params,), (tangent,))


def flow_rates(
    logp_fn: Callable[[PyTree], PyTree],
    loss_of_logp: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
) -> tuple[PyTree, PyTree]:
    r"""Every log-probability and its rate of change under gradient flow on a loss of them.

    .. math:: \dot\theta = -\nabla_\theta L(f(\theta)) \quad\Rightarrow\quad
        \frac{d}{dt} f = -J J^\top \nabla_f L

    One VJP and one JVP, exact on the real parameters: the whole next-token distribution of a large
    model costs two backward-sized passes, and the ``J J^T`` of all outputs is never formed. The
    rates are also the change per unit of learning rate of one step of plain gradient descent, to
    first order. Only what `params` holds is trained: to train a part of a model, close over the
    rest in `logp_fn`.

    Args:
        logp_fn: ``params -> f``, any pytree of log-probabilities (nats), for example ``[vocab]``.
            It must allow forward-mode derivatives (see `directional`).
        loss_of_logp: ``f -> L``, a scalar. It need not read all of `f`; what it ignores is
            followed all the same.
        params: Any pytree of floating arrays.

    Returns:
        ``(value, rates)``, both of the structure of ``logp_fn(params)``; rates in nats per unit
        of flow time.

    Raises:
        ValueError: a parameter that is no floating array.
        TypeError: from JAX, when the loss is not a scalar.

    >>> import jax.numpy as jnp
    >>> logits = jnp.zeros(2)  # a uniform choice of two; the loss asks for more of the first
    >>> _, rates = flow_rates(jax.nn.log_softmax, lambda logp: -logp[0], logits)
    >>> rates.tolist()
    [0.5, -0.5]

    References:
        Razin, Malladi, Bhaskar, Chen, Arora, Hanin (2024), the gradient flow behind Theorems 1 to
        9, https://arxiv.org/abs/2410.08847
    """
    _inputs.require_floating(params)
    with jax.default_matmul_precision("highest"), plain.ASKED(True):
        value, pullback = jax.vjp(logp_fn, params)
        (slope,) = pullback(jax.grad(loss_of_logp)(value))
    return directional(logp_fn, params, jax.tree.map(lambda leaf: -leaf, slope))
