"""`jaxpref.losses`: worked points, derivatives, edges; the catalogue and its page agree.

What each loss should be besides its numbers is in `test_loss_laws`.
"""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels
import test_tokenwise
import test_unpaired
from loss_points import DATA, LENGTHS, ONES, POINTS, REFERENCE, A, Point, bound

from jaxpref import losses
from jaxpref.losses import __main__ as docs

NAMES = sorted({point.name for point in POINTS})
UNPAIRED = ("sft", "sft_token_mean", "kto")
BY_TOKEN = ("confpo",)
ONE_SIDED = {"logic_ce": 1, "logic_unl": 0}  # the response that is not read
DETACHED = ("aft_boundary", "aft_detached")  # their pull is not the derivative of their value
ABSOLUTE = ("h_dpo", "rpo", "rpo_token_mean")  # read more than log-ratios
WITH_REFERENCE = [n for n in NAMES if "reference" in bound(n).keywords]
HYPERPARAMETERS = [
    (name, p.name, p.default)
    for name in NAMES
    for p in inspect.signature(getattr(losses, name)).parameters.values()
    if p.kind is p.KEYWORD_ONLY
]


def label(point):
    settings = ",".join(f"{k}={v}" for k, v in point.arguments.items())
    return f"{point.name}({settings}){'A' if point.logp is A else 'B'}"


def settings(point):
    """Every hyperparameter at a point."""
    read = inspect.signature(getattr(losses, point.name)).parameters.values()
    defaults = {p.name: p.default for p in read if p.kind is p.KEYWORD_ONLY}
    return {k: float(point.arguments.get(k, v)) for k, v in defaults.items()}


def steps(point):
    """How far each log-probability and each setting is moved for finite differences."""
    return [1e-5, 1e-5, *(1e-5 * abs(v) or 1e-5 for v in settings(point).values())]


def rows(point):
    """Log-probabilities and settings: at the point, a step up in each, a step down in each."""
    here = np.array([*point.logp, *settings(point).values()])
    moves = np.diag(steps(point))
    return here + np.concatenate([0 * moves[:1], moves, -moves])


CONSTANT = {"reference", "lengths", "rewards", "win_probability", "kl_baseline"}
SHIFT = np.array([3.0, -4.5])
SOME = -20 * np.random.default_rng(0).random((2, 3, 2))


def rounded(x):
    """To bfloat16 and back."""
    return np.asarray(x.astype(jnp.bfloat16).astype(x.dtype))


ALONE = {  # single pairs, and what is special in their data
    "A": (A, {}),
    "moved": (A + SHIFT, {"reference": REFERENCE + SHIFT}),
    "rounded": (rounded(A), {k: rounded(DATA[k]) for k in CONSTANT}),
    **{f"nan {at}": (np.where(np.arange(2) == at, np.nan, A), {}) for at in (0, 1)},
    **{f"some {at}": (pair, {}) for at, pair in enumerate(SOME.reshape(-1, 2))},
}


def repeated(name, data, times):
    """The constant data of a loss for so many rows, and for those of ALONE if it reads DATA."""
    read = {k: v for k, v in bound(name).keywords.items() if k in CONSTANT}
    rows = [dict(data)] * times + [own for _, own in ALONE.values() if not data]
    return {
        k: np.stack([np.asarray(row.get(k, v), float) for row in rows]) for k, v in read.items()
    }


@pytest.fixture(scope="module")
def at_rows():
    """Loss, slopes in log-probabilities and settings, slopes in what should be constant.

    At the rows of every point and of ALONE, in one program; settings are traced.
    """
    groups = {(name, ()): [] for name in NAMES}  # that differ in numbers only
    for point in POINTS:
        own = tuple((k, v) for k, v in point.arguments.items() if k in DATA)
        groups.setdefault((point.name, own), []).append(point)
    tables = {}
    for (name, own), points in groups.items():
        table = [rows(point) for point in points]
        if not own:
            defaults = [*settings(Point(name, {}, A, 0, 0, 0)).values()]
            table.append(np.array([[*pair, *defaults] for pair, _ in ALONE.values()]))
        count = sum(map(len, table[: len(points)]))
        tables[name, own] = np.concatenate(table), repeated(name, own, count)

    def of(key, table, data):
        name, own = key
        names = [*settings(Point(name, {}, A, 0, 0, 0))]

        def value(row, data):
            arguments = {**dict(own), **data, **dict(zip(names, row[2:], strict=True))}
            found = bound(name, **arguments)(row[:2])
            return found.mean(), found

        slopes, found = jax.vmap(jax.grad(value, argnums=(0, 1), has_aux=True))(table, data)
        return found, *slopes

    found = jax.jit(lambda tables: {key: of(key, *each) for key, each in tables.items()})(tables)
    return groups, jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def measured(at_rows):
    """Value, slopes and constant slopes at the rows of every point."""
    groups, found, of = *at_rows, {}
    for key, points in groups.items():
        values, slopes, constant = found[key]
        start = 0
        for point in points:
            part = slice(start, start := start + len(rows(point)))
            value = values[part].reshape(part.stop - part.start, -1).mean(axis=1)
            of[label(point)] = value, slopes[part], {k: x[part] for k, x in constant.items()}
    return of


@pytest.fixture(scope="module")
def alone(at_rows):
    """Every loss of the pairs of ALONE."""
    _, found = at_rows
    return {
        name: dict(zip(ALONE, found[name, ()][0][-len(ALONE) :], strict=True)) for name in NAMES
    }


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_value_and_pulls_are_those_of_the_formula(point, measured):
    value, slopes, _ = measured[label(point)]
    # The numbers are printed with six decimals.
    np.testing.assert_allclose(value[0], point.value, rtol=0, atol=6e-7)
    np.testing.assert_allclose(slopes[0, :2], [-point.d_w, point.d_l], rtol=0, atol=6e-7)


@pytest.mark.parametrize("point", POINTS, ids=label)
def test_derivatives_agree_with_finite_differences(point, measured):
    value, slopes, _ = measured[label(point)]
    up, down = np.split(value[1:], 2)
    difference = (up - down) / (2 * np.array(steps(point)))
    first = 2 if point.name in DETACHED else 0
    # In float64 such a difference is good to about 1e-9 of the value; no point is at a kink.
    np.testing.assert_allclose(
        slopes[0, first:], difference[first:], rtol=1e-6, atol=1e-8 * (1 + abs(point.value))
    )


@pytest.mark.parametrize("name", [n for n in WITH_REFERENCE if n not in ABSOLUTE])
def test_only_the_log_ratio_counts(name, alone):
    np.testing.assert_allclose(alone[name]["moved"], alone[name]["A"], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_enters_what_is_constant(name, at_rows):
    _, found = at_rows
    _, slopes, _ = found[name, ()]
    assert np.any(slopes[-len(ALONE), :2] != 0)  # at A
    for constant in (each[2] for (other, _), each in found.items() if other == name):
        assert constant.keys() == CONSTANT & bound(name).keywords.keys()
        for slope in constant.values():
            np.testing.assert_array_equal(slope, 0)


# --- edges ----------------------------------------------------------------------------------------

EDGES = {
    "policy is reference": ([-13.0, -14.2], [9.0, 12.0]),
    "far above": ([-3.0, -10_003.0], [9.0, 12.0]),
    "far below": ([-10_003.0, -3.0], [9.0, 12.0]),
    "single tokens": ([-0.5, -9.0], [1.0, 1.0]),
    "probability one": ([0.0, 0.0], [9.0, 12.0]),
    "chosen has probability one": ([0.0, -3.0], [9.0, 12.0]),
    "rejected has probability one": ([-3.0, 0.0], [9.0, 12.0]),
    "both are empty": ([0.0, 0.0], [0.0, 0.0]),
    "chosen is empty": ([0.0, -3.0], [0.0, 3.0]),
    "rejected is empty": ([-3.0, 0.0], [3.0, 0.0]),
}


@pytest.fixture(scope="module")
def at_the_edges():
    """Value and pull of every loss at the edges, in float32, in one program."""
    logp, lengths = (jnp.array(x, jnp.float32) for x in zip(*EDGES.values(), strict=True))

    def value_and_pull(name, logp):
        loss = bound(name, dtype=jnp.float32)
        data = {k: jnp.broadcast_to(v, logp.shape) for k, v in loss.keywords.items() if v.ndim}
        data = {k: lengths if k == "lengths" else v for k, v in data.items()}
        value, pullback = jax.vjp(functools.partial(loss, **data), logp)
        return value, pullback(jnp.ones_like(value))[0]

    return jax.jit(lambda logp: {name: value_and_pull(name, logp) for name in NAMES})(logp)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_pull_are_finite_at_the_edges_in_float32(name, at_the_edges):
    value, pull = at_the_edges[name]
    assert value.dtype == pull.dtype == jnp.float32
    for edge, one, both in zip(EDGES, value, pull, strict=True):
        assert np.isfinite(one).all(), edge
        assert np.isfinite(both).all(), edge


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_margins_have_the_slopes_of_their_asymptotes(far):
    logp = REFERENCE + jnp.array([far, 0.0])
    right = far > 0
    slope = {name: float(-jax.grad(bound(name))(logp)[0]) for name in ("dpo", "cdpo", "robust_dpo")}
    assert slope["dpo"] == (0.0 if right else 0.1)
    np.testing.assert_allclose(slope["cdpo"], -0.01 if right else 0.09, rtol=1e-12)
    np.testing.assert_allclose(slope["robust_dpo"], 0.0125 if right else 0.1125, rtol=1e-12)


KINKS = {
    "hinge": (bound("hinge", beta=0.5), REFERENCE + jnp.array([2.0, 0.0]), [0.0, 0.0]),
    "slic_hf": (bound("slic_hf", delta=1, lam=0), jnp.array([-3.0, -4.0]), [0.0, 0.0]),
    "rrhf": (bound("rrhf", lengths=2 * ONES, lam=0), jnp.array([-3.0, -3.0]), [0.0, 0.0]),
    "dpop": (bound("dpop"), REFERENCE, [-0.05, 0.05]),
}


@pytest.mark.parametrize(("loss", "logp", "pull"), KINKS.values(), ids=KINKS)
def test_kinks_have_the_derivative_of_their_flat_side(loss, logp, pull):
    np.testing.assert_allclose(jax.grad(loss)(logp), pull, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_orpo_of_a_certain_chosen_response_has_its_true_limit(dtype):
    a_l = -1.5
    loss = bound("orpo", lam=0.1, lengths=jnp.array([4.0, 2.0], dtype))
    value, pull = jax.value_and_grad(loss)(jnp.array([0.0, 2 * a_l], dtype))
    odds = np.exp(a_l) / -np.expm1(a_l)
    # d_w = (1 + lam odds_l) / n_w; the value is off by less than lam odds_l eps.
    rtol = 8 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(pull[0], -(1 + 0.1 * odds) / 4, rtol=rtol)
    np.testing.assert_allclose(value, 0, atol=rtol)


def test_orpo_pulls_a_certain_rejected_response_down_as_hard_as_the_dtype_can_say():
    eps = float(jnp.finfo(jnp.float32).eps)
    loss = bound("orpo", lam=0.1, lengths=jnp.ones(2, jnp.float32))
    value, pull = jax.value_and_grad(loss)(jnp.array([-1.0, 0.0], jnp.float32))
    np.testing.assert_allclose(pull[1], 0.1 / eps, rtol=1e-5)
    assert 1.0 < value < 1.0 + 0.1 * 20  # -log eps is 15.9


def test_orpo_is_accurate_in_float32_from_near_certain_to_improbable():
    a = -np.logspace(-5, 1.3, 40).astype(np.float32)
    pairs = np.stack([np.full_like(a, -0.7), a], axis=-1)

    @jax.jit
    def slopes(pairs):
        loss = bound("orpo", lam=1, lengths=jnp.ones_like(pairs))
        return jax.value_and_grad(lambda x: loss(x).sum())(pairs)

    narrow, found = slopes(jnp.array(pairs, jnp.float32))
    wide, expected = slopes(jnp.array(pairs, jnp.float64))
    # A few roundings each; log(1 - exp(a)) as written would lose three digits and more.
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.fixture(scope="module")
def of_bfloat16():
    """Every loss of bfloat16 arrays, in one program."""

    def all_of(logp):
        return {name: bound(name, dtype=jnp.bfloat16)(logp) for name in NAMES}

    return jax.jit(all_of)(A.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32_and_float64_stays(name, of_bfloat16, alone):
    expected = alone[name]["rounded"]  # that float64 stays is seen in whole batches
    assert of_bfloat16[name].dtype == jnp.float32
    # bfloat16 itself is good to 4e-3.
    np.testing.assert_allclose(of_bfloat16[name], expected, rtol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_is_not_hidden(name, alone):
    for place in (0, 1):
        seen = np.isnan(alone[name][f"nan {place}"])
        expected = ONE_SIDED.get(name) != place
        assert (seen[place] if name in UNPAIRED else seen) == expected


@pytest.mark.parametrize("name", [n for n in NAMES if "lengths" in bound(n).keywords])
def test_lengths_may_be_integers(name):
    whole = bound(name, lengths=LENGTHS.astype(jnp.int32))(A)
    np.testing.assert_array_equal(whole, bound(name)(A))


# --- composition ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched():
    """Every loss of SOME as one array, its data as large."""

    def whole(name, logp):
        loss = bound(name)
        data = {k: jnp.broadcast_to(v, SOME.shape) for k, v in loss.keywords.items() if v.ndim}
        return functools.partial(loss, **data)(logp)

    return jax.jit(lambda logp: {name: whole(name, logp) for name in NAMES})(SOME)


@pytest.mark.parametrize("name", NAMES)
def test_batch_axes_are_kept_and_rows_do_not_meet(name, batched, alone):
    whole = batched[name]
    own = (2,) if name in UNPAIRED else ()
    assert alone[name]["A"].shape == own
    assert whole.shape == (2, 3, *own)
    assert whole.dtype == jnp.float64
    rows = np.stack([alone[name][f"some {at}"] for at in range(6)]).reshape(whole.shape)
    # Other sizes may round differently.
    np.testing.assert_allclose(whole, rows, rtol=1e-12)


@pytest.mark.parametrize(
    "value", [1, np.float32(0.25), np.int64(1), jnp.float32(0.25), np.array(0.25)], ids=repr
)
def test_hyperparameters_may_be_any_real_number(value):
    found = bound("dpo", beta=value)(A)
    np.testing.assert_array_equal(found, bound("dpo", beta=float(value))(A))
    assert bound("dpo", dtype=jnp.float32, beta=value)(A.astype(jnp.float32)).dtype == jnp.float32


# --- bad input ------------------------------------------------------------------------------------

ALSO_BAD = {
    **{name: [0.0] for name in ("beta", "tau", "r_max", "scale", "temperature")},
    **{(name, "alpha"): [0.0] for name in ("alphapo", "d2o", "h_dpo")},
    **{(name, "epsilon"): [0.5, 1.0] for name in ("aot", "aot_unpaired", "cdpo", "robust_dpo")},
    "shift": [0.0, 1.5],
    "q": [0.0, 1.5],
    ("f_dpo_alpha", "alpha"): [0.0, 1.5],
    ("exo_pair", "epsilon"): [0.0, 1.0],
}


@pytest.mark.parametrize(("name", "argument", "default"), HYPERPARAMETERS)
def test_hyperparameters_out_of_range_are_named(name, argument, default):
    bad = [-0.5, float("nan"), float("inf"), jnp.array(-0.5), True]
    bad += ALSO_BAD.get(argument, []) + ALSO_BAD.get((name, argument), [])
    for value in bad:
        with pytest.raises(ValueError, match=rf"{argument}: got .+, expected a .*number"):
            bound(name, **{argument: value})(A)


def test_the_error_says_what_came_and_what_was_expected():
    with pytest.raises(ValueError, match=r"^beta: got -0\.5, expected a finite number above 0$"):
        losses.dpo(A, REFERENCE, beta=-0.5)


# --- the catalogue --------------------------------------------------------------------------------


def test_every_loss_has_both_points():
    both = {name: {True, False} for name in NAMES}
    found = {name: {p.logp is A for p in POINTS if p.name == name} for name in NAMES}
    assert found == both, "add its rows at the points A and B to POINTS"
    assert {p.name for p in POINTS} <= set(docs.catalogue())


def test_every_loss_has_numbers_here_or_in_the_file_of_its_kind():
    elsewhere = {*test_kernels.NAMES, *test_tokenwise.NAMES, *test_unpaired.NAMES}
    assert {*NAMES, *elsewhere} == set(docs.catalogue()), "add its rows to POINTS"


def test_every_public_function_of_the_room_is_re_exported():
    room = pathlib.Path(inspect.getfile(losses)).parent
    files = [f.stem for f in room.glob("*.py") if not f.stem.startswith("_")]
    modules = [getattr(losses, stem) for stem in files]
    defined = {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
        if value.__module__ == module.__name__
    }
    assert defined == {*docs.catalogue(), *docs.HELPERS}, "name it in jaxpref/losses/__init__.py"


@pytest.mark.parametrize("name", [*docs.catalogue(), *docs.HELPERS])
def test_docstrings_hold_formula_arguments_and_source(name):
    function = getattr(losses, name)
    text = inspect.getdoc(function) or ""
    for section in (".. math::", "Args:", "Returns:", "References:"):
        assert section in text, f"{name}: no {section}"
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text, f"{name}: Args does not name {argument}"
    assert "https://" in text.partition("References:")[2]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_keep_data_before_hyperparameters_and_have_no_flags(name):
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    data = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = [p for p in parameters if p.name not in data]
    assert data[0] == ("token_logp" if name in BY_TOKEN else "logp")
    assert set(data[1:]) <= {*DATA, *(("is_target",) if name in BY_TOKEN else ())}
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)
    assert not any(isinstance(p.default, bool) for p in rest)


def test_the_page_of_losses_is_the_one_the_code_prints():
    written = pathlib.Path(__file__).parent.parent / "docs" / "losses.md"
    assert written.read_text() == docs.page(), "run: make docs"
    formulas, rest = written.read_text().split("## Pulls")
    numbers, rest = rest.split("## Differences")
    logic = rest.split("## The logic")[1].split("## Other names")[0]
    for name in docs.catalogue():
        assert formulas.count(f"| `{name}` |") == 1
        assert numbers.count(f"| `{name}` |") == 1
        assert (f"| `{name}` |" in logic) == name.startswith("logic_")
