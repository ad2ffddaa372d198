"""Optimizers that optax does not have in the form a paper used, and some by name at rate 1."""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

Scalar = float | int | Float[Array, ""]
Optimizer = Literal["sgd", "rmsprop", "adam"]
DECAY = {"sgd": None, "rmsprop": 0.99, "adam": 0.999}
"""Of the running mean of squares, by an optimizer's name."""


class MeanSquare(NamedTuple):
    """State of `torch_rmsprop`: a running mean of the squared gradient, one for each parameter."""

    mean_square: PyTree[Float[Array, "..."]]


def torch_rmsprop(
    learning_rate: Scalar, *, decay: Scalar = 0.99, eps: Scalar = 1e-8
) -> optax.GradientTransformation:
    r"""RMSprop with the formula, the defaults and the first steps of ``torch.optim.RMSprop``.

    .. math:: v \leftarrow \rho v + (1 - \rho) g^2, \qquad
              \theta \leftarrow \theta - \eta\, g / (\sqrt{v} + \epsilon), \qquad v_0 = 0

    There is no bias correction: under a constant gradient well above ``eps``, update ``t`` is
    ``learning_rate / sqrt(1 - decay ** t)``, so the first one moves every parameter by ten learning
    rates, however small its gradient.

    ``optax.rmsprop`` differs by default: decay 0.9 and ``eps`` inside the root.

    The hyperparameters may be arrays, so ``optax.inject_hyperparams(torch_rmsprop)`` puts them into
    the state, for schedules and for one compiled step of many learning rates.

    Args:
      learning_rate: ``eta``, at least 0.
      decay: ``rho`` (torch calls it ``alpha``), in ``[0, 1)``.
      eps: added to the root, at least 0. With 0, a gradient that was always zero gives NaN.

    Returns:
      An optax transformation; its updates are to be added. State and update keep each parameter's
      dtype.

    Raises:
      ValueError: a number outside its range, or NaN. Arrays are not looked at.

    Examples:
      >>> optimizer = torch_rmsprop(1e-3)
      >>> params = jnp.zeros(2, jnp.float32)
      >>> gradient = jnp.array([1e-2, -1e-7], jnp.float32)
      >>> update, state = optimizer.update(gradient, optimizer.init(params))
      >>> print((update / jnp.float32(1e-3)).round(4))
      [-9.9999  5.    ]

    Source:
      ``torch.optim.RMSprop`` (``centered=False``, ``momentum=0``),
      https://pytorch.org/docs/stable/generated/torch.optim.RMSprop.html
    """
    _check("learning_rate", learning_rate, below=float("inf"))
    _check("decay", decay, below=1.0)
    _check("eps", eps, below=float("inf"))

    def init(params):
        return MeanSquare(jax.tree.map(jnp.zeros_like, params))

    def mean_square(gradient, before):
        rho, rest = (jnp.asarray(x, gradient.dtype) for x in (decay, 1 - decay))
        return rho * before + rest * gradient * gradient

    def descent(gradient, v):
        eta, epsilon = (jnp.asarray(x, gradient.dtype) for x in (learning_rate, eps))
        return -eta * gradient / (jnp.sqrt(v) + epsilon)

    def update(updates, state, params=None):
        del params
        v = jax.tree.map(mean_square, updates, state.mean_square)
        return jax.tree.map(descent, updates, v), MeanSquare(v)

    return optax.GradientTransformation(init, update)


@functools.cache  # one object a name: a compiled program may depend on it
def unit_optimizer(name: str) -> optax.GradientTransformation:
    """An optimizer at learning rate 1: its update is to be multiplied with the learning rate.

    So one compiled program serves all rates (`jaxpref.training.courses`). None of them clips the
    gradient or decays weights.

    Args:
      name: ``sgd``, ``rmsprop`` (`torch_rmsprop`) or ``adam``.

    Raises:
      ValueError: another name.

    >>> optimizer = unit_optimizer("sgd")
    >>> print(optimizer.update(jnp.float32(3), optimizer.init(jnp.float32(0)))[0])
    -3.0
    """
    if name not in DECAY:
        raise ValueError(f"optimizer: got {name}, expected one of {', '.join(get_args(Optimizer))}")
    if name == "adam":
        return optax.adam(1.0, b2=DECAY["adam"])
    return optax.sgd(1.0) if name == "sgd" else torch_rmsprop(1.0, decay=DECAY["rmsprop"])


def _check(name: str, value: Scalar, *, below: float) -> None:
    if isinstance(value, float | int) and not 0 <= value < below:
        limits = "at least 0" if below == float("inf") else f"in [0, {below:g})"
        raise ValueError(f"{name} is {value}, expected a number {limits}")
