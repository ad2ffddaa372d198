"""`jaxpref.gradients.forms`: an operation of a form that is not known costs time, and no digit."""

import jax
import jax.numpy as jnp
import pytest
from grams import check
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jaxpref import gradients
from jaxpref.gradients import forms

X = jax.random.normal(jax.random.key(0), (3, 5, 4), jnp.float64)
W = jax.random.normal(jax.random.key(2), (4, 4), jnp.float64)
LAYERS = jax.random.normal(jax.random.key(3), (3, 4, 4), jnp.float64)
NAMES = sorted({*forms.VIEWS, *forms.RULES, *forms.CALLS, *forms.CHECKPOINTS, "scan"})


def of_the_future(name):
    """An operation that doubles, has the name of another, and says something new."""
    operation = core.Primitive(name)

    def double(x, *, form):
        return 2 * x

    operation.def_impl(double)
    operation.def_abstract_eval(lambda x, *, form: x)
    ad.deflinear2(operation, lambda slope, x, *, form: [operation.bind(slope, form=form)])
    batching.defvectorized(operation)
    mlir.register_lowering(operation, mlir.lower_fun(double, multiple_results=False))
    return lambda x: operation.bind(x, form="new")


def test_operations_that_say_something_new_take_the_whole_gradient():
    doubles = {name: of_the_future(name) for name in NAMES}
    params = {name: W * 0.9**i for i, name in enumerate(NAMES)}

    def logp_fn(params, x):
        return sum(jnp.tanh(x @ double(params[name])).sum() for name, double in doubles.items())

    rules = gradients.explain(logp_fn, params, X)
    assert rules == {f"['{name}']": "gradient" for name in NAMES}
    check(logp_fn, params, X)


def uses(params, x):
    scanned = jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, params["scan"])[0]
    saved = jax.checkpoint(lambda x, W: jnp.tanh(x @ W).sum())(x, params["checkpoint"])
    return scanned.sum() + saved + jnp.tanh(x @ params["product"]).sum()


@pytest.mark.parametrize("lost", [False, True])
def test_operations_that_lack_something_take_the_whole_gradient(lost, monkeypatch):
    """As they are, and as they look to somebody who knows another version of them."""
    if lost:
        monkeypatch.setattr(forms, "SCAN", (*forms.SCAN, "stride"))
        monkeypatch.setattr(forms, "CHECKPOINTS", ())
        monkeypatch.setitem(forms.HARMLESS, "dot_general", ())
    params = {"scan": LAYERS, "checkpoint": W, "product": W}
    rules = gradients.explain(uses, params, X).values()
    assert [rule == "gradient" for rule in rules] == [lost] * 3
    check(uses, params, X)


class Trees(tuple):
    """As jax 0.11 has them."""

    def unpack(self):
        return self


@pytest.mark.parametrize(
    ("said", "groups"),
    [
        ({"num_consts": 1, "num_carry": 2}, (1, 2, 1)),
        ({"ft_in": Trees([(0,), (0, 0), (0,)])}, (1, 2, 1)),
        ({"ft_in": Trees([(0,), (0, 0)])}, None),  # two groups
        ({"ft_in": Trees([(0,), (0, 0), (0, 0)])}, None),  # of more inputs than there are
        ({"ft_in": (1, 2, 1)}, None),
        ({"num_consts": 1}, None),
        ({"ft_in": Trees([(0,), (0, 0), (0,)]), "stride": 2}, None),
    ],
)
def test_groups_of_a_scan(said, groups):
    def scan_of_four(w, start, x):
        return jax.lax.scan(lambda c, x: ((c[1] * w, c[0] + x), None), start, x)

    program = jax.make_jaxpr(scan_of_four)(2.0, (1.0, 1.0), jnp.ones(3)).jaxpr
    (equation,) = (e for e in program.eqns if e.primitive.name == "scan")
    own = forms.nested(equation)
    assert own is not None and own.groups == (1, 2, 1)  # noqa: PT018
    asked = {"num_consts", "num_carry", "ft_in", "ft_out"}
    params = {k: v for k, v in equation.params.items() if k not in asked} | said
    found = forms.nested(equation.replace(params=params))
    assert (found and found.groups) == groups
