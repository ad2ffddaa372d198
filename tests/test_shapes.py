"""Every public function refuses arrays of other axes than its signature's, by name, in one line."""

import importlib
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Bool, Float, Int, Num

from jaxpref import losses
from jaxpref.losses import _shapes
from jaxpref.training.mitigations import Calibration

ROOMS = ("losses", "diagnostics", "embeddings", "training.mitigations")
FUNCTIONS = {
    f"{room}.{name}": function
    for room in ROOMS
    for name, function in vars(importlib.import_module(f"jaxpref.{room}")).items()
    if inspect.isfunction(function)
}
DTYPES = {Float: (float, int), Int: (int, float), Num: (float, bool), Bool: (bool, int)}
OTHERS = {  # arguments that are no arrays
    "before": Calibration(),
    "change": jnp.negative,
    "chosen": 0,
    "generator": jnp.square,
    "key": jax.random.key(0),
    "lam": 0.5,
    "logp_fn": lambda params, x: params @ x,
    "loss": lambda x: x.sum(axis=-1),
    "now": Calibration(),
    "pairs": jnp.zeros((3, 2, 4)),
    "params": jnp.zeros(4),
    "rejected": 1,
    "state": losses.RunningMean(jnp.zeros(()), jnp.zeros(())),
    "to": Calibration(),
}
NOT_TRACED = ("embeddings.edit_similarity", "training.mitigations.contrast_mask")


def arrays_of(function):
    """Name, axes and kinds of each array that a function takes; hyperparameters have defaults."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        dims, kinds = _shapes._read(parameter.annotation)
        if parameter.default is parameter.empty and (dims or (dims == () and name not in OTHERS)):
            found[name] = dims, kinds
    return found


def arguments(function):
    """Arrays of the right axes, one axis for ``*name``, and what else the function needs."""
    given, sizes = {}, {}
    for name, (dims, kinds) in arrays_of(function).items():
        shape = [int(d) if d.isdigit() else sizes.setdefault(d, 3 + len(sizes)) for d in dims]
        given[name] = np.ones(shape, DTYPES[kinds[0]][0])
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name not in given:
            given[name] = OTHERS[name]
    return given


def wrong(function, given):
    """Each way in which one array can be wrong: which, the array, and who else has the axis."""
    arrays = arrays_of(function)
    for name, (dims, kinds) in arrays.items():
        array = given[name]
        has_star = any(d[0] == "*" for d in dims)
        for axis, dim in enumerate(dims):
            sharing = [n for n, (other, _) in arrays.items() if dim in other and n != name]
            if dim.isdigit() or sharing or dims.count(dim) > 1:
                shape = [n + (i == axis) for i, n in enumerate(array.shape)]
                yield name, np.ones(shape, array.dtype), [] if dim.isdigit() else sharing
            if dim[0] != "*" and not dim.isdigit() and dim not in _shapes.MAY_BE_EMPTY:
                yield name, array.take([], axis=axis), []
            if dim[0] == "*" and sharing:
                yield name, array[None], sharing
                yield name, array[0], sharing
        if not has_star:
            yield name, array[None], []
        if dims and not dims[-1].startswith("*"):
            yield name, np.ones((), array.dtype), []
        yield name, array.astype(complex if len(kinds) > 1 else DTYPES[kinds[0]][1]), []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_of_other_axes_are_refused_by_name_with_and_without_jit(name):
    function = FUNCTIONS[name]
    given = arguments(function)
    order = list(given)
    if name not in NOT_TRACED:
        right = {**given}
        for k, (dims, _) in arrays_of(function).items():  # the right ones pass, of no pairs, too
            star = [i for i, dim in enumerate(dims) if dim[0] == "*"]
            right[k] = given[k].take([], axis=star[0]) if star else given[k]
        static = {k: v for k, v in right.items() if k not in arrays_of(function)}
        traced = {k: v for k, v in right.items() if k not in static}
        jax.eval_shape(lambda arrays: function(**arrays, **static), traced)

    def traces(arrays, static):
        return jax.eval_shape(lambda arrays: function(**arrays, **static), arrays)

    cases = list(wrong(function, given))
    assert cases or not arrays_of(function)
    for bad, array, sharing in cases:
        other = {**given, bad: array}
        static = {k: v for k, v in other.items() if k not in arrays_of(function)}
        arrays = {k: v for k, v in other.items() if k not in static}
        for call in (lambda o=other: function(**o), lambda a=arrays, s=static: traces(a, s)):
            with pytest.raises(ValueError, match=": got") as caught:
                call()
            assert re.fullmatch(r"[\w.]+: got .*, expected .*", str(caught.value))
            blamed = str(caught.value).partition(":")[0]
            later = [n for n in sharing if order.index(n) > order.index(bad)]
            assert blamed == bad or (blamed in later and not set(sharing) - set(later))


@pytest.mark.parametrize("room", ROOMS)
def test_it_holds_for_functions_taken_from_their_own_files(room):
    held = {k: v for k, v in FUNCTIONS.items() if k.startswith(room)}
    assert held
    for function in held.values():
        file = sys.modules[function.__module__]
        assert getattr(file, function.__name__) is function
        public = [
            name
            for name, value in vars(file).items()
            if inspect.isfunction(value) and value.__module__ == file.__name__ and name[0] != "_"
        ]
        unknown = [name for name in public if f"{room}.{name}" not in FUNCTIONS]
        assert set(unknown) <= {"wide"}, "public, but not of the room: who checks its shapes?"


def test_a_compiled_program_holds_nothing_of_the_check():
    logp = jnp.zeros((3, 2))
    plain = inspect.unwrap(losses.dpo)
    assert str(jax.make_jaxpr(losses.dpo)(logp, logp)) == str(jax.make_jaxpr(plain)(logp, logp))


LOGP = np.zeros((5, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.dpo(LOGP.T, LOGP.T), "logp: got shape (2, 5), expected (*pairs, 2)"),
        (lambda: losses.dpo(LOGP, LOGP[0]), "reference: got shape (2,), expected (5, 2)"),
        (lambda: losses.simpo(LOGP, LOGP[:, 0]), "lengths: got shape (5,), expected (5, 2)"),
        (lambda: losses.dpo(LOGP, reference=LOGP[:1]), "reference: got shape (1, 2), expected (5,"),
        (lambda: losses.dpo([-3, -5], LOGP[0]), "logp: got int64, expected floating numbers"),
        (lambda: losses.dpo([-3.0], [-3.0]), "logp: got shape (1,), expected (*pairs, 2)"),
        (lambda: losses.sft(LOGP.astype("int32")), "logp: got int32, expected floating numbers"),
        (lambda: losses.simpo(LOGP, LOGP > 0), "lengths: got bool, expected numbers"),
        (lambda: losses.kto(LOGP[0], LOGP[0], LOGP[0] > 0, LOGP[0]), "kl_baseline: got shape (2,)"),
        (lambda: jax.jit(losses.dpo)(LOGP, LOGP, beta=jnp.ones(5)), "beta: got shape (5,), "),
        (
            lambda: losses.bco_running_mean(
                losses.RunningMean(jnp.zeros(()), jnp.zeros(2)), LOGP[0], LOGP[0]
            ),
            "state.count: got shape (2,), expected one number",
        ),
    ],
)
def test_the_line_says_what_came_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@_shapes.held
def mean(x: losses.sft.__annotations__["logp"], lengths: losses._inputs.Hyperparameter) -> None:
    return np.mean(x) / lengths


def test_lists_and_plain_numbers_pass():
    assert mean([[1.0, 3.0]], 2) == mean(2.0, lengths=np.float32(2)) == 1
    assert mean(np.zeros(1, jnp.bfloat16), 2) == 0
    for x, got in ([1], "int64"), ([True], "bool"), (np.ones(1, complex), "complex128"):
        with pytest.raises(ValueError, match=f"x: got {got}, expected floating numbers"):
            mean(x, 2)
    for x in ([1.0, [2.0]], [None]):
        with pytest.raises(ValueError, match="x: got a list that is no array, expected"):
            mean(x, 2)
    with pytest.raises(ValueError, match=r"lengths: got shape \(2,\), expected one number"):
        mean(2.0, [1, 1])
