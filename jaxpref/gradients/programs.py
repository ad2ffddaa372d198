"""Traced programs: tracing, evaluating one equation, and the matrix form of its operands.

The only module that reads jax's program representation, with `insertion` and `forms`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval
from jaxtyping import Array

from jaxpref.gradients import forms

Rule = Literal["product", "rows"]
Mode = jax.lax.GatherScatterMode
MODES = (Mode.CLIP, Mode.FILL_OR_DROP, Mode.PROMISE_IN_BOUNDS)


def trace(fn: Callable, *arguments: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The program of a function, without what its output does not need, and its constants."""
    closed = jax.make_jaxpr(fn)(*arguments)
    needed = [True] * len(closed.jaxpr.outvars)
    # A model that hands all its parameters through a scan would otherwise use them all there.
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, needed, instantiate=True)
    return jaxpr, closed.consts


def bind(jaxpr: core.Jaxpr, equation: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation of a program: jax's own evaluation of a program of it alone."""
    inputs = {
        atom: value
        for atom, value in zip(equation.invars, values, strict=True)
        if not isinstance(atom, core.Literal)
    }
    outputs = [v for v in equation.outvars if not _dropped(v)]
    names = {"arg_names": ("",) * len(inputs), "result_paths": ("",) * len(outputs)}
    alone = jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=outputs,
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info._replace(**names),
    )
    found = iter(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values()))
    return [None if _dropped(v) else next(found) for v in equation.outvars]


def _dropped(variable: Any) -> bool:
    return type(variable).__name__ == "DropVar"


def rule_of(equation: Any, operand: int) -> Rule | None:
    """The rule of this operation with a parameter as operand, if it has one."""
    if not forms.is_known(equation, forms.RULES):
        return None
    if equation.primitive.name == "dot_general":
        _, batch = equation.params["dimension_numbers"]
        real = all(_is_floating(v) for v in (*equation.invars, *equation.outvars))
        return "product" if real and not any(batch) else None
    return "rows" if operand == 0 and _reads_rows(equation) else None


def is_view(equation: Any) -> bool:
    """Whether it moves or rounds the entries of its operand, which keep their derivatives."""
    return forms.is_known(equation, forms.VIEWS) and _is_floating(equation.outvars[0])


def _is_floating(variable: Any) -> bool:
    """A derivative by complex numbers is another one, and by integers there is none."""
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def _reads_rows(equation: Any) -> bool:
    params, (table, ids) = equation.params, (v.aval.shape for v in equation.invars)
    numbers, out = params["dimension_numbers"], equation.outvars[0].aval.shape
    return (
        len(table) == 2
        and ids[-1] == 1
        and params["mode"] in MODES
        and params["slice_sizes"] == (1, table[1])
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and numbers.offset_dims == (len(out) - 1,)
    )


def contracted(equation: Any, operand: int) -> Sequence[int]:
    """The axes that a product sums over, of one of its operands."""
    return equation.params["dimension_numbers"][0][operand]


def common_factor(equation: Any, operand: int, other: Array) -> Array:
    """The operand beside the parameter: ``[rows in]``, or the ids of rows that were read."""
    if equation.primitive.name == "gather":
        ids, height = other.reshape(-1), equation.invars[0].aval.shape[0]
        last = min(height - 1, jnp.iinfo(ids.dtype).max)  # of a small or unsigned dtype, too
        if equation.params["mode"] == Mode.CLIP:
            return jnp.clip(ids, 0, last).astype(jnp.int32)
        return jnp.where((ids >= 0) & (ids <= last), ids.astype(jnp.int32), -1)
    return _matrix(other, last=contracted(equation, 1 - operand))


def own_factor(equation: Any, operand: int, slope: Array) -> Array:
    """The slope of the output as ``[rows out]``."""
    if equation.primitive.name == "gather":
        return _matrix(slope, last=[slope.ndim - 1])
    kept = equation.invars[operand].aval.ndim - len(contracted(equation, operand))
    first = slope.ndim - kept if operand == 1 else 0
    return _matrix(slope, last=range(first, first + kept))


def in_matrix_form(equation: Any, operand: int, metric: Array) -> Array:
    """Weights of a parameter's entries as ``[in out]``; a table that is read stays as it is."""
    if equation.primitive.name == "gather":
        return metric
    axes = contracted(equation, operand)
    return _matrix(metric, last=[i for i in range(metric.ndim) if i not in axes], first=axes)


def _matrix(x: Array, *, last: Sequence[int], first: Sequence[int] | None = None) -> Array:
    """Two groups of axes as two axes."""
    first = [i for i in range(x.ndim) if i not in last] if first is None else first
    sizes = [math.prod(x.shape[i] for i in group) for group in (first, last)]
    return x.transpose(*first, *last).reshape(sizes)
