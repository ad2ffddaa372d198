"""`experiments.forecast` on a tiny model: its numbers, its resume, its command line."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

import experiments.forecast as lab


@pytest.fixture(autouse=True, scope="module")
def as_optax_needs_it():
    """optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    with smoke.compiled_once(sys.modules["experiments.forecast.measure"]):
        yield


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(lab.SMOKE, model=str(tiny_model), rate=1e-4)
    return config, *smoke.command(lab, config, cwd)


def test_a_run_leaves_everything_behind(made):
    config, folder, printed = made
    arrays = dict(np.load(folder / "arrays.npz"))
    assert arrays["signals"].shape == (1, len(lab.SIGNALS), 4)
    assert arrays["alone"].shape == arrays["together"].shape == (1, 2, 4, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert len(json.loads((folder / "summary.json").read_text())["rows"]) == 4 * len(lab.SIGNALS)
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed


def test_the_first_update_of_a_pair_alone_is_what_was_predicted(made):
    """The measured change is the prediction times the learning rate, to first order."""
    config, folder, _ = made
    arrays = dict(np.load(folder / "arrays.npz"))
    predicted = -config.rate * arrays["signals"][0, list(lab.SIGNALS).index(
        "first update, pair alone")]  # fmt: skip
    measured = arrays["alone"][0, 0, :, 0]
    np.testing.assert_allclose(measured, predicted, rtol=0.05, atol=2e-4)
    assert (np.abs(measured) > 1e-3).all()  # far above rounding
    assert (np.sign(measured) == np.sign(predicted)).all()


def test_embedding_signals_by_a_loop(made):
    """CHES from the definition, and the unembedding's Gram from its token products."""
    config, folder, _ = made
    arrays = dict(np.load(folder / "arrays.npz"))
    found = dict(zip(lab.SIGNALS, arrays["signals"][0], strict=True))
    subject, problem = lab.load(config)
    states_of = jax.jit(subject.policy.hidden)  # what is padded on the right is not seen
    for place, row in enumerate(lab.rows(config, problem, 0)[:2]):
        hidden, targets = [], []
        for side in (0, 1):
            tokens, real, scored = (np.asarray(x)[row, side] for x in problem.arrays)
            states = np.asarray(states_of(subject.params, tokens[None]))[0][real]
            at = np.flatnonzero(scored[real])
            hidden.append(states[at - 1].astype(np.float64))
            targets.append(tokens[real][at])
        # Differences of nearly equal numbers: rounding is that of the larger one.
        for name, (w, l) in {
            "CHES": [x.sum(axis=0) for x in hidden],
            "CHES, length-normalised": [x.mean(axis=0) for x in hidden],
        }.items():
            np.testing.assert_allclose(
                found[name][place], w @ l - w @ w, rtol=0, atol=1e-5 * (w @ w)
            )
        w, l = (x[-1] for x in hidden)
        close = {"rtol": 0, "atol": 1e-5 * np.linalg.norm(w) * np.linalg.norm(l)}
        np.testing.assert_allclose(found["last hidden inner product"][place], w @ l, **close)
        # alpha_st = <e_y - pi_s, e_y' - pi'_t>
        table = np.asarray(subject.policy.unembedding(subject.params), np.float64)
        residuals = [-np.asarray(jax.nn.softmax(jnp.asarray(x @ table.T))) for x in hidden]
        for residual, y in zip(residuals, targets, strict=True):
            residual[np.arange(len(y)), y] += 1
        pairs = {
            (i, j): ((residuals[i] @ residuals[j].T) * (hidden[i] @ hidden[j].T)).sum()
            for i in (0, 1) for j in (0, 1)
        }  # fmt: skip
        expected = pairs[0, 1] - pairs[0, 0]
        np.testing.assert_allclose(
            found["unembedding Gram (alpha-weighted)"][place], expected, rtol=1e-4
        )


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = sorted(part.stem for part in (folder / "parts").iterdir())[:1]
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_auc_counts_the_pairs_in_order():
    random = np.random.default_rng(0)
    x = random.integers(0, 6, 40).astype(float)
    fell = x + 3 * random.random(40) > 4
    wins = [(a > b) + 0.5 * (a == b) for a in x[fell] for b in x[~fell]]
    assert lab.auc(x, fell) == pytest.approx(np.mean(wins))
    assert math.isnan(lab.auc(x, np.full(40, True)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs: got 0, expected at least 1"),
        ({"pairs": 97}, "pairs: got 97, expected 4 to 96"),
        ({"alone": ()}, "alone: got"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        lab.load(dataclasses.replace(lab.Config(), **settings))
