"""A module's functions as tests call them most cheaply."""

import inspect
import types

import jax
import numpy as np


def functions(module, *names):
    """The module with these functions jitted (by default all): one program a shape of arrays.

    Op by op, each operation of each shape is a program of its own. NumPy arrays come back.
    """
    jitted = names or [name for name, x in vars(module).items() if inspect.isfunction(x)]
    return types.SimpleNamespace(
        **vars(module) | {name: _compiled(getattr(module, name)) for name in jitted}
    )


def _compiled(function):
    program = jax.jit(function)

    def call(*arrays):
        return jax.tree.map(_numpy, program(*arrays))

    return call


def _numpy(x):
    return x if isinstance(x, jax.core.Tracer) else np.asarray(x)
