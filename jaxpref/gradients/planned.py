"""A function's program with a rule for each of its parameters, and the Gram it then gives."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxpref.gradients import contractions, insertion, programs, rules


class Planned:
    """The program of ``fn(params, example)``, its parameters' rules, and the places of shared ones.

    Args:
        fn: Of one array.
        params: Any pytree of floating arrays.
        example: Shapes of one.
        square: Number of examples, and of the directions that each output is pulled back along.
        metric: Weights of the parameters' entries.
        tables: Numbers of parameters that have uses outside of `fn`, which `grams` is given.

    Raises:
        ValueError: a metric of another structure or shape.
    """

    def __init__(
        self,
        fn: Callable[[PyTree, PyTree], Array],
        params: PyTree,
        example: PyTree,
        square: tuple[int, int],
        *,
        metric: PyTree | None = None,
        tables: frozenset[int] = frozenset(),
    ):
        flat, self.structure = jax.tree.flatten_with_path(params)
        self.paths = [jax.tree_util.keystr(path) for path, _ in flat]
        self.leaves = [jnp.asarray(leaf) for _, leaf in flat]
        self.square = square
        self.metric = self._checked(metric)

        def program(leaves, example):
            return fn(self.structure.unflatten(leaves), example)

        self.program = programs.trace(program, self.leaves, example)
        survey = insertion.Walk()
        jax.eval_shape(lambda x: self._evaluate(survey, [None] * len(flat), x), example)
        self.sites = survey.sites
        self.plans = insertion.plan(self.sites, len(flat), metric=metric is not None, tables=tables)
        second = insertion.Walk(self.plans)
        jax.eval_shape(lambda x: self._evaluate(second, self._rooms(), x), example)
        self.taps = second.taps

    def grams(
        self,
        examples: PyTree,
        directions: Callable[[Array, PyTree], Array],
        further: Mapping[int, Callable[[Array], contractions.Use]] | None = None,
    ) -> tuple[Array, list[Array]]:
        """Outputs ``[examples ...]``, and each parameter's part of the Gram.

        Args:
            examples: With a first axis.
            directions: ``(output, example) -> [directions ...]`` of the output's shape.
            further: Of each of the `tables`, ``outputs -> use``.
        """
        rooms = self._rooms()
        if 0 in self.square:  # no example or no output
            output: Any = self.program[0].outvars[0].aval
            outputs = jnp.zeros((self.square[0], *output.shape), output.dtype)
            return outputs, [jnp.zeros((*x.shape, *self.square), x.dtype) for x in rooms]
        slots = {place: jnp.zeros(*tap.slope()) for place, tap in self.taps.items()}

        def of_example(example):
            def forward(rooms, slots):
                walk = insertion.Walk(self.plans, slots)
                return self._evaluate(walk, rooms, example), walk.common

            output, pull, common = jax.vjp(forward, rooms, slots, has_aux=True)

            def along(direction):
                rows, slopes = pull(direction)
                own = {place: self.taps[place].own_factor(x) for place, x in slopes.items()}
                return rows, own

            pulled = jax.vmap(along, axis_name=rules.OUTPUTS)(directions(output, example))
            return output, common, *pulled

        outputs, common, rows, own = jax.vmap(of_example, axis_name=rules.EXAMPLES)(examples)
        grams = [jnp.moveaxis(row, (0, 1), (-4, -3)) for row in rows]
        for leaf, plan in enumerate(self.plans):
            if plan.rule == "shared":
                uses = [t.use(common[p], own[p]) for p, t in self.taps.items() if t.leaf == leaf]
                uses += [further[leaf](outputs)] if further and leaf in further else []
                grams[leaf] = contractions.shared(uses).astype(grams[leaf].dtype)
        return outputs, grams

    def way(self, leaf: int) -> str:
        """In a word, how the part of a parameter is found."""
        if self.plans[leaf].rule != "product":
            return self.plans[leaf].rule
        (site,) = [site for (number, _), site in self.sites.items() if number == leaf]
        rows, width_in, width_out = site.sizes or (0, 0, 0)
        n, m = self.square
        cheap = contractions.prefers_rows((n, rows, width_in), (n, m, rows, width_out))
        return "tokens" if cheap else "layer"

    def _evaluate(self, walk: insertion.Walk, rooms: list[Any], example: PyTree) -> Array:
        each = enumerate(zip(self.leaves, rooms, self.metric, strict=True))
        inputs = [
            # A parameter without entries has no gradient.
            insertion.Parameter(i, *x, axes=tuple(range(x[0].ndim))) if x[0].size else x[0]
            for i, x in each
        ]
        (output,) = walk.arrays(*self.program, [*inputs, *jax.tree.leaves(example)])
        return output

    def _rooms(self) -> list[Array]:
        """Zeros whose cotangents are the Grams, with an axis `layers` where a scan slices."""
        wide = jnp.float64 if any(x.dtype == jnp.float64 for x in self.leaves) else jnp.float32
        each = zip(self.leaves, self.plans, strict=True)
        return [jnp.zeros((*leaf.shape[: plan.depth], *self.square), wide) for leaf, plan in each]

    def _checked(self, metric: PyTree | None) -> list[Any]:
        if metric is None:
            return [None] * len(self.leaves)
        weights, structure = jax.tree.flatten(metric)
        if structure != self.structure:
            came, expected = (
                f"{type(x).__name__} of {n} arrays"
                for x, n in (
                    (metric, len(weights)),
                    (self.structure.unflatten(self.leaves), len(self.leaves)),
                )
            )
            raise ValueError(f"metric: got a {came}, expected the parameters' {expected}")
        for path, weight, leaf in zip(self.paths, weights, self.leaves, strict=True):
            if jnp.shape(weight) != leaf.shape:
                raise ValueError(f"metric{path}: got {jnp.shape(weight)}, expected {leaf.shape}")
        return [jnp.asarray(weight) for weight in weights]
