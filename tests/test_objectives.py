"""`jaxpref.training.objectives`: every loss of the catalogue by its name, and what it reads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data.batches import Batch
from jaxpref.logprobs import Scores
from jaxpref.losses import __main__ as catalogue
from jaxpref.training.objectives import EXCLUDED, NAMES, objective, pull

LOGP = np.array([[-6.0, -5.0], [-2.0, -9.0]])
REFERENCE, LENGTHS = np.array([[-5.0, -6.0], [-4.0, -8.0]]), np.array([[4.0, 2.0], [3.0, 6.0]])


def batch_of(reference):
    nothing: Any = None
    return Batch(nothing, nothing, nothing, reference, nothing)


SCORES, BATCH = Scores(jnp.asarray(LOGP), jnp.asarray(LENGTHS)), batch_of(jnp.asarray(REFERENCE))


def test_every_loss_of_the_catalogue_is_here_or_left_out_by_name():
    """A new loss whose inputs have no value here fails: give them one, or say why it is out."""
    assert set(catalogue.catalogue()) == set(NAMES) | set(EXCLUDED)
    assert not set(NAMES) & set(EXCLUDED)
    logp, lengths = (jax.ShapeDtypeStruct((3, 2), jnp.float32) for _ in range(2))
    for name in NAMES:
        loss = objective(name)

        def value(logp, lengths, reference, loss=loss):
            return loss(Scores(logp, lengths), batch_of(reference))

        def slope(logp, lengths, reference, loss=loss):
            return pull(loss, Scores(logp, lengths), batch_of(reference))

        assert jax.eval_shape(value, logp, lengths, logp).shape == (3,), name
        assert jax.eval_shape(slope, logp, lengths, logp).shape == (3, 2), name


@pytest.mark.parametrize("name", ["bco", "kldo", "flat_pearson", "poft", "npo", "exo"])
def test_inputs_that_stand_in(name):
    """What is not in a batch of pairs, by hand."""
    u = LOGP - REFERENCE  # [[-1, 1], [2, -1]]: a mean of a quarter
    good, bad = np.exp(LOGP / LENGTHS).mean(axis=0)
    gap = 0.1 * (u - 0.25) * [1, -1]
    q, p = 0.1 * u, np.array([2.0, 0.0])  # the rewards over a temperature of a half
    q, p = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (q, p))
    expected = {
        "bco": np.log1p(np.exp(-gap)).mean(axis=-1),
        "kldo": -0.1 * u[:, 0].mean() + np.log(np.exp(0.1 * u[:, 1]).mean()),
        "flat_pearson": -good + bad + bad**2 / 4,
        "poft": np.log1p(np.exp(-u[:, 0] / LENGTHS[:, 0])),
        "npo": 20 * np.log1p(np.exp(0.1 * u[:, 1])),
        "exo": (np.exp(q) * (q - p)).sum(axis=-1),
    }
    found = objective(name)(SCORES, BATCH)
    np.testing.assert_allclose(found, np.broadcast_to(expected[name], 2), rtol=1e-12)


def test_hyperparameters_are_the_loss_s_own():
    found = objective("simpo", beta=3.0, gamma=0.1)(SCORES, BATCH)
    np.testing.assert_allclose(
        found, losses.simpo(SCORES.logp, SCORES.lengths, beta=3.0, gamma=0.1)
    )
    with pytest.raises(ValueError, match=r"^simpo: got tau, expected some of beta, gamma$"):
        objective("simpo", beta=3.0, tau=0.1)
    with pytest.raises(ValueError, match=r"^dpo: got reference, expected some of beta$"):
        objective("dpo", reference=REFERENCE)  # data, no hyperparameter
    with pytest.raises(ValueError, match=r"^sft: got beta, expected none$"):
        objective("sft", beta=0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tdpo1",
            "loss: got tdpo1, which reads divergences of single tokens; expected one of whole",
        ),
        ("kto_baseline", "loss: got kto_baseline, expected a name of the catalogue"),
    ],
)
def test_what_is_no_objective_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        objective(name)


def test_pulls_by_hand():
    """DPO's is the same on both responses; a statistic of the batch pulls on nothing."""
    u = LOGP - REFERENCE
    weight = 0.5 / (1 + np.exp(0.5 * (u[:, 0] - u[:, 1])))
    expected = weight[:, None] * [-1, 1]
    np.testing.assert_allclose(pull(objective("dpo", beta=0.5), SCORES, BATCH), expected)
    gap = 0.1 * (u - 0.25) * [1, -1]
    expected = 0.05 / (1 + np.exp(gap)) * [-1, 1]
    np.testing.assert_allclose(pull(objective("bco"), SCORES, BATCH), expected)
