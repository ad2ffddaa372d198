"""`experiments.mitigations` on a tiny model: its numbers, its resume, its command line."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from experiments import mitigations as lab
from experiments.mitigations import measure, methods, start, summary
from jaxpref import losses
from jaxpref.training import mitigations

METHODS = ("dpo", "normalised", "contrast mask", "learned mask")


@pytest.fixture(autouse=True, scope="module")
def as_optax_needs_it():
    """optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    with smoke.compiled_once(sys.modules["experiments.mitigations.measure"]):
        yield


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), methods=METHODS, optimizers=("sgd", "adam"), length=0.05
    )
    return config, *smoke.command(lab, config, cwd)


def test_a_run_leaves_everything_behind(made):
    config, folder, printed = made
    arrays = dict(np.load(folder / "arrays.npz"))
    assert arrays["logp"].shape == (8, 3, 4, 2)  # parts, looks, pairs of both kinds
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert len(json.loads((folder / "summary.json").read_text())["rows"]) == 8
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed


def test_all_begin_at_the_reference(made):
    config, folder, _ = made
    arrays = dict(np.load(folder / "arrays.npz"))
    assert (arrays["logp"][:, 0] == 0).all()
    assert (arrays["kl"][:, 0] == 0).all()
    assert (arrays["kl"][:, 1:] > 0).all()
    np.testing.assert_allclose(arrays["mask"][:, 0], 0.5)
    learned = [part.method == "learned mask" for part in lab.parts(config)]
    np.testing.assert_allclose(arrays["mask"][np.logical_not(learned), -1], 0.5)
    assert (arrays["mask"][learned, -1] != 0.5).all()


def test_normalised_pairs_are_ideal_at_the_start(made):
    config, folder, _ = made
    arrays = dict(np.load(folder / "arrays.npz"))
    for part, regime in zip(lab.parts(config), arrays["regime"], strict=True):
        expected = {"normalised": 0, "contrast mask": -1, "learned mask": -1}
        if part.method in expected:
            assert (regime == expected[part.method]).all()


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = sorted(part.stem for part in (folder / "parts").iterdir())[:2]
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_the_loss_of_a_method_by_hand():
    """Values and pulls, against the formulas written out."""
    token_logp = jnp.array([[[-1.0, -2.0], [-3.0, -0.5]]])
    reference = jnp.full((1, 2, 2), -1.0)
    target = jnp.array([[[True, True], [True, False]]])
    gram = jnp.array([[[4.0, 1.0], [1.0, 9.0]]])
    seen = methods.Seen(token_logp, reference, target, target, gram)
    logits = jnp.zeros((1, 2, 2))
    config = lab.Config()
    plain = methods.loss_of(config, "dpo", seen, logits)
    margin = 0.1 * ((-3.0 - -2.0) - (-3.0 - -1.0))
    np.testing.assert_allclose(plain, -jax.nn.log_sigmoid(margin))
    np.testing.assert_allclose(methods.loss_of(config, "contrast mask", seen, logits), plain)

    pull, _ = measure._pulls(config, "normalised", seen, logits)
    weight = 0.1 * jax.nn.sigmoid(-margin)
    expected = [[[-weight / 2, -weight / 2], [weight / 3, 0]]]
    np.testing.assert_allclose(pull, expected)
    value = methods.loss_of(config, "normalised", seen, logits)
    np.testing.assert_allclose(value, plain)

    _, slope = measure._pulls(config, "learned mask", seen, logits)
    price = jax.grad(
        lambda x: losses.dpo(
            (mitigations.learned_mask(x, target) * (token_logp - reference)).sum(-1),
            jnp.zeros((1, 2)), beta=0.1,
        ).sum() + config.price * mitigations.learned_mask(x, target).sum()
    )(logits)  # fmt: skip
    np.testing.assert_allclose(slope, price)


def test_matched_margins_lie_between_looks():
    course = {"margin": np.array([0.0, 1.0, 3.0]), "chosen": np.array([0.0, -1.0, -2.0])}
    assert summary.at_margin(course, 2.0) == {"margin": 2.0, "chosen": -1.5}
    assert summary.at_margin(course, 0.0)["chosen"] == 0.0
    assert math.isnan(summary.at_margin(course, 4.0)["chosen"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates: got 0, expected at least 1"),
        ({"methods": ("magic",)}, "methods: got 'magic', expected some of dpo"),
        ({"pairs": 80, "data": "preferences"}, "pairs: got 80 and as many held out"),
        ({"pairs": 2}, "batch is 4, expected at most the 2 rows"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        start.load(dataclasses.replace(lab.Config(), **settings))
