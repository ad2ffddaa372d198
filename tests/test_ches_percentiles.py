"""`experiments.ches_percentiles` on a tiny model: its subsets, changes, resume, command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import smoke
from scipy import stats
from test_protocol import written

from experiments import ches_percentiles as lab
from experiments.ches_percentiles import measure, protocol
from experiments.ches_percentiles.report import ordered
from experiments.protocol import arms, inputs
from jaxpref.training import courses

WORDS = ("tea", "milk", "rain today", "snow", "fish and bread", "salt", "the wind", "wood", "iron",
         "a very long walk")  # fmt: skip


NOTHING = courses.Programs((), None, None, frozenset(), None)  # where all is read from a folder


pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=written(cwd, WORDS), rate=1e-3, supervised_rate=1e-3,
        losses=("dpo", "ipo"), limit=40,
    )  # fmt: skip
    return config, *smoke.command(lab, config, cwd)


@pytest.fixture(scope="module")
def arrays(made):
    return dict(np.load(made[1] / "arrays.npz"))


@pytest.fixture(scope="module")
def begun(made):
    """Seed 1 as the run began it, from its folder."""
    config, folder, _ = made
    subject, pairs = protocol.load(config)
    identity = arms.identity_of(config, inputs.hashes(*protocol.load(config)))
    return arms.begin(config, NOTHING, pairs, subject.params, 1, folder, identity)


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed = made
    assert arrays["scores"].shape == (2, 3, 6)
    assert arrays["places"].shape == (2, 3, 2, 4)
    for arm in ("dpo", "ipo", "coin", "sft"):
        assert arrays[f"{arm}_change"].shape == (2, 3, 2, 1, 6, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    count = {name: sum(r["table"] == name for r in rows)
             for name in ("changes", "courses", "correlations")}  # fmt: skip
    assert count == {"changes": 3 * 2 * 4 * 2, "courses": 2 * 3 * 2, "correlations": 3 * 4}
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed


def test_subsets_are_at_the_ends_of_their_scores(arrays):
    """The four lowest scores of six, and the four highest, in rising order of place."""
    for scores, places in zip(arrays["scores"].reshape(-1, 6), arrays["places"].reshape(-1, 2, 4),
                              strict=True):  # fmt: skip
        for subset, best in zip(places, (scores, -scores), strict=True):
            assert subset.tolist() == sorted(subset)
            assert sorted(best[subset]) == sorted(best)[:4]


@pytest.mark.parametrize(
    ("percentile", "size", "expected"),
    [(0, 2, [2, 4]), (25, 2, [2, 4]), (50, 2, [1, 4]), (75, 3, [0, 1, 3]), (100, 2, [0, 3])],
)
def test_quantile_slices_by_hand(percentile, size, expected):
    """Ranked by score: places 2, 4, 1, 3, 0; the middle one is rank 2, its window ranks 1 and 2."""
    scores = np.array([9.0, 5.0, 1.0, 6.0, 2.0])
    assert lab.quantile_slice(scores, percentile, size).tolist() == expected


def test_equal_scores_rank_by_place():
    assert lab.quantile_slice(np.zeros(6), 50, 2).tolist() == [1, 2]
    assert lab.quantile_slice(np.zeros(3), 100, 3).tolist() == [0, 1, 2]


def test_scores_are_those_of_the_supervised_start(arrays, begun):
    """CHES of each pair by itself, all hidden states of each sequence."""
    states = jax.jit(begun.pairs.policy.hidden)
    for row, found in zip(arrays["pool"][1], arrays["scores"][1, 0], strict=True):
        pair = begun.pairs.pairs[row]
        w, l = (np.asarray(states(begun.params, ids[None, :-1]))[0, start - 1 :].sum(axis=0)
                for ids, start in zip(pair.tokens, pair.starts, strict=True))  # fmt: skip
        np.testing.assert_allclose(found, w @ l - w @ w, rtol=0, atol=1e-5 * (w @ w))


def test_each_subset_is_trained_on_once_from_the_one_start(made, arrays, begun):
    config, _, _ = made
    assert protocol.looks(config) == [2]
    pool, unseen = begun.parts.preference, begun.parts.unseen
    np.testing.assert_array_equal(arrays["pool"][1], pool)
    for i, j in np.ndindex(3, 2):
        subset = pool[arrays["places"][1, i, j]]
        np.testing.assert_array_equal(arrays["rows"][1, i, j], [*subset[:3], *unseen])
        for name in protocol.names(config):
            index = arrays[f"{name}_index"][1, i, j]
            assert sorted(index.ravel()) == sorted(subset)
            start = begun.pairs.known[index[0]]
            np.testing.assert_allclose(arrays[f"{name}_seen"][1, i, j, 0], start, atol=1e-3)
    np.testing.assert_array_equal(arrays["logp"][1], begun.pairs.known[arrays["rows"][1]])
    np.testing.assert_array_equal(arrays["lengths"][1], begun.pairs.lengths[arrays["rows"][1]])
    # Supervision raises what it shows; the losses go other ways.
    assert (arrays["sft_change"][..., :3, 0] > 0).mean() > 0.9
    for name in ("coin", "sft"):
        assert np.abs(arrays[f"{name}_change"] - arrays["dpo_change"]).max() > 0.1
    for name, pull in (("dpo", 0.05), ("ipo", 10)):
        first = arrays[f"{name}_pull"][..., 0, :, :]
        np.testing.assert_allclose(first, np.full_like(first, pull) * [-1, 1], rtol=1e-5)


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = ("0_0_dpo", "1_2_ipo")
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_a_subset_of_two_scores_is_trained_once(made, arrays, begun, monkeypatch):
    config, trained = made[0], []

    def fake(begun, name, looks):
        trained.append((name, tuple(begun.parts.preference)))
        assert (begun.parts.unseen == parts.unseen).all()
        return {"change": np.full((1, 6, 2), float(len(trained)))}

    parts = begun.parts
    monkeypatch.setattr(arms, "follow", fake)
    drawn = {"pool": arrays["pool"][1], "places": arrays["places"][1].copy()}
    drawn["places"][:] = [[0, 1, 2, 3], [2, 3, 4, 5]]
    drawn["places"][1, 0] = [0, 1, 2, 5]
    found = measure.trainings(config, lambda: begun, drawn, 1, None)
    assert len(trained) == len(set(trained)) == 4 * 3
    np.testing.assert_array_equal(found["dpo_change"][0], found["dpo_change"][2])
    assert (found["dpo_change"][1, 0] != found["dpo_change"][0, 0]).all()
    assert (found["ipo_change"] != found["dpo_change"]).all()


def a_world(dpo, sft=lambda score, trained: 1.0, scores=("ches", "random")):
    """Two seeds of six pairs in thirds; changes are functions of a pair's score and its set."""
    config = dataclasses.replace(
        lab.SMOKE, scores=scores, percentiles=(0, 50, 100), subset=2, trained=2, resamples=400
    )
    values = np.stack([np.arange(6.0), np.array([3.0, 1.0, 4.0, 0.0, 5.0, 2.0])])
    places = np.array([[lab.quantile_slice(x, at, 2) for at in (0, 50, 100)] for x in values])
    twice = lambda x: np.stack([x, x])  # noqa: E731
    # The first score of the pairs, wherever they are: the second one orders nothing.
    at = np.concatenate([values[0][places], np.tile(values[0][places].mean(-1)[..., None], 3)], -1)
    arrays = {
        "scores": twice(values),
        "places": twice(places),
        "lengths": np.full((2, 2, 3, 5, 2), 4),
    }
    arrays["lengths"][..., 1] = 4 + (np.arange(5) % 3)
    trained = np.arange(5) < 2
    for name, of in {"dpo": dpo, "coin": lambda score, trained: 1.0, "sft": sft}.items():
        change = np.vectorize(of)(at, trained).astype(float)
        arrays[f"{name}_change"] = twice(np.stack([change] * 2, axis=-1)[:, :, None])
        arrays[f"{name}_diverged"] = np.full((2, 2, 3), -1)
    return config, arrays


@pytest.mark.usefixtures("any_size")
def test_the_verdict_of_a_world_where_ches_orders_what_is_trained():
    """Trained responses fall by their score, unseen ones always by one."""
    config, arrays = a_world(lambda score, trained: 1.0 - score if trained else -1.0)
    rows = lab.summarise(config, arrays)
    course = next(r for r in rows if (r["table"], r["score"], r["set"])
                  == ("courses", "ches", "trained"))  # fmt: skip
    assert course["means"] == [0.5, -0.5, -3.5]
    assert course["drop"] == course["beyond_coin"] == course["beyond_sft"] == -4.0
    assert (course["falls"], course["falls_seeds"]) == (True, 2)
    found = {(r["score"], r["arm"]): r for r in rows if r["table"] == "correlations"}
    assert found["ches", "dpo"]["all"] == pytest.approx(-1)
    assert np.isnan(found["ches", "sft"]["all"])
    at, (ches, random) = arrays["places"][0, 1].ravel(), arrays["scores"][0]
    expected = stats.spearmanr(random[at], -ches[at])[0]
    assert found["random", "dpo"]["all"] == pytest.approx(expected)
    trained, unseen = lab.report(config, rows).split("\n\n")[-2:]
    assert "dpo, trained pairs: chosen responses are displaced" in trained
    assert "by 2 of 6 subsets (CHES 100, random 100)" in trained
    assert "both controls: CHES. That training on high CHES" in trained
    assert "most holds here: -3.50 (" in trained
    assert "by 6 of 6 subsets" in unseen
    assert "both controls: none." in unseen
    assert "most does not hold here: -1.00 (-1.00 to -1.00) nats" in unseen


@pytest.mark.usefixtures("any_size")
def test_what_a_control_does_too_is_no_claim_that_held():
    falls = lambda score, trained: 2.0 - score  # noqa: E731
    config, arrays = a_world(falls, falls)
    rows = lab.summarise(config, arrays)
    courses = [r for r in rows if r["table"] == "courses" and r["score"] == "ches"]
    assert all(r["falls"] and r["drop"] == -4.0 and r["beyond_sft"] == 0.0 for r in courses)
    assert not any(ordered(config, r) for r in courses)
    assert "displaced, below their start and both controls, by 0 of 6" in lab.report(config, rows)


def test_a_diverged_arm_is_reported_and_the_run_goes_on():
    config, arrays = a_world(lambda score, trained: -score)
    arrays["dpo_diverged"][1, 0, 2] = 1
    arrays["dpo_change"][1, 0, 2] = np.nan
    rows = lab.summarise(config, arrays)
    course = next(r for r in rows if r["table"] == "courses" and r["score"] == "ches")
    assert not course["falls"]
    assert course["falls_seeds"] == 1
    assert not any(ordered(config, r) for r in rows if r["table"] == "courses")
    assert "dpo, CHES 100 (1 diverged)" in lab.report(config, rows)
    lab.draw(config, arrays)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subset": 8}, "subset: got 8, expected at most 6"),
        ({"trained": 5}, "trained: got 5, expected at most 4"),
        ({"batch": 3}, "batch: got 3, expected a divisor of 4 pairs"),
        ({"scores": ("chess",)}, r"scores: got \('chess',\), expected some of ches, "),
        ({"losses": ("dpo", "dpo")}, "losses: got .* once and no control"),
        ({"losses": ("confpo",)}, "confpo, which reads single tokens"),
        ({"percentiles": (50, 0)}, r"percentiles: got \(50, 0\), expected two or more"),
        ({"epochs": 0}, "epochs: got 0, expected at least 1"),
    ],
)
def test_bad_settings_are_named(made, change, said):
    with pytest.raises(ValueError, match=said):
        lab.load(dataclasses.replace(made[0], **change))
