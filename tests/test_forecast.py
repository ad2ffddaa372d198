"""`experiments.forecast` on a tiny model: its numbers, its resume, its command line."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import smoke
from test_protocol import written

import experiments.forecast as lab
from experiments.forecast import measure, protocol, summary
from experiments.protocol import arms, foresight, kinds, texts
from jaxpref.training import courses

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=written(cwd), rate=1e-4, supervised_rate=1e-3,
        pairs=4, unseen=4, trained=3, grams=2, limit=40,
    )  # fmt: skip
    return config, *smoke.command(lab, config, cwd)


@pytest.fixture(scope="module")
def arrays(made):
    return dict(np.load(made[1] / "arrays.npz"))


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed = made
    assert arrays["dpo_change"].shape == (2, 3, 7, 2)
    assert arrays["coin_change"].shape == arrays["sft_change"].shape == (2, 2, 7, 2)
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert {row["table"] for row in rows} == {
        "changes", "signals", "sizes", "shares", "kinds", "tokens"}  # fmt: skip
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed


def test_the_parts_of_a_change_are_its_own_pairs_and_others(made, arrays):
    """They sum to what was measured; one trained pair's own share by plain autodiff."""
    config, _, _ = made
    subject, pairs = protocol.load(config)
    for arm in ("dpo", "coin", "sft"):
        found = summary.shares(config, arrays, arm)
        whole = sum(found[name] for name in ("others", "own", "drag", "rest"))
        known = ~np.isnan(whole)
        assert known.all(axis=(0, 2)).sum() == 6  # two trained probes, four unseen ones
        np.testing.assert_allclose(whole[known], found["measured"][known], rtol=1e-4, atol=1e-6)
        assert (found["own"][:, config.trained :] == 0).all()
        assert (found["drag"] <= 0).all()
    run = courses.programs(pairs, measure.objectives(config))
    begun = arms.begin(config, run, pairs, subject.params, 0)
    row = begun.parts.preference[0]
    assert arrays["rows"][0, 0] == row
    kept = []
    arm = protocol.epoch_of(config)
    arms.follow(begun, "dpo", [arm.updates],
                also=lambda n, params, state: kept.append(state))  # fmt: skip
    scale = foresight.scale_of("adam", foresight.squares_of("adam", kept[0], arm.updates),
                               arm.rates)  # fmt: skip
    pair = tuple(x[0] for x in pairs.rows(np.array([row]))[:3])
    jacobian = jax.jit(jax.jacrev(lambda p: pairs.logp(p, pair)))(begun.params)
    flat = [np.asarray(j).reshape(2, -1) for j in jax.tree.leaves(jacobian)]
    gram = sum(j * np.ravel(d) @ j.T for j, d in zip(flat, jax.tree.leaves(scale), strict=True))
    at = np.argwhere(arrays["dpo_index"][0, : arm.updates] == row)[0]
    pull = arrays["dpo_pull"][0][tuple(at)]
    expected = -gram @ pull / config.pairs
    np.testing.assert_allclose(summary.own_share(config, arrays, "dpo")[0, 0], expected, rtol=1e-3)


def test_a_random_direction_is_a_control_where_it_was_taken(made, arrays):
    """As long as the metric's movement, and drawn anew for each seed; runs of before have none."""
    config, _, _ = made
    signals = {r["signal"] for r in lab.summarise(config, arrays) if r["table"] == "signals"}
    assert signals == {*summary.SIGNALS, *summary.EXPLANATIONS}
    assert np.abs(arrays["astray_change"]).max() > 0
    old = {name: x for name, x in arrays.items() if not name.startswith("astray")}
    rows = lab.summarise(config, old)
    assert {r["signal"] for r in rows if r["table"] == "signals"} == signals - {summary.ASTRAY}
    assert summary.ASTRAY not in lab.report(config, rows)
    lab.draw(config, old)


def test_kinds_are_in_their_places(made, arrays):
    """What is said of the greedy kind is of greedy tokens, and of chosen ones of chosen tokens."""
    config, _, _ = made
    found = summary.by_kind(config, arrays, "dpo")
    assert tuple(found) == ("chosen", "rejected", *kinds.KINDS)
    real = found["greedy"]["is_target"].astype(bool)
    assert (found["greedy"]["rank_before"][real] == 1).all()
    assert not (found["sampled"]["rank_before"][found["sampled"]["is_target"] > 0] == 1).all()
    total = (found["chosen"]["logp_before"] * found["chosen"]["is_target"]).sum(axis=-1)
    np.testing.assert_allclose(total, arrays["logp"][:, config.trained :, 0], rtol=1e-4)
    change = found["rejected"]["logp_after"] - found["rejected"]["logp_before"]
    moved = (change * found["rejected"]["is_target"]).sum(axis=-1)
    measured = summary.at_horizon(config, arrays, "dpo")[:, config.trained :, 1]
    np.testing.assert_allclose(moved, measured, atol=2e-4)


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    smoke.same_after_a_kill(lab, config, folder, tmp_path, ("0_dpo", "1_forecast"))


def test_the_horizon_is_always_looked_at(made):
    config, _, _ = made
    with pytest.raises(ValueError, match=r"epochs: got .0\.5, 2.*1 among them"):
        lab.load(dataclasses.replace(config, epochs=(0.5, 2)))
    with pytest.raises(ValueError, match="grams: got 9, expected at most the 3 trained"):
        lab.load(dataclasses.replace(config, grams=9))


def test_what_the_model_says_can_be_read(made, monkeypatch, capsys):
    config, folder, _ = made
    monkeypatch.setattr(sys, "argv", ["texts", str(folder), "--seed", "1"])
    texts.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| prompt | | start | dpo | sft |"
    assert len(lines) == 2 + 2 * config.texts
    assert all("I like " in line for line in lines[2:])
    assert "| greedy |" in lines[2]
    monkeypatch.setattr(sys, "argv", ["texts", str(folder), "--seed", "2"])
    with pytest.raises(SystemExit, match="seed: got 2, expected 0 to 1"):
        texts.main()
