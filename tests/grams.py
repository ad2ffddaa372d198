"""A Gram matrix the plain way, the fast one held against it, and what a program holds."""

import functools

import jax
import numpy as np
from jax.extend import core

from jaxpref import gradients


def slopes(logp_fn, params, examples, derivative=jax.jacrev):
    """Gradients of all examples, each in the structure of the parameters."""
    return jax.jit(jax.vmap(derivative(logp_fn), (None, 0)))(params, examples)


def naive(jacobian, params, weights=None):
    """Gram of flattened gradients ``[examples outputs entries]``."""
    leaves = list(zip(jax.tree.leaves(jacobian), jax.tree.leaves(params), strict=True))
    rows = [np.reshape(g, (len(g), -1, leaf.size)) for g, leaf in leaves]
    flat, scale = np.concatenate(rows, axis=2), np.ones(())
    if weights is not None:
        scale = np.concatenate([np.ravel(x) for x in jax.tree.leaves(weights)])
    return np.einsum("iap,jbp->iajb", flat * scale, flat)


def check(logp_fn, params, examples, metric=None, jacobian=None, fast=None):
    """Fast against naive; returns what was found. What is compiled already may be given."""
    fast = fast or jax.jit(functools.partial(gradients.gram, logp_fn))
    jacobian = slopes(logp_fn, params, examples) if jacobian is None else jacobian
    found = fast(params, examples, metric=metric)
    expected = naive(jacobian, params, metric).reshape(found.gram.shape)
    # Of float64: 1e-9 of the largest entry, four digits above the rounding of the longest sums.
    np.testing.assert_allclose(found.gram, expected, rtol=1e-9, atol=1e-9 * abs(expected).max())
    return found


def largest_array(fn, *args):
    """Number of elements of the largest intermediate of a function and its inner functions."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield variable.aval.size
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if isinstance(inner, core.Jaxpr):
                    yield from walk(inner)

    return max(walk(jax.make_jaxpr(fn)(*args).jaxpr))
