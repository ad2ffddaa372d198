"""What jax's operations say of themselves, in each of its versions.

An operation is looked into, or given a rule, only when everything that it says is known here. So a
version of jax that says something new makes the Gram slower, and never wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.extend import core

Kind = Literal["call", "checkpoint", "scan"]

VIEWS = {  # operations that move or round a parameter's entries, and what is read of them
    "transpose": ("permutation",),
    "convert_element_type": ("new_dtype",),
    "reshape": ("new_sizes",),
    "squeeze": ("dimensions",),
    "copy": (),
    "copy_p": (),
}
RULES = {  # operations that have a rule
    "dot_general": ("dimension_numbers",),
    "gather": ("dimension_numbers", "slice_sizes", "mode"),
}
CALLS = {  # where their program is; whatever else they say changes no value
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
}
CHECKPOINTS = ("checkpoint", "remat", "remat2")
SCAN = ("jaxpr", "length", "reverse", "unroll")
# What an operation may say beside that, and what none of ours depends on.
HARMLESS = {
    "checkpoint": ("differentiated",),
    # The groups of a scan's inputs are numbers before jax 0.11, and trees since.
    "scan": ("num_consts", "num_carry", "ft_in", "ft_out", "linear", "_split_transpose"),
    "convert_element_type": ("weak_type", "sharding"),
    "reshape": ("dimensions", "sharding"),
    "dot_general": ("precision", "preferred_element_type", "out_sharding"),
    "gather": ("indices_are_sorted", "unique_indices", "fill_value"),
}


class Nested(NamedTuple):
    """The program inside an operation.

    Attributes:
        kind: How often it runs, and when.
        jaxpr: With as many inputs and outputs as the operation.
        consts: Of the program.
        groups: Of a scan, how many inputs are constants, carried, and sliced.
    """

    kind: Kind
    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    groups: tuple[int, ...] = ()


def nested(equation: Any) -> Nested | None:
    """The program inside an operation of known form, or None."""
    name, params = equation.primitive.name, equation.params
    groups: tuple[int, ...] = ()
    if name in CALLS:
        kind, program = "call", params.get(CALLS[name])
    elif name in CHECKPOINTS and _says(params, ("jaxpr", "policy", "prevent_cse"), "checkpoint"):
        kind, program = "checkpoint", params["jaxpr"]
    elif name == "scan" and _says(params, SCAN, "scan"):
        kind, program, groups = "scan", params["jaxpr"], _groups(params)
        if len(groups) != 3 or sum(groups) != len(equation.invars):
            return None
    else:
        return None
    jaxpr = getattr(program, "jaxpr", program)  # of a closed program
    if not isinstance(jaxpr, core.Jaxpr):
        return None
    found = Nested(kind, jaxpr, getattr(program, "consts", ()), groups)
    sizes = len(jaxpr.invars), len(jaxpr.outvars), len(jaxpr.constvars)
    expected = len(equation.invars), len(equation.outvars), len(found.consts)
    return found if sizes == expected else None


def is_known(equation: Any, read: Mapping[str, Sequence[str]]) -> bool:
    """Whether it is one of some operations, of the form that they have in the versions known."""
    name = equation.primitive.name
    return name in read and _says(equation.params, read[name], name)


def _says(params: Mapping[str, Any], needed: Sequence[str], name: str) -> bool:
    return {*needed} <= {*params} <= {*needed, *HARMLESS.get(name, ())}


def _groups(params: Mapping[str, Any]) -> tuple[int, ...]:
    if "ft_in" in params:
        unpack = getattr(params["ft_in"], "unpack", None)
        return tuple(len(group) for group in unpack()) if unpack else ()
    if "num_consts" in params and "num_carry" in params:
        first = params["num_consts"], params["num_carry"]
        return (*first, len(params["jaxpr"].in_avals) - sum(first))
    return ()
