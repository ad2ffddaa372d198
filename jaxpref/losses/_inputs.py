"""What every loss does with its arguments before the formula."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Num

AnyArray = Array | np.ndarray
Hyperparameter = float | int | np.number | Num[AnyArray, ""]


def wide(x: AnyArray) -> Array:
    """At least float32."""
    x = jnp.asarray(x)
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def log_ratio(
    logp: Float[AnyArray, "*batch"], reference: Float[AnyArray, "*batch"]
) -> Float[Array, "*batch"]:
    """``u``: policy less reference. The reference is data, so no gradient enters it."""
    return wide(logp) - jax.lax.stop_gradient(wide(reference))


def counts(lengths: Num[AnyArray, "*batch"], like: Array) -> Float[Array, "*batch"]:
    """Lengths, integers or not, in the dtype of ``like``: data, so no gradient enters them."""
    return jax.lax.stop_gradient(jnp.asarray(lengths).astype(like.dtype))


def per_token(
    x: Float[Array, "*batch"], lengths: Num[AnyArray, "*batch"]
) -> Float[Array, "*batch"]:
    """Mean over the tokens of a response from their sum; of an empty one the sum, which is 0."""
    return x / jnp.maximum(counts(lengths, x), 1.0)


def bounded(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``x``, but where ``exp(x)`` nears overflow the bound: there value and slope stand still."""
    return _bounded(x, x)


def bounded_together(x: Float[Array, "*pairs 2"]) -> Float[Array, "*pairs 2"]:
    """Both of a pair less what the larger has above the bound, so that their order stays."""
    return _bounded(x, x.max(axis=-1, keepdims=True))


@jax.custom_jvp
def grown(x: Float[Array, "*pairs 2"]) -> Float[Array, "*pairs 2"]:
    """``e^x - 1`` of a pair: near overflow values that keep the pair's order, slopes `bounded`."""
    return jnp.expm1(bounded_together(x))


grown.defjvps(lambda tangent, _, x: jnp.exp(bounded(x)) * tangent)


def _bounded(x: Array, top: Array) -> Array:
    bound = 0.9 * math.log(float(jnp.finfo(x.dtype).max))
    still, top = jax.lax.stop_gradient((x, top))
    # In this order nothing of the size of `top` is rounded away.
    value = jnp.where(top > bound, bound + (still - top), still)
    return value + jnp.where(jnp.isneginf(x), jnp.zeros_like(x), x - still)


def below_one(log_p: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """A log-probability; above ``-eps`` with value and slope at ``-eps``, so ``1 - p`` is not 0."""
    return log_p - jax.lax.stop_gradient(jax.nn.relu(log_p + jnp.finfo(log_p.dtype).eps))


def positive(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless finite and above 0."""
    return _number(name, value, like, lambda v: v > 0, "a finite number above 0")


def nonnegative(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless finite and at least 0."""
    return _number(name, value, like, lambda v: v >= 0, "a finite number, 0 or above")


def at_least_one(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless finite and at least 1."""
    return _number(name, value, like, lambda v: v >= 1, "a finite number, 1 or above")


def finite(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless finite."""
    return _number(name, value, like, lambda v: True, "a finite number")


def flip_rate(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless in [0, 0.5)."""
    return _number(name, value, like, lambda v: 0 <= v < 0.5, "a number from 0 to below 0.5")


def fraction(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless in (0, 1]."""
    return _number(name, value, like, lambda v: 0 < v <= 1, "a number above 0, at most 1")


def portion(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless in [0, 1]."""
    return _number(name, value, like, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def inner_fraction(name: str, value: Hyperparameter, like: Array) -> float | Array:
    """``value``, refused unless in (0, 1)."""
    return _number(name, value, like, lambda v: 0 < v < 1, "a number above 0 and below 1")


def _number(
    name: str, value: Hyperparameter, like: Array, accept: Callable[[float], bool], expected: str
) -> float | Array:
    """A Python float, which takes any dtype; of a traced value, which cannot be seen, a cast."""
    if isinstance(value, Tracer):
        return jnp.asarray(value, like.dtype)
    numeric = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    if not numeric or isinstance(value, bool) or np.ndim(value) != 0:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    number = float(value)
    if not math.isfinite(number) or not accept(number):
        raise ValueError(f"{name}: got {number}, expected {expected}")
    return number
