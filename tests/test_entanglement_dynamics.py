"""`experiments.entanglement_dynamics` on a tiny model: numbers, resume, command line."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke
from test_protocol import written

import experiments.entanglement_dynamics as lab
from experiments.entanglement_dynamics import protocol, summary
from experiments.protocol import arms
from jaxpref import losses

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=written(cwd), rate=1e-3, supervised_rate=1e-3,
        limit=40,
    )  # fmt: skip
    return config, *smoke.command(lab, config, cwd)


@pytest.fixture(scope="module")
def arrays(made):
    return dict(np.load(made[1] / "arrays.npz"))


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed = made
    assert arrays["dpo_change"].shape == arrays["sft_change"].shape == (2, 3, 6, 2)
    assert arrays["simpo_change"].shape == (2, 2, 6, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    names = [row["name"] for row in rows if row["table"] == "losses"]
    assert names == [*config.losses, "coin", "sft"]
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed


def test_arms_share_start_and_order_and_then_part(made, arrays):
    config, _, _ = made
    for name in protocol.names(config):
        np.testing.assert_array_equal(arrays[f"{name}_index"][:, :2], arrays["dpo_index"][:, :2])
        np.testing.assert_array_equal(arrays[f"{name}_seen"][:, 0], arrays["dpo_seen"][:, 0])
        assert name == "dpo" or np.abs(arrays[f"{name}_change"][:, 0]
                                       - arrays["dpo_change"][:, 0]).max() > 1e-3  # fmt: skip
    first = np.sort(arrays["dpo_index"][:, :2].reshape(2, -1))
    np.testing.assert_array_equal(first, np.sort(arrays["dpo_index"][:, 2:].reshape(2, -1)))


def test_the_rate_rises_over_a_share_of_the_epoch(made):
    config, _, _ = made
    some = dataclasses.replace(config, pairs=40, batch=2, warmup=0.25)
    assert arms.arm_of(some, "dpo", 9).warmup == 5
    assert protocol.looks(some)["dpo"] == [10, 20, 40]
    assert protocol.looks(some)["simpo"] == [10, 20]


def test_pulls_at_the_start_are_the_losses_own(made, arrays):
    config, _, _ = made
    half = np.full((2, 4), 0.05)
    np.testing.assert_allclose(arrays["dpo_start"], np.stack([-half, half], axis=-1), rtol=1e-5)
    # SimPO pulls by one over the length; CPO has a likelihood term beside DPO's.
    assert (arrays["cpo_start"][..., 0] < -1).all()
    rows = {r["name"]: r for r in lab.summarise(config, arrays) if r["table"] == "losses"}
    assert rows["dpo"]["log_r"] == pytest.approx(0, abs=1e-6)
    assert rows["cpo"]["log_r"] > 1
    assert "log_r" not in rows["sft"]


def test_the_summary_says_what_the_arrays_hold(made, arrays):
    config, _, _ = made
    found = lab.summarise(config, arrays)
    row = next(r for r in found if (r["table"], r.get("name")) == ("losses", "dpo"))
    end = arrays["dpo_change"][:, 1, 2:]
    assert row["unseen_chosen"] == pytest.approx(end[..., 0].mean(), rel=1e-5)
    margin = end[..., 0] - end[..., 1]
    assert row["unseen_margin"] == pytest.approx(margin.mean(), rel=1e-5)
    assert row["unseen_right"] == pytest.approx((margin > 0).mean())
    last = next(r for r in found if (r["table"], r.get("arm"), r.get("updates"), r.get("set"))
                == ("changes", "dpo", 4, "trained"))  # fmt: skip
    gap = arrays["dpo_change"][:, 2, :2, 0] - arrays["coin_change"][:, 2, :2, 0]
    assert last["beyond_coin"] == pytest.approx(gap.mean(), rel=1e-4)


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    smoke.same_after_a_kill(lab, config, folder, tmp_path, ("1_simpo",))


def test_ratios_by_hand():
    pull = np.array([[[-3.0, 1.0], [-1.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    np.testing.assert_allclose(summary.log_ratio(pull), [math.log(2), math.inf])
    assert np.isnan(summary.log_ratio(np.zeros((2, 2))))
    assert np.isnan(summary.log_ratio(np.array([[1.0, 1.0]])))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": ("dpo", "nosuch")}, "got nosuch, expected a name of the catalogue"),
        ({"losses": ("dpo", "confpo")}, "got confpo, which reads single tokens"),
        ({"losses": ("dpo", "sft")}, "each once and no control"),
        ({"longer": ("ipo",)}, "longer: got ipo"),
        ({"epochs": (0.5,)}, "with 1 among the first"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(made, change, said):
    with pytest.raises(ValueError, match=said):
        lab.load(dataclasses.replace(made[0], **change))


@pytest.mark.usefixtures("any_size")
def test_the_verdict_names_what_fell():
    """Two losses of known courses: one lowers unseen pairs below both controls, one raises them."""
    config = dataclasses.replace(
        lab.SMOKE, losses=("dpo", "cpo"), longer=(), epochs=(1,), seeds=2, resamples=20
    )
    arrays = {"lengths": np.full((2, 6, 2), 3)}
    for name, (trained, unseen) in {"dpo": (1, -2), "cpo": (1, 1), "coin": (0, -1), "sft": (1, 1)
                                    }.items():  # fmt: skip
        change = np.full((2, 1, 6, 2), float(trained))
        change[:, :, 2:] = unseen
        change[..., 1] -= 3
        arrays |= {f"{name}_change": change, f"{name}_diverged": np.array([-1, -1])}
        arrays |= {f"{name}_pull": np.tile(np.array([-2.0, 1.0]), (2, 2, 2, 1))}
        arrays[f"{name}_start"] = np.tile(np.array([-2.0, 1.0]), (2, 4, 1))
    said = lab.report(config, lab.summarise(config, arrays))
    assert "unseen chosen response is below its start and both controls under dpo;" in said
    assert "above it under cpo." in said
    assert "trained chosen response is below its start and both controls under no loss" in said
    pull = jax.grad(lambda x: losses.dpo(x, jnp.zeros((1, 2)), beta=1.0).sum())(jnp.zeros((1, 2)))
    assert summary.log_ratio(np.asarray(pull)) == 0
