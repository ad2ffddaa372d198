"""`experiments.ches_percentiles` on a tiny model: its subsets, changes, resume, command line."""

import dataclasses
import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

from experiments import ches_percentiles as lab
from experiments.ches_percentiles import measure, protocol, summary
from jaxpref import losses
from jaxpref.data import batches
from jaxpref.data.files import DataError

RATE = 1e-4


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(lab.SMOKE, model=str(tiny_model), rate=RATE)
    return config, *smoke.command(lab, config, cwd)


@pytest.fixture(scope="module")
def arrays(made):
    return dict(np.load(made[1] / "arrays.npz"))


@pytest.fixture(scope="module")
def loaded(made):
    return protocol.load(made[0])


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed = made
    assert arrays["scores"].shape == (1, 4, 10)
    assert arrays["rows"].shape == (1, 4, 2, 4)
    assert arrays["change"].shape == (1, 2, 4, 2, 4, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert len(json.loads((folder / "summary.json").read_text())["rows"]) == 2 * 4
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2 * 4 * 2
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed


def test_subsets_are_at_the_ends_of_their_scores(arrays):
    """The four lowest scores of ten, and the four highest, in rising order of place."""
    for scores, rows in zip(arrays["scores"][0], arrays["rows"][0], strict=True):
        for places, best in zip(rows, (scores, -scores), strict=True):
            assert places.tolist() == sorted(places)
            assert sorted(best[places]) == sorted(best)[:4]


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


def test_lengths_and_scores_are_of_the_pairs_of_the_pool(arrays, loaded):
    config_names = lab.SMOKE.scores
    pairs = [loaded.encoded[row] for row in arrays["pool"][0]]
    lengths = [[len(t) - s for t, s in zip(*p[:2], strict=True)] for p in pairs]
    np.testing.assert_array_equal(arrays["lengths"][0], lengths)
    by = dict(zip(config_names, arrays["scores"][0], strict=True))
    np.testing.assert_array_equal(by["length_difference"], [n - m for m, n in lengths])
    policy, params = loaded.subject[:2]
    sums = []
    for row in arrays["pool"][0]:
        tokens, _, scored = (x[row] for x in loaded.problem.arrays)
        states = np.asarray(jax.jit(policy.hidden)(params, tokens[:, :-1]))
        sums.append([h[at[1:]].sum(axis=0) for h, at in zip(states, scored, strict=True)])
    for found, (w, l) in zip(by["ches"], sums, strict=True):
        np.testing.assert_allclose(found, w @ l - w @ w, rtol=0, atol=1e-5 * (w @ w))


@pytest.mark.parametrize(("loss", "at"), [("dpo", 0), ("ipo", 1)])
def test_changes_are_those_of_a_naive_training(made, arrays, loaded, loss, at):
    """Each response encoded apart, all logits, RMSprop written out; two updates of two pairs."""
    config = made[0]
    policy, params = loaded.subject[:2]
    rows = arrays["pool"][0][arrays["rows"][0, 0, at]]
    tokens, _, scored = (jnp.asarray(x[rows]) for x in loaded.problem.arrays)
    margin_loss = {"dpo": functools.partial(losses.dpo, beta=0.1),
                   "ipo": functools.partial(losses.ipo, tau=0.01)}[loss]  # fmt: skip

    def logp(params, index):
        flat = tokens[index].reshape(2 * len(index), -1)
        logits = policy.hidden(params, flat[:, :-1]) @ policy.unembedding(params).T
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), flat[:, 1:, None], axis=2)
        each = each[..., 0].reshape(len(index), 2, -1)
        return jnp.where(scored[index][..., 1:], each, jnp.zeros_like(each)).sum(axis=2)

    @jax.jit
    def update(params, square, index, reference):
        def mean_loss(params):
            return margin_loss(logp(params, index), reference).mean()

        gradient = jax.grad(mean_loss)(params)
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, square, gradient)
        move = [params, gradient, square]
        return jax.tree.map(lambda p, g, v: p - RATE * g / (jnp.sqrt(v) + 1e-8), *move), square

    every = jnp.arange(4)
    start = jax.jit(logp)(params, every)
    moving, square = params, jax.tree.map(jnp.zeros_like, params)
    for number in range(2):
        index = jnp.asarray(batches.order(4, 2, 0, number))
        moving, square = update(moving, square, index, start[index])
    expected = np.asarray(jax.jit(logp)(moving, every) - start)
    found = arrays["change"][0, config.losses.index(loss), 0, at]
    assert np.abs(expected).min() > 1e-3  # far above rounding
    # RMSprop's first step is the gradient's sign: rounding flips that of the smallest entries.
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-3)


def test_points_are_one_a_pair(arrays, made):
    """By a dictionary: a pair that several trainings share has the mean of its changes."""
    config = made[0]
    for own in (True, False):
        expected: dict[int, list[float]] = {}
        for j in range(len(config.scores)):
            for k in range(2 if j == 0 or not own else 0):
                for i, place in enumerate(arrays["rows"][0, j, k]):
                    pair = arrays["pool"][0, place]
                    expected.setdefault(pair, []).append(arrays["change"][0, 1, j, k, i, 0])
        found = summary.points(config, arrays, "ipo", "ches", own=own)
        want = [np.mean(expected[pair]) for pair in sorted(expected)]
        np.testing.assert_allclose(found["sum"], want, rtol=1e-6)
        np.testing.assert_allclose(found["token"], want / found["chosen"], rtol=1e-6)
        where = {pair: i for i, pair in enumerate(arrays["pool"][0])}
        scores = [arrays["scores"][0, 0, where[pair]] for pair in sorted(expected)]
        np.testing.assert_array_equal(found["score"], scores)


def test_the_verdict_follows_the_numbers(made, arrays):
    """Changes that fall with the score, then that rise with it, without any training."""
    config = dataclasses.replace(made[0], scores=("ches", "random"), losses=("dpo",))
    some = {name: arrays[name][:, [0, 3]] for name in ("scores", "rows")}
    some |= {name: arrays[name] for name in ("pool", "lengths", "start", "left_out")}
    told = []
    for sign in (-1, 1):
        values = summary._of_rows(some, some["scores"][:, 0])  # of CHES, in all subsets
        middle = np.median(some["scores"][0, 0])
        change = np.stack([sign * (values - middle), values * 0], axis=-1)[:, None]
        rows = lab.summarise(config, some | {"change": change})
        assert rows[0]["all"]["sum"]["spearman"] == pytest.approx(sign)
        told.append(lab.report(config, rows))
    assert "one down: it holds here" in told[0]
    assert "better than chance over the pairs of all subsets: CHES" in told[0]
    assert "one down: not the whole of it here" in told[1]
    assert "CHES and sums: +1.00 (+1.00 to +1.00)" in told[1]
    assert told[1].count("it did not order them to begin with") >= 1


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = ("0_dpo_ches_100", "0_ipo_random_0")
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_a_subset_of_two_scores_is_trained_once(made, arrays, loaded, monkeypatch):
    config, trained = made[0], []

    def fake(config, seed, loss, rows, *rest):
        trained.append((loss, tuple(rows)))
        return np.full((len(rows), 2), len(trained), float)

    monkeypatch.setattr(measure, "train", fake)
    drawn = {name: arrays[name][0] for name in ("pool", "start")}
    one = np.arange(10.0)
    drawn["scores"] = np.stack([one, one, np.roll(one, 3), one])
    found = measure.trainings(config, 0, drawn, loaded, measure.Programs(None, None), None)
    assert len(trained) == len(set(trained)) == 8
    np.testing.assert_array_equal(found["change"][:, 0], found["change"][:, 1])
    np.testing.assert_array_equal(found["change"][:, 0], found["change"][:, 3])


def test_pairs_that_do_not_fit_are_counted(tiny_model, tmp_path, capsys):
    """Of four rows one has the same response twice, and one is too long."""
    rows = [
        {"prompt": "Is it late?", "chosen": " No.", "rejected": " Never."},
        {"prompt": "Is it late?", "chosen": " Yes.", "rejected": " Yes."},
        {"prompt": "Is it late? " * 9, "chosen": " No.", "rejected": " Maybe."},
        {"prompt": "Is it early?", "chosen": " No.", "rejected": " Yes, it is."},
    ]
    file = tmp_path / "pairs.jsonl.gz"
    with gzip.open(file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=str(file), bad="skip", limit=16, pairs=2, subset=2
    )
    found = protocol.load(config)
    assert found.left_out == {"unusable": 1, "too_long": 1}
    assert len(found.encoded) == 2
    (skipped,) = protocol.hashes(config)["skipped"]
    assert skipped.startswith("pairs.jsonl.gz, line 2: ")  # and no folder
    with pytest.raises(DataError, match="line 2"):
        protocol.load(dataclasses.replace(config, bad="error"))
    measure._tell(found)
    told = capsys.readouterr().err
    assert told == "2 pairs; left out: 1 that cannot be used, 1 too long\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs: got 0, expected at least 1"),
        ({"pairs": 97}, "pairs: got 97, expected 16 to 96, the pairs that fit 96 tokens"),
        ({"subset": 10}, "batch: got 4, expected a divisor of 10 pairs"),
        ({"rate": 0.0}, "rate: got 0.0, expected a number above 0"),
        ({"scores": ("chess",)}, r"scores: got \('chess',\), expected some of ches, "),
        ({"losses": ("dpo", "dpo")}, "losses: got .* once each"),
        ({"percentiles": (50, 0)}, r"percentiles: got \(50, 0\), expected rising numbers"),
    ],
)
def test_bad_settings_are_named(tiny_model, settings, message):
    with pytest.raises(ValueError, match=message):
        protocol.load(dataclasses.replace(lab.Config(model=str(tiny_model)), **settings))
