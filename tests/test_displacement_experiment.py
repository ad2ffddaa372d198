"""`experiments.displacement` on a tiny model: the forecast is said first, then it is trained."""

import dataclasses

import numpy as np
import pytest
import smoke
from test_protocol import written

import experiments.displacement as lab

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=written(cwd), limit=40, rate=1e-3
    )
    return config, *smoke.command(lab, config, cwd)


def test_it_says_beforehand_what_it_then_measures(made):
    config, folder, printed = made
    arrays = dict(np.load(folder / "arrays.npz"))
    assert arrays["dpo_change"].shape == (1, 1, 6, 2)
    assert arrays["forecast"].shape == (1, 4, 2)
    told, measured = arrays["forecast"][0, :, 0], arrays["dpo_change"][0, -1, 2:, 0]
    assert np.abs(measured).min() > 1e-3
    assert np.abs(told - measured).max() < 0.5 * np.abs(measured).max()
    assert printed.index("foretold before the training") < printed.index("after training")
    assert printed.count("falls\n") + printed.count("rises\n") == 4
    assert f"of all 4, {(told < 0).sum()} will fall" in printed
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert (folder / "figure.png").stat().st_size > 10_000


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, _ = made
    smoke.same_after_a_kill(lab, config, folder, tmp_path, ("0_coin",))


@pytest.mark.parametrize(
    ("moved", "said"),
    [(-2.0, "That is displacement"), (-0.5, "not surely below both"), (0.5, "not surely below z")],
)
def test_the_words_follow_the_numbers(moved, said):
    config = dataclasses.replace(lab.SMOKE, resamples=20)
    arrays = {"lengths": np.full((1, 6, 2), 3), "forecast": np.full((1, 4, 2), moved)}
    for arm, x in {"dpo": moved, "coin": -1.0, "sft": 0.0}.items():
        arrays |= {f"{arm}_change": np.full((1, 1, 6, 2), x), f"{arm}_diverged": np.array([-1])}
    rows = lab.summarise(config, arrays)
    assert said in lab.report(config, rows)
    fell = 4 * (moved < 0)
    assert f"{fell} of 4 became less likely" in lab.report(config, rows)
    assert rows[-1]["right"] == 1.0
