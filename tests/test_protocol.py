"""`experiments.protocol` on a tiny model: parts, arms, starts, intervals."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.protocol import arms, changes, intervals, kinds, settings, tables
from experiments.protocol.settings import Protocol
from jaxpref import losses
from jaxpref.training import courses
from jaxpref.training.objectives import objective
from jaxpref.training.pairset import PairSet

WORDS = ("tea", "milk", "rain", "snow", "fish", "bread", "salt", "wind", "wood", "iron")


pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


def written(folder, words=WORDS):
    """A file of pairs, two to the prompt of the first word."""
    rows = [{"prompt": f"I like {word}.", "chosen": f" {word} is good.", "rejected": " No, no!"}
            for word in words]  # fmt: skip
    rows.append({**rows[0], "chosen": " Yes."})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    return Protocol(
        pairs=4, unseen=3, trained=2, batch=2, supervised_epochs=1, rate=1e-3, supervised_rate=1e-3,
        resamples=50, limit=40, model=str(tiny_model),
        data=written(tmp_path_factory.mktemp("data")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(config):
    """Model, pairs and programs."""
    subject, pairs = settings.load(config)
    objectives = {name: objective(name) for name in ("dpo", "sft", "ipo")}
    return subject, pairs, courses.programs(pairs, objectives)


@pytest.fixture(scope="module")
def begun(config, made):
    subject, pairs, run = made
    return arms.begin(config, run, pairs, subject.params, 0)


def test_no_prompt_is_in_two_parts(config, made):
    _, pairs, _ = made
    assert len(pairs) == 11
    drawn = set()
    for seed in range(12):
        parts = settings.split(config, pairs, seed)
        some = [set(pairs.prompts[rows].tolist()) for rows in parts[:2]]
        assert not some[0] & some[1]
        assert [len(set(rows.tolist())) for rows in parts] == [4, 3, 4]
        assert (parts.supervised == parts.preference).all()
        drawn.add(tuple(parts.preference.tolist()))
        other = settings.split(dataclasses.replace(config, pairs=3, supervised_on="other"), pairs,
                               seed)  # fmt: skip
        prompts = [set(pairs.prompts[rows].tolist()) for rows in other]
        assert not (prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2])
    assert len(drawn) > 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pairs": 9}, "a seed draws 3 \\+ 9 pairs.*at most the 11"),
        ({"unseen": 0}, "unseen: got 0, expected at least 1"),
        ({"batch": 5}, "batch: got 5, expected at most the 4 pairs"),
        ({"trained": 5}, "trained: got 5"),
        ({"rate": 0.0}, "rate: got 0.0, expected above 0"),
        ({"supervised_on": "other"}, "pairs of supervision"),
    ],
)
def test_what_cannot_be_run_is_refused(config, made, change, said):
    _, pairs, _ = made
    bad = dataclasses.replace(config, **change)

    def begin():
        settings.check(bad)
        settings.split(bad, pairs, 0)

    with pytest.raises(ValueError, match=said):
        begin()


def naively(begun, made, name, orders, rate, swap=()):
    """Training by optax and the loss itself, all pairs of a batch in one array."""
    _, pairs, _ = made
    optimizer = optax.adam(rate)
    params, state = begun.params, optimizer.init(begun.params)
    loss = {"ipo": losses.ipo, "coin": losses.dpo}[name]
    whole = PairSet.of(pairs.policy, pairs.pairs)
    whole = dataclasses.replace(whole, sizes=whole.sizes[-1:]).with_reference(begun.pairs.known)
    seen = []

    @jax.jit
    def slope(params, batch, turned):
        def mean(params):
            logp = whole.score(params, batch).logp
            logp, reference = (jnp.where(turned, x[:, ::-1], x) for x in (logp, batch.reference))
            return loss(logp, reference).mean(), logp

        return jax.grad(mean, has_aux=True)(params)

    for rows in orders:
        turned = np.isin(rows, swap)[:, None]
        gradient, logp = slope(params, whole.rows(rows), turned)
        seen.append(np.where(turned, logp[:, ::-1], logp))
        update, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, update)
    return params, np.array(seen)


@pytest.mark.parametrize(("name", "labels"), [("coin", "coin"), ("ipo", "given")])
def test_an_arm_is_the_loss_s_own_training(config, made, begun, name, labels):
    """From the start of its seed, with its coins, to its probes: by plain autodiff and optax."""
    pairs = begun.pairs
    found = arms.follow(begun, name, [1, 4])
    course = begun.course(labels)
    swap = course.swapped
    assert labels == "given" or 0 < np.isin(begun.parts.preference, swap).sum() < 4
    index = np.array([course.index(n) for n in range(4)])
    assert sorted(index[:2].ravel()) == sorted(begun.parts.preference)
    params, seen = naively(begun, made, name, index, config.rate, swap)
    np.testing.assert_array_equal(found["index"], index)
    np.testing.assert_allclose(found["seen"], seen, atol=1e-3)
    probes = begun.probes
    moved = pairs.logps(params, probes) - begun.pairs.known[probes]
    assert np.abs(moved).max() > 0.1
    # float32, and Adam divides gradients that are nearly zero by themselves and eps
    np.testing.assert_allclose(found["change"][-1], moved, atol=2e-3 * np.abs(moved).max())
    assert found["diverged"] == -1
    turned = np.isin(index, swap)[..., None]
    expected = np.where(turned, (1, -1), (-1, 1))
    np.testing.assert_array_equal(np.sign(found["pull"][0]), expected[0])


def test_a_warm_up_ends_at_the_rate():
    arm = arms.Arm("dpo", 9, 1.0, warmup=3)
    assert arm.rates == (0.25, 0.5, 0.75, *[1.0] * 6)
    assert arms.Arm("dpo", 2, 2.0).rates == (2.0, 2.0)


def test_an_arm_that_diverges_is_reported_and_the_others_go_on(begun):
    wild = dataclasses.replace(begun.config, rate=3e38)
    found = arms.follow(begun._replace(config=wild), "dpo", [1, 4])
    assert found["diverged"] == 2  # the norms hide it from the second update
    assert np.isfinite(found["seen"][:2]).all()
    assert np.isnan(found["seen"][2:]).all()
    assert np.isnan(found["change"][1]).all()


def test_a_start_is_kept_and_another_run_s_is_refused(config, made, begun, tmp_path):
    subject, pairs, run = made
    first = arms.begin(config, run, pairs, subject.params, 0, tmp_path, "a")
    again = arms.begin(config, run, pairs, subject.params, 0, tmp_path, "a")
    for one, two, three in zip(*map(jax.tree.leaves, (first.params, again.params, begun.params)),
                               strict=True):  # fmt: skip
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    with pytest.raises(ValueError, match=r"0\.npz: a start of another model, data or supervision"):
        arms.begin(config, run, pairs, subject.params, 0, tmp_path, "b")
    hashes = {"model": "m", "data": "d"}
    same = arms.identity_of(dataclasses.replace(config, rate=1.0), hashes)
    assert arms.identity_of(config, hashes) == same
    for change in ({"supervised_rate": 2e-3}, {"supervised_epochs": 2}, {"pairs": 3}):
        assert arms.identity_of(dataclasses.replace(config, **change), hashes) != same
    assert arms.identity_of(config, {**hashes, "model": "other"}) != same


def test_supervision_raises_what_it_shows(config, made, begun):
    subject, pairs, _ = made
    rows = begun.parts.preference
    before, after = (pairs.logps(p, rows)[:, 0] for p in (subject.params, begun.params))
    assert (after > before + 0.1).all()
    np.testing.assert_array_equal(begun.pairs.known[rows, 0], after)


def test_other_kinds_of_responses(made, begun):
    subject, pairs, _ = made
    rows = begun.parts.unseen
    made_of = kinds.probes(pairs, begun.params, rows, subject.tokenizer, 0)
    assert len(made_of) == len(kinds.KINDS) // 2 * len(rows)
    answers = [[pair.tokens[i][pair.starts[i] :] for i in (0, 1)] for pair in made_of.pairs]
    own = [
        [pairs.pairs[row].tokens[i][pairs.pairs[row].starts[i] :] for i in (0, 1)] for row in rows
    ]
    for k, row in enumerate(rows):
        start = pairs.pairs[row].starts[0]
        for i in range(len(kinds.KINDS) // 2):
            pair = made_of.pairs[i * len(rows) + k]
            np.testing.assert_array_equal(
                pair.tokens[0][:start], pairs.pairs[row].tokens[0][:start]
            )
        np.testing.assert_array_equal(answers[len(rows) + k][0], own[k - 1][0])
        mixed, whole = answers[len(rows) + k][1], own[k][0]
        assert mixed[-1] == whole[-1] == subject.tokenizer.eos_id
        texts = [subject.tokenizer.decode(ids[:-1].tolist()) for ids in (mixed, whole)]
        assert texts[0] != texts[1]
        assert sorted(texts[0].split()) == sorted(texts[1].split())
        assert len(answers[2 * len(rows) + k][0]) == len(own[k][0])
    # Greedy: no token of its own is more likely.
    greedy = made_of.rows(range(len(rows)))
    found = made_of.hidden(begun.params, greedy)
    logits = found.hidden[:, 0] @ pairs.policy.unembedding(begun.params).T
    top = np.where(found.is_target[:, 0], logits.argmax(axis=-1), 0)
    np.testing.assert_array_equal(top, found.targets[:, 0])


def test_intervals_draw_seeds_and_then_pairs():
    """Between seeds that differ much the interval is as wide as their means are apart."""
    x = np.array([[0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    assert intervals.clustered(intervals.mean_of, [x], 500) == [0.0, 9.0]
    one = np.arange(3.0)[None]
    low, high = intervals.clustered(intervals.mean_of, [one], 2000)
    assert 0.0 <= low < 0.5
    assert 1.5 < high <= 2.0
    gap = intervals.clustered(lambda a, b: (a - b).mean(axis=-1), [x, x], 100)  # drawn alike
    assert gap == [0.0, 0.0]
    nothing = intervals.clustered(intervals.mean_of, [np.full((2, 3), np.nan)], 10)
    assert all(map(math.isnan, nothing))


def a_world(chosen, coin, sft):
    """Changes of one arm and the controls: every pair moves by as much."""
    config = Protocol(pairs=2, trained=2, unseen=3, resamples=40)
    arrays: dict[str, np.ndarray] = {"lengths": np.full((2, 5, 2), 4)}
    for name, value in {"dpo": chosen, "coin": coin, "sft": sft}.items():
        arrays[f"{name}_change"] = np.full((2, 1, 5, 2), value)
        arrays[f"{name}_diverged"] = np.array([-1, -1])
    found = changes.rows(config, arrays, {"dpo": [8], "coin": [8], "sft": [8]})
    return next(r for r in found if (r["arm"], r["set"]) == ("dpo", "unseen")), found


@pytest.mark.parametrize(
    ("chosen", "coin", "sft", "falls"),
    [(-2.0, -1.0, 0.5, True), (-2.0, -3.0, 0.5, False), (-2.0, -1.0, -2.5, False),
     (0.5, 1.0, 1.0, False)],
)  # fmt: skip
def test_only_what_exceeds_both_controls_is_displacement(chosen, coin, sft, falls):
    row, found = a_world(chosen, coin, sft)
    assert changes.displaced(row) == falls
    assert row["beyond_coin"] == chosen - coin
    assert row["beyond_sft"] == chosen - sft
    assert row["chosen_a_token"] == chosen / 4
    assert row["chosen_fell"] == float(chosen < 0)
    assert "beyond_coin" not in next(r for r in found if r["arm"] == "sft")
    assert f"{chosen:+.2f}" in changes.shown(found)


def test_sentiment_sets_are_data_too(config):
    """Seeds draw from more sentences than one of them needs."""
    _, pairs = settings.load(dataclasses.replace(config, data="short", limit=60))
    assert len(pairs) == 21
    assert (pairs.lengths[:, 0] == pairs.lengths[:, 1]).all()
    assert len(set(pairs.prompts.tolist())) == 21


def test_of_a_seed_that_diverged_nothing_is_said():
    config = Protocol(pairs=2, trained=2, unseen=3, resamples=40)
    arrays: dict[str, np.ndarray] = {"lengths": np.full((2, 5, 2), 4)}
    for name, value in {"dpo": -2.0, "coin": 0.0, "sft": 0.0}.items():
        arrays[f"{name}_change"] = np.full((2, 1, 5, 2), value)
        arrays[f"{name}_diverged"] = np.array([-1, -1])
    arrays["dpo_change"][1], arrays["dpo_diverged"][1] = np.nan, 3
    found = changes.rows(config, arrays, {"dpo": [8], "coin": [8], "sft": [8]})
    row = next(r for r in found if (r["arm"], r["set"]) == ("dpo", "unseen"))
    assert row["diverged"] == 1
    assert not changes.displaced(row)
    assert "dpo (1 diverged)" in changes.shown(found)


@pytest.mark.parametrize(("seeds", "pairs"), [(3, 24), (2, 24), (3, 23)])
def test_a_verdict_takes_three_seeds_and_two_dozen_pairs(seeds, pairs):
    said = tables.judged(seeds, pairs, "The claim holds.")
    if (seeds, pairs) == (3, 24):
        assert said == "The claim holds."
    else:
        expected = f"{seeds} seeds and {pairs} pairs over all of them, expected 3 and 24."
        assert said == f"Too small for a verdict: {expected}"


def test_a_run_s_pairs_are_those_of_its_smaller_set():
    config = Protocol(seeds=3, trained=8, unseen=30)
    assert changes.verdict(config, "holds") == "holds"
    for few in ({"trained": 7}, {"unseen": 7}, {"seeds": 2}):
        assert "Too small" in changes.verdict(dataclasses.replace(config, **few), "holds")
