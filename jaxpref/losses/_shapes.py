"""Arguments held to the shapes of their signature, before anything of them can broadcast.

Shapes are static: a compiled program holds nothing of this, and under ``jit`` the refusal comes
while it is traced. The annotations of jaxtyping are the one place where a shape is written down.
"""

import functools
import sys
import typing
from collections.abc import Callable, Sequence
from types import FunctionType, UnionType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

KINDS = {
    Bool: (jnp.bool_, "booleans"),
    Float: (jnp.floating, "floating numbers"),
    Int: (jnp.integer, "integers"),
    Num: (jnp.number, "numbers"),
}
MAY_BE_EMPTY = ("pairs", "examples", "response", "time", "other_time")  # and every ``*name``


def hold(room: str) -> None:
    """Puts `held` around every public function of a package, there and in the file it is from."""
    package = sys.modules[room]
    for name, function in [*vars(package).items()]:
        if isinstance(function, FunctionType) and function.__module__.startswith(f"{room}."):
            checked = held(function)
            for module in (package, sys.modules[function.__module__]):
                setattr(module, name, checked)


def held(function: Callable) -> Callable:
    """The function, refusing arrays of other axes or another kind of numbers than it annotates.

    An axis of a name has one size throughout a call, ``*name`` stands for any number of axes, a
    number for itself.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if name != "return"}

    @functools.wraps(function)
    def checked(*args, **keywords):
        given, axes = {**dict(zip(hints, args, strict=False)), **keywords}, {}
        for name, hint in hints.items():
            if name in given:
                axes = _bound(name, given[name], hint, axes)
        return function(*args, **keywords)

    return checked


def _bound(name: str, value: Any, hint: Any, axes: dict) -> dict:
    """The sizes of axes known so far, with those of this argument; refused if they differ."""
    if isinstance(value, tuple) and hasattr(hint, "_fields"):
        for field, part in zip(hint._fields, value, strict=True):
            axes = _bound(f"{name}.{field}", part, hint.__annotations__[field], axes)
        return axes
    dims, kinds = _read(hint)
    is_list = isinstance(value, list | tuple)
    if dims is None or not (is_list or hasattr(value, "shape")):
        return axes
    try:
        array: Any = jnp.asarray(value) if is_list else value
    except (TypeError, ValueError):
        got = f"{name}: got a {type(value).__name__} that is no array"
        raise ValueError(f"{got}, expected {_shown(dims, axes)}") from None
    shape, dtype = tuple(array.shape), getattr(array, "dtype", None)
    found = _matched(dims, shape, axes)
    if found is None:
        raise ValueError(f"{name}: got shape {shape}, expected {_shown(dims, axes)}")
    for dim in dims:
        if found.get(dim) == 0 and dim not in MAY_BE_EMPTY:
            expected = f"{_shown(dims, axes)} with {dim} above 0"
            raise ValueError(f"{name}: got shape {shape}, expected {expected}")
    is_number = isinstance(dtype, np.dtype) and not (is_list and array.size == 0)
    if is_number and not _is_of(dtype, kinds):
        expected = " or ".join(KINDS[kind][1] for kind in kinds)
        raise ValueError(f"{name}: got {dtype}, expected {expected}")
    return found


@functools.cache
def _read(hint: Any) -> tuple[tuple[str, ...] | None, tuple]:
    """Axes and kinds of numbers of an annotation; of one that is no array, None."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    parts = typing.get_args(hint) if union else (hint,)
    arrays = [part for part in parts if getattr(part, "dtype", None) in KINDS]
    if not arrays:
        return None, ()
    (axes,) = {part.dim_str for part in arrays}
    return tuple(axes.split()), tuple(dict.fromkeys(part.dtype for part in arrays))


@functools.cache
def _is_of(dtype: np.dtype, kinds: tuple) -> bool:
    return any(jnp.issubdtype(dtype, KINDS[kind][0]) for kind in kinds)


def _matched(dims: Sequence[str], shape: tuple[int, ...], axes: dict) -> dict | None:
    """``axes`` and what this shape says of others, or None where it does not fit."""
    star = next((i for i, dim in enumerate(dims) if dim[0] == "*"), None)
    if len(shape) < len(dims) - (star is not None) or (star is None and len(shape) > len(dims)):
        return None
    sizes: list = list(shape)
    if star is not None:
        end = len(shape) - (len(dims) - star - 1)
        sizes[star:end] = [shape[star:end]]
    found = dict(axes)
    fits = [
        (int(dim) if dim.isdigit() else found.setdefault(dim, size)) == size
        for dim, size in zip(dims, sizes, strict=True)
    ]
    return found if all(fits) else None


def _shown(dims: Sequence[str], axes: dict) -> str:
    """The shape that was expected, with the sizes that are known."""
    words = []
    for dim in dims:
        size = axes.get(dim, dim)
        words += map(str, size) if isinstance(size, tuple) else [str(size)]
    return f"({', '.join(words)}{',' * (len(words) == 1)})" if words else "one number"
