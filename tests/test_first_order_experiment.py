"""`experiments.first_order` on a tiny model: its numbers, its resume, its command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

import experiments.first_order as lab
from experiments.first_order import measure
from experiments.first_order.protocol import Part
from experiments.first_order.report import ends, r_squared
from jaxpref import diagnostics, gradients
from jaxpref.data import batches, preferences
from jaxpref.data.pairs import encode
from jaxpref.models import pretrained
from jaxpref.training import courses
from jaxpref.training.optimizers import unit_optimizer
from jaxpref.training.pairset import PairSet

RATES = (1e-5, 1e-4)


pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), optimizers=("sgd", "adam"), clips=(0.5,),
        sgd_rates=RATES, adam_rates=RATES,
    )  # fmt: skip
    return config, *smoke.command(lab, config, cwd)


def test_a_run_leaves_everything_behind(made):
    config, folder, printed = made
    arrays = dict(np.load(folder / "arrays.npz"))
    assert arrays["measured"].shape == (2, 2, 2, 3, 2)  # parts, one or all steps, rates, probes
    assert arrays["own"].shape == (2, 2, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert len(rows) == 2 * 2
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "Too small for a verdict: 1 seeds and 3 pairs over all of them" in printed
    assert lab.report(config, lab.summarise(config, arrays)) in printed


def test_first_order_theory_holds_at_these_rates(made):
    config, folder, _ = made
    rows = lab.summarise(config, dict(np.load(folder / "arrays.npz")))
    for row in rows:
        if row["rate"] == RATES[1]:
            assert row["one"] > 0.99, row
            assert row["others"] > 0.99, row


def test_the_batch_is_predicted_by_the_gram_of_all_its_pairs(made):
    """Of Adam, clipped: own and foreign terms of the Gram add up to what its step does.

    In float64: Adam divides by gradients that may be nothing but rounding.
    """
    config = dataclasses.replace(made[0], others=0)  # what is seen is what is trained on
    wide = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, params, _, tokenizer, *_ = pretrained.load(config.model, **wide)
    assert tokenizer is not None
    some = preferences.load()[:4]
    some, _ = encode(some, tokenizer, end=None, limit=24, too_long="truncate_left")
    pairs = PairSet.of(policy, some)
    pairs = pairs.with_reference(pairs.logps(params, batch=4))
    slope_of = measure.slope_of(config, pairs)
    found = measure.measure(config, Part(0, "adam", 0.5), pairs, params, slope_of)

    drawn = batches.order(4, 4, 0, 0)
    state = unit_optimizer("adam").init(params)
    _, slope, _ = slope_of(params, pairs.rows(drawn[2:]), 0.5)
    params = jax.tree.map(jnp.copy, params)
    params, state = courses.updated(
        unit_optimizer("adam"), params, state, slope, jnp.float32(RATES[0])
    )
    batch = pairs.rows(drawn[:2])
    pull, slope, factor = slope_of(params, batch, 0.5)
    assert factor < 1
    metric, carried = measure.own_metric("adam", params, state, slope)
    momentum = measure.change(pairs, params, batch, carried)
    every = jax.jit(lambda p: gradients.gram(pairs.logp, p, batch[:3], metric=metric).gram)
    gram = every(params)
    expected = momentum + factor * diagnostics.batch_change(gram, pull)
    np.testing.assert_allclose(found["total"], expected, rtol=1e-6)
    own = jnp.stack([gram[i, :, i] for i in range(2)])
    expected = momentum + factor * diagnostics.first_order_change(own, pull) / 2
    np.testing.assert_allclose(found["own"], expected, rtol=1e-6)
    # Neither the momentum nor the other pair is nothing.
    assert np.abs(momentum / expected).max() > 0.05
    assert np.abs(found["own"] / found["total"] - 1).max() > 0.05


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = sorted(part.stem for part in (folder / "parts").iterdir())[:1]
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_controls_are_of_the_next_pair(made):
    """Two pairs: each with the other's prediction, and with the other's Gram."""
    config, folder, _ = made
    arrays = {name: x.astype(float) for name, x in np.load(folder / "arrays.npz").items()}
    row = lab.summarise(config, arrays)[-1]
    at, measured = 1, arrays["measured"][1, 0, -1, :2]
    other = arrays["total"][at][[1, 0]]
    assert row["another"] == pytest.approx(r_squared(RATES[1] * other, measured))
    momentum = np.array([own + factor * gram @ pull / 2 for own, factor, gram, pull in zip(
        arrays["own"][at], [arrays["factor"][at]] * 2, arrays["gram"][at], arrays["pull"][at],
        strict=True)])  # fmt: skip
    foreign = [m - arrays["factor"][at] * gram @ pull / 2 for m, gram, pull in zip(
        momentum, arrays["gram"][at][[1, 0]], arrays["pull"][at], strict=True)]  # fmt: skip
    expected = np.corrcoef(np.ravel(foreign), measured.ravel())[0, 1]
    assert row["another_correlation"] == pytest.approx(expected, rel=1e-4)
    assert row["another"] < 0.5 < row["one"]


def test_r_squared_by_hand():
    measured = np.array([0.0, 2.0])
    assert r_squared(measured, measured) == 1.0
    assert r_squared(np.array([1.0, 1.0]), measured) == 0.0
    assert r_squared(np.array([2.0, 0.0]), measured) == -3.0


def test_where_the_theory_ends():
    rows = [{"rate": r, "one": x} for r, x in ((1e-3, 0.5), (1e-2, 0.99), (1e-1, 0.95), (1, 0.3))]
    assert ends(rows, "one") == 1  # the first one is rounding
    assert ends(rows[1:3], "one") is None
    assert ends(rows[3:], "one") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs: got 0, expected at least 1"),
        ({"pairs": 50}, "pairs: a run draws"),
        ({"sgd_rates": (1.0,)}, "rates: got"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        lab.load(dataclasses.replace(lab.Config(), **settings))
