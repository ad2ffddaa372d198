"""`experiments.loss_pulls`: its numbers are the losses' own, its figure has a panel a loss."""

import json
import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import loss_pulls as lab
from jaxpref.losses import __main__ as catalogue


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a finished run of the command."""
    cwd = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        flags = ["--points", "5", "--losses", *lab.SMOKE.losses]
        patch.setattr(sys, "argv", ["loss_pulls", "--name", "tiny", *flags])
        lab.main()
    plt.close("all")
    return cwd / "runs" / "loss_pulls" / "tiny"


def test_a_run_leaves_its_losses_behind(made):
    arrays = dict(np.load(made / "arrays.npz"))
    assert arrays.keys() == {"margin", *lab.SMOKE.losses}
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert arrays["dpo"].shape == (2, 5, 2)
    assert (made / "figure.png").stat().st_size > 10_000
    rows = json.loads((made / "summary.json").read_text())["rows"]
    assert {row["loss"] for row in rows} == set(lab.SMOKE.losses)


def test_pulls_are_those_of_the_formulas(made):
    arrays = dict(np.load(made / "arrays.npz"))
    margin = np.linspace(-100, 100, 5)
    dpo = 0.1 / (1 + np.exp(0.1 * margin))
    np.testing.assert_allclose(arrays["dpo"], dpo[None, :, None] * np.ones((2, 5, 2)), rtol=1e-4)
    # SimPO: means of tokens from -1.5 and -1.25 on; the chosen moves, then the rejected.
    x = np.stack([2 * (-0.25 + margin / 80) - 0.5, 2 * (-0.25 + margin / 120) - 0.5])
    simpo = 2 / (1 + np.exp(x))[..., None] / np.array([80, 120])
    np.testing.assert_allclose(arrays["simpo"], simpo, rtol=1e-5)


def test_the_verdict_counts(made):
    rows = [{"loss": x, "d_w": 1.0, "d_l": 1.0, "least": [0, 0], "most": [1, 1], "equal": e}
            for x, e in (("a", "yes"), ("b", "no"), ("c", "by token"))]  # fmt: skip
    told = lab.report(lab.SMOKE, rows)
    assert "Of 3 losses 1 push both responses equally and 1 do token by token; 1 do not" in told
    assert "does not hold" in told


def test_log_probabilities_stay_below_zero():
    with pytest.raises(ValueError, match=r"nats: got 130\.0, expected log-probabilities to stay"):
        lab.run(lab.Config(nats=130.0, points=5))


def test_a_loss_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="losses: got no_such, expected names of the catalogue"):
        lab.run(lab.Config(losses=("dpo", "no_such")))


def test_pulls_of_tokens_are_those_of_their_sums():
    loss, logp = catalogue.catalogue()["confpo"], jnp.array([[-12.0, -15.0]])
    data = catalogue.arguments(loss, logp)
    np.testing.assert_allclose(data["shares"].sum(-1), 1, rtol=1e-6)
    assert (data["is_target"] == (data["shares"] > 0)).all()
    assert (data["shares"] > 0).sum(-1).tolist() == [[8, 12]]
