"""Walks a traced program and lets its parameters' Gram contributions out of the backward pass.

Where a parameter meets data in a matrix product or as a table that rows are read from, the
operation is replaced by one of `rules`. A parameter used in any other way is wrapped once, whole.

The programs of nested jits and checkpoints are walked, and those of scans over stacked parameters;
a parameter that enters anything else (a loop, a branch, a function with derivatives of its own)
counts as used in another way. So nothing is left out, known or not; only the cost depends on it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from jaxpref.gradients import contractions, forms, programs, rules

Path = tuple[int, ...]  # the equations that a place in the program lies in, outermost first
Scope = tuple[tuple[str, int], ...]  # those of them that are scans or checkpoints


class Site(NamedTuple):
    """A place where a parameter is used.

    Attributes:
        kind: What is done with it.
        scope: Where.
        flips: Of a table: whether a product sums over its second axis; None if that is not known.
        sizes: ``(rows, in, out)`` of a product.
    """

    kind: programs.Rule | Literal["other"]
    scope: Scope
    flips: bool | None = None
    sizes: tuple[int, int, int] | None = None


class Plan(NamedTuple):
    """What is done with one parameter, and in which scope."""

    rule: Literal["product", "rows", "shared", "gradient", "unused"]
    scope: Scope = ()

    @property
    def depth(self) -> int:
        """Number of the parameter's axes that scans have sliced off there."""
        return sum(kind == "scan" for kind, _ in self.scope)


class Tap(NamedTuple):
    """A place where a parameter of rule ``shared`` is used."""

    leaf: int
    equation: Any
    operand: int
    flips: bool

    def slope(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of the output."""
        output = self.equation.outvars[0].aval
        return output.shape, output.dtype

    def own_factor(self, slope: Array) -> Array:
        """The cotangent of the tap as a factor."""
        return programs.own_factor(self.equation, self.operand, slope)

    def use(self, common: Array, own: Array) -> contractions.Use:
        """Both factors, each as rows or columns of the table."""
        if self.flips:
            return contractions.Use(own, common, "rows")
        return contractions.Use(common, own, "columns")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter, one layer's slice of a stacked one, or a view of either, in a program.

    Attributes:
        leaf: Its number.
        value: The array.
        room: Zeros whose cotangent is the Gram.
        metric: Weights of the entries, of the shape of `value`, or None.
        axes: Which axis of the parameter each axis of the value is; None if that is lost.
    """

    leaf: int
    value: Any
    room: Any = None
    metric: Any = None
    axes: tuple[int, ...] | None = None


@dataclasses.dataclass
class Walk:
    """One walk through a program: without plans it lists the sites, with plans it replaces them.

    Attributes:
        plans: Of each parameter.
        room: Zeros by place, whose cotangents are the slopes at shared parameters.
        sites: Found on the way, by parameter and place.
        taps: Found on the way, by place, and
        common: the factors of their examples.
    """

    plans: Sequence[Plan] | None = None
    room: Mapping[Path, Array] = dataclasses.field(default_factory=dict)
    sites: dict[tuple[int, Path], Site] = dataclasses.field(default_factory=dict)
    taps: dict[Path, Tap] = dataclasses.field(default_factory=dict)
    common: dict[Path, Array] = dataclasses.field(default_factory=dict)

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Any],
        at: Path = (),
        scope: Scope = (),
    ) -> list[Any]:
        """The outputs of a program; inputs and outputs may be `Parameter`."""
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        for variable, value in zip(jaxpr.invars, inputs, strict=True):
            known[variable] = self._entering(value, scope)

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            outputs = self._equation(jaxpr, equation, values, (*at, id(equation)), scope)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def arrays(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Any],
        at: Path = (),
        scope: Scope = (),
    ) -> list[Any]:
        """`run` of a program all of whose outputs are wanted as arrays."""
        outputs = self.run(jaxpr, consts, inputs, at, scope)
        return [self._plain(value, (*at, -1 - i), scope) for i, value in enumerate(outputs)]

    def _entering(self, value: Any, scope: Scope) -> Any:
        """In the scope of its plan a parameter of rule ``gradient`` becomes an array."""
        if self.plans is None or not isinstance(value, Parameter):
            return value
        if self.plans[value.leaf] == Plan("gradient", scope):
            return rules.whole(value.value, value.room, value.metric)
        return value

    def _plain(self, value: Any, place: Path, scope: Scope) -> Any:
        """A value as an array, for an operation that has no rule."""
        if not isinstance(value, Parameter):
            return value
        assert self.plans is None, f"parameter {value.leaf} meets an operation without a rule"
        self.sites[value.leaf, place] = Site("other", scope)
        return value.value

    def _once(self, values: Sequence[Any], place: Path, scope: Scope) -> list[Any]:
        """Inputs of a nested scope: what enters it twice has its uses summed outside of it."""
        leaves = [v.leaf for v in values if isinstance(v, Parameter)]
        twice = {leaf for leaf in leaves if leaves.count(leaf) > 1}
        return [
            self._plain(v, place, scope) if isinstance(v, Parameter) and v.leaf in twice else v
            for v in values
        ]

    def _equation(self, jaxpr, equation, values, here: Path, scope: Scope) -> list[Any]:
        at = [i for i, value in enumerate(values) if isinstance(value, Parameter)]
        if not at:
            return programs.bind(jaxpr, equation, values)
        if programs.is_view(equation) and len(values) == 1:
            return [_view(jaxpr, equation, values[0])]
        inner = forms.nested(equation)
        if inner is not None and inner.kind == "call":
            return self.run(inner.jaxpr, inner.consts, values, here, scope)
        if inner is not None:
            nested = self._checkpoint if inner.kind == "checkpoint" else self._scan
            return nested(equation.params, inner, values, here, scope)
        if len(at) == 1 and programs.rule_of(equation, at[0]):
            return [self._site(jaxpr, equation, values, at[0], here, scope)]
        return programs.bind(jaxpr, equation, [self._plain(v, here, scope) for v in values])

    def _site(self, jaxpr, equation, values, operand: int, here: Path, scope: Scope) -> Array:
        parameter, beside = values[operand], equation.invars[1 - operand].aval
        other = jnp.asarray(values[1 - operand], beside.dtype)  # it may be a number

        def call(other, value):
            both = (other, value) if operand == 1 else (value, other)
            return programs.bind(jaxpr, equation, both)[0]

        flips = _flips(equation, operand, parameter)
        if self.plans is None:
            kind = programs.rule_of(equation, operand) or "other"
            self.sites[parameter.leaf, here] = Site(kind, scope, flips, _sizes(equation, operand))
            return call(other, parameter.value)
        if self.plans[parameter.leaf].rule != "shared":
            room, metric = parameter.room, parameter.metric
            return rules.contracted(call, equation, operand, other, parameter.value, room, metric)
        self.taps[here] = Tap(parameter.leaf, equation, operand, bool(flips))
        self.common[here] = programs.common_factor(equation, operand, other)
        if here not in self.room:
            return call(other, parameter.value)
        return rules.tapped(call, other, parameter.value, self.room[here])

    def _checkpoint(
        self, params, inner: forms.Nested, values, here: Path, scope: Scope
    ) -> list[Any]:
        inside = (*scope, ("checkpoint", here[-1]))
        arrays, rebuild = _apart(self._once(values, here, scope))

        def program(*arrays):
            return self.arrays(inner.jaxpr, inner.consts, rebuild(arrays), at=here, scope=inside)

        # It may be a choice for each input; there are others now, and True is right for all.
        apart = params["prevent_cse"] is not False
        return jax.checkpoint(program, policy=params["policy"], prevent_cse=apart)(*arrays)

    def _scan(self, params, inner: forms.Nested, values, here: Path, scope: Scope) -> list[Any]:
        """Parameters that the scan slices keep their rules inside; others are used whole."""
        consts, carries, _ = inner.groups
        before = [self._plain(v, here, scope) for v in values[: consts + carries]]
        sliced = self._once(values[consts + carries :], here, scope)
        arrays, rebuild = _apart(
            [v if _stacked(v) else self._plain(v, here, scope) for v in sliced]
        )
        inside = (*scope, ("scan", here[-1]))

        def body(carry, arrays):
            inputs = [*before[:consts], *carry, *map(_slice_of, rebuild(arrays))]
            outputs = self.arrays(inner.jaxpr, inner.consts, inputs, at=here, scope=inside)
            return outputs[:carries], outputs[carries:]

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, stacked = jax.lax.scan(body, before[consts:], arrays, **options)
        return [*carry, *stacked]


def plan(
    sites: Mapping[tuple[int, Path], Site], leaves: int, *, metric: bool, tables: frozenset[int]
) -> list[Plan]:
    """What is done with each parameter, from the places where it is used."""
    found = [[site for (leaf, _), site in sites.items() if leaf == i] for i in range(leaves)]
    return [
        _plan_one(each, metric=metric, used_elsewhere=i in tables) for i, each in enumerate(found)
    ]


def _plan_one(sites: Sequence[Site], *, metric: bool, used_elsewhere: bool) -> Plan:
    if used_elsewhere and _are_tables(sites):
        return Plan("shared")
    if not sites:
        return Plan("unused")
    scope = _common([site.scope for site in sites])
    if len(sites) == 1 and sites[0].kind != "other":
        return Plan(sites[0].kind, scope)
    # A metric weights the sum of the uses: that is formed first.
    return Plan("shared") if _are_tables(sites) and not metric else Plan("gradient", scope)


def _are_tables(sites: Sequence[Site]) -> bool:
    return all(site.flips is not None and site.scope == () for site in sites)


def _common(scopes: Sequence[Scope]) -> Scope:
    """The innermost scope that holds all of them."""
    common = scopes[0]
    while any(scope[: len(common)] != common for scope in scopes):
        common = common[:-1]
    return common


def _sizes(equation: Any, operand: int) -> tuple[int, int, int] | None:
    if equation.primitive.name == "gather":
        return None
    other, out = equation.invars[1 - operand].aval, equation.outvars[0].aval
    inputs = jax.eval_shape(lambda x: programs.common_factor(equation, operand, x), other)
    slopes = jax.eval_shape(lambda x: programs.own_factor(equation, operand, x), out)
    return (*inputs.shape, slopes.shape[1])


def _flips(equation: Any, operand: int, parameter: Parameter) -> bool | None:
    axes = parameter.axes
    if axes is None or len(axes) != 2:
        return None
    if equation.primitive.name == "gather":
        return False if axes == (0, 1) else None
    contracted = programs.contracted(equation, operand)
    return axes[contracted[0]] == 1 if len(contracted) == 1 else None


def _view(jaxpr: core.Jaxpr, equation: Any, parameter: Parameter) -> Parameter:
    """A parameter after an operation that only moves or rounds its entries."""
    name, axes, metric = equation.primitive.name, parameter.axes, parameter.metric
    (value,) = programs.bind(jaxpr, equation, [parameter.value])
    if name == "transpose" and axes is not None:
        axes = tuple(axes[i] for i in equation.params["permutation"])
    elif name in ("reshape", "squeeze"):
        axes = None
    if metric is not None and name != "convert_element_type":
        (metric,) = programs.bind(jaxpr, equation, [metric])
    return dataclasses.replace(parameter, value=value, metric=metric, axes=axes)


def _stacked(value: Any) -> bool:
    """Whether a slice of it is a slice of the parameter itself, along its next axis."""
    axes = value.axes if isinstance(value, Parameter) else (0,)
    return axes is not None and axes[0] == min(axes)


def _slice_of(value: Any) -> Any:
    """A scan's slice of a stacked parameter, without the axis that is gone."""
    if not isinstance(value, Parameter) or value.axes is None:
        return value
    return dataclasses.replace(value, axes=value.axes[1:])


def _apart(values: Sequence[Any]):
    """The arrays in some values, and a function that puts such arrays back in their places."""
    parts = [(v.value, v.room, v.metric) if isinstance(v, Parameter) else v for v in values]
    arrays, structure = jax.tree.flatten(parts)

    def rebuild(arrays):
        def back(value, part):
            if not isinstance(value, Parameter):
                return part
            new = dict(zip(("value", "room", "metric"), part, strict=True))
            return dataclasses.replace(value, **new)

        return [back(*both) for both in zip(values, structure.unflatten(arrays), strict=True)]

    return arrays, rebuild
