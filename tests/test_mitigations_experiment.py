"""`experiments.mitigations` on a tiny model: methods against naive ones, numbers, resume."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke
from test_protocol import written

import experiments.mitigations as lab
from experiments.mitigations import measure, protocol
from experiments.protocol import arms, changes, intervals, settings
from experiments.protocol.changes import CONTROLS
from jaxpref.training import courses
from jaxpref.training.optimizers import unit_optimizer

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
    for name in (*config.methods, *CONTROLS):
        assert arrays[f"{name}_change"].shape == (2, 2, 6, 2)
        assert arrays[f"{name}_kl"].shape == (2, 2, 4)
        assert (arrays[f"{name}_kl"] > 0).all()
    assert all(np.isfinite(array).all() for array in arrays.values())
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    names = [row["name"] for row in rows if row["table"] == "methods"]
    assert names == [*config.methods, *CONTROLS]
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed


def test_methods_share_start_and_order_and_then_part(made, arrays):
    config, _, _ = made
    for name in (*config.methods, *CONTROLS):
        np.testing.assert_array_equal(arrays[f"{name}_index"], arrays["dpo_index"])
        if name != protocol.MASK:  # which sees some tokens of each response only
            np.testing.assert_array_equal(arrays[f"{name}_seen"][:, 0], arrays["dpo_seen"][:, 0])
        gap = arrays[f"{name}_change"] - arrays["dpo_change"]
        assert name == "dpo" or np.abs(gap[:, 0]).max() > 1e-4
    half = np.full((2, 2), 0.05)
    np.testing.assert_allclose(arrays["dpo_pull"][:, 0], np.stack([-half, half], axis=-1))
    np.testing.assert_allclose(arrays["dpo_sft_pull"][:, 0], np.stack([-half - 0.1, half], axis=-1))


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = ("1_pcgrad", f"1_{protocol.MASK}")
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_the_summary_says_what_the_arrays_hold(made, arrays):
    config, _, _ = made
    found = {r["name"]: r for r in lab.summarise(config, arrays) if r["table"] == "methods"}
    end = arrays["dpo_change"][:, 1, 2:]
    margin = end[..., 0] - end[..., 1]
    row = found["dpo"]
    assert row["updates"] == 2
    assert row["unseen_chosen"] == pytest.approx(end[..., 0].mean(), rel=1e-5)
    assert row["unseen_margin"] == pytest.approx(margin.mean(), rel=1e-5)
    assert row["unseen_right"] == (margin > 0).mean()
    now = arrays["logp"][:, 2:] + end
    assert row["unseen_ranked"] == (now[..., 0] > now[..., 1]).mean()
    assert row["unseen_kl"] == pytest.approx(arrays["dpo_kl"][:, 1].mean(), rel=1e-5)
    trained = arrays["dpo_change"][:, 1, :2, 0]
    assert row["trained_chosen"] == pytest.approx(trained.mean(), rel=1e-5)
    # DPO is its own measure.
    assert row["reached"] == (margin.mean(axis=-1) > 0).sum() > 0
    assert row["matched_margin"] == pytest.approx(row["unseen_margin"], rel=1e-5)
    assert row["matched_over_dpo"] == 0


# The methods, each against its definition: whole gradients, one response at a time.


@pytest.fixture(scope="module")
def long(tiny_model):
    """Two batches of the sentiment set, whose responses differ in one token; no supervision."""
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), methods=("dpo", *protocol.CHANGES), supervised_epochs=0,
        pairs=4, unseen=1, batch=2, seeds=1, optimizer="sgd", rate=0.3, limit=90,
    )  # fmt: skip
    subject, pairs = settings.load(config)
    short = int(np.quantile(pairs.needs, 0.5, method="lower"))
    pairs = dataclasses.replace(pairs, sizes=(short, *pairs.sizes))
    run = courses.programs(pairs, protocol.objectives(config), protocol.changes_of(config))
    begun = arms.begin(config, run, pairs, subject.params, 0)

    @jax.jit
    def tokens(params, ids):
        hidden = pairs.policy.hidden(params, ids[None])[0]
        return jax.nn.log_softmax(hidden @ pairs.policy.unembedding(params).T)

    return config, begun, tokens


def token_logps(tokens, params, pair, side):
    """Of a response alone, without packing or padding."""
    ids, start = jnp.asarray(pair.tokens[side]), pair.starts[side]
    return tokens(params, ids)[jnp.arange(start - 1, len(ids) - 1), ids[start:]]


def naively(long, index, pulls_of, parts_of):
    """Plain gradient descent; of each update the two numbers of each pair, and their pulls."""
    config, begun, tokens = long
    params, seen, pulls = begun.params, [], []
    for rows in index:
        total = jax.tree.map(jnp.zeros_like, params)
        for row in rows:
            pair = begun.pairs.pairs[row]

            def both(params, pair=pair):
                each = [token_logps(tokens, params, pair, side) for side in (0, 1)]
                return jnp.stack([x[keep].sum() for x, keep in zip(each, parts_of(pair),
                                                                   strict=True)])  # fmt: skip

            logp, slopes = both(params), jax.jacrev(both)(params)
            flat = jnp.concatenate([x.reshape(2, -1) for x in jax.tree.leaves(slopes)], axis=1)
            ratio = np.asarray(logp - both(begun.params), np.float64)
            weight = config.beta / (1 + math.exp(config.beta * (ratio[0] - ratio[1])))
            pull = np.array(pulls_of(np.asarray(flat @ flat.T, np.float64), weight))
            seen.append(logp)
            pulls.append(pull)
            mean = pull / len(rows)
            total = jax.tree.map(
                lambda t, s, mean=mean: t + jnp.tensordot(jnp.asarray(mean, s.dtype), s, 1),
                total, slopes,
            )  # fmt: skip
        params = jax.tree.map(lambda p, g: p - config.rate * g, params, total)
    shape = (*index.shape, 2)
    return params, np.array(seen).reshape(shape), np.array(pulls).reshape(shape)


def pulls_of(name):
    """``(gram, d) -> pull`` of a method, from ``(-d, d)`` of DPO, by its formula."""

    def formula(gram, d):
        (w, dot), (_, l) = gram
        against = max(dot, 0.0)
        return {
            "normalised": (-d / w**0.5, d / l**0.5),
            "calibrated": (-d * (l / w) ** 0.25, d * (w / l) ** 0.25),
            "projected": (-d - d * against / w, d),
            "pcgrad": (-d - d * against / w, d + d * against / l),
            protocol.MASK: (-d, d),
        }[name]

    return formula


def differing(name):
    """Which scored tokens a method reads: of the mask those that are not the other's."""

    def parts(pair):
        ids = [x[start:] for x, start in zip(pair.tokens, pair.starts, strict=True)]
        other = ids[0] != ids[1]  # one token for another, and then the same text
        assert other.sum() == 1
        return [other if name == protocol.MASK else np.ones_like(other)] * 2

    return parts


@pytest.mark.parametrize("name", [*protocol.CHANGES, protocol.MASK])
def test_a_method_is_its_definition(long, name):
    """Gram, pull and step of two updates against jacobians, formula and plain descent."""
    config, begun, _ = long
    pairs = begun.pairs
    assert max(len(pairs.parts(row)) for row in begun.parts.preference.reshape(-1, 2)) == 2
    shown = measure.contrasted(begun) if name == protocol.MASK else begun.pairs
    arm = arms.arm_of(config, "dpo" if name == protocol.MASK else name, 2)
    found = courses.train(
        begun.run, shown, begun.params, begun.course("given"), arm.loss, arm.rates,
        optimizer=unit_optimizer("sgd"),
    )  # fmt: skip
    params, seen, pulls = naively(long, found.index, pulls_of(name), differing(name))
    np.testing.assert_allclose(found.seen, seen, atol=2e-4)
    np.testing.assert_allclose(found.pull, pulls, rtol=2e-3)
    assert name == protocol.MASK or np.abs(np.abs(pulls) / 0.05 - 1).max() > 0.1
    for start, end, naive in zip(*map(jax.tree.leaves, (begun.params, found.params, params)),
                                 strict=True):  # fmt: skip
        far = np.abs(naive - start).max()
        assert far > 0
        np.testing.assert_allclose(end - start, naive - start, atol=2e-3 * far)


def test_divergence_is_that_of_whole_softmaxes(long):
    _, begun, tokens = long
    rows = begun.parts.preference[:2]
    moved = jax.tree.map(lambda x: 1.1 * x, begun.params)
    kl_of = measure.divergence(begun.pairs, begun.params, rows)
    expected = []
    for row in rows:
        pair, each = begun.pairs.pairs[row], []
        for ids, start in zip(pair.tokens, pair.starts, strict=True):
            now, then = (tokens(p, jnp.asarray(ids))[start - 1 : -1] for p in (moved, begun.params))
            each += [float(x) for x in (jnp.exp(now) * (now - then)).sum(axis=-1)]
        expected.append(np.mean(each))
    np.testing.assert_allclose(kl_of(moved), expected, rtol=1e-3)
    assert (kl_of(begun.params) == 0).all()


def test_equal_margin_by_hand():
    margin, chosen = np.array([0.0, 1.0, 3.0, 2.0]), np.array([[0.0], [-1.0], [-2.0], [5.0]])
    for level, place, value in ((0.5, 0.5, -0.5), (2.0, 1.5, -1.5), (3.0, 2.0, -2.0)):
        assert changes.reached(margin, level) == place  # the first time
        assert changes.between(chosen, place) == value
    for level in (3.5, 0.0, -1.0, math.nan):
        assert math.isnan(changes.reached(margin, level))
    assert np.isnan(changes.between(chosen, math.nan)).all()
    x = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    np.testing.assert_array_equal(intervals.mean_of_known(x), [2.0, np.nan])


def a_world(config, ends):
    """Changes that grow evenly, to the given chosen ones, trained and unseen, and margins."""
    arrays = {"lengths": np.full((2, 6, 2), 3), "logp": np.zeros((2, 6, 2))}
    for name, (trained, unseen, margin) in ends.items():
        change = np.full((2, 2, 6, 2), float(trained))
        change[:, :, 2:] = unseen
        change[..., 1] -= margin
        change[:, 0] /= 2
        arrays |= {f"{name}_change": change, f"{name}_diverged": np.array([-1, -1])}
        arrays[f"{name}_kl"] = np.tile(np.array([0.5, 1.0])[:, None], (2, 1, 4)) * margin
    return arrays


@pytest.mark.usefixtures("any_size")
def test_the_verdict_names_who_keeps_them_up_at_the_margin():
    names = ("dpo", "cpo", "pcgrad", "dpop", "cal_dpo")
    config = dataclasses.replace(lab.SMOKE, methods=names, resamples=20)
    arrays = a_world(config, {
        "dpo": (1, -2, 4), "cpo": (1, 1, 8), "pcgrad": (1, -1.5, 4), "dpop": (1, 5, 3),
        "cal_dpo": (1, -9, 8), "coin": (0, -1, 0), "sft": (1, 1, 1),
    })  # fmt: skip
    arrays["cal_dpo_diverged"][1] = 1
    rows = lab.summarise(config, arrays)
    by = {r["name"]: r for r in rows if r["table"] == "methods"}
    assert [by[n]["reached"] for n in names] == [2, 2, 2, 0, 2]
    assert [by[n]["matched_chosen"] for n in names[:3]] == [-2, 0.5, -1.5]
    assert by["cpo"]["matched_kl"] == 4  # half way of 8
    assert by["cpo"]["matched_beyond_coin"] == 0.5 + 0.5  # the coin's, half way too
    assert by["pcgrad"]["matched_over_dpo"] == 0.5
    said = lab.report(config, rows)
    for words in (
        "an epoch: displacement, below the start and both controls.",
        "above their start: cpo (+0.50, KL 1.0 x DPO's).",
        "not clearly than their start: pcgrad (-1.50, KL 1.0 x DPO's, displaced).",
        "not higher than under DPO: cal_dpo (-4.50, KL 1.0 x DPO's, displaced).",
        "they do not reach it: dpop (0 of 2 seeds).",
        "Diverged: cal_dpo (1 seeds).",
    ):
        assert words in said
    lab.draw(config, arrays)


@pytest.mark.usefixtures("any_size")
def test_a_method_that_diverged_says_nothing_and_the_others_do():
    config = dataclasses.replace(lab.SMOKE, methods=("dpo", "cpo"), resamples=20)
    ends = {"dpo": (1, -2, 4), "cpo": (1, 1, 8), "coin": (0, -1, 0), "sft": (1, 1, 1)}
    arrays = a_world(config, ends)
    for name in ("change", "kl"):
        arrays[f"cpo_{name}"][1] = np.nan
    arrays["cpo_diverged"][1] = 0
    rows = lab.summarise(config, arrays)
    by = {r["name"]: r for r in rows if r["table"] == "methods"}
    assert by["cpo"]["reached"] == 1
    assert by["cpo"]["matched_chosen"] == 0.5
    assert math.isnan(by["cpo"]["unseen_ranked"])
    said = lab.report(config, rows)
    assert "they do not reach it: cpo (1 of 2 seeds)" in said
    assert "nan" not in said.partition("unseen pairs after that epoch")[2]
    end = next(r for r in rows if (r.get("arm"), r.get("updates")) == ("cpo", 2))
    assert math.isnan(end["chosen_fell"])  # and not that none fell
    lab.draw(config, arrays)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ("dpo", "magic")}, "methods: got magic, expected some of dpo, dpo_sft"),
        ({"methods": ("cpo",)}, "each once and dpo among them"),
        ({"methods": ("dpo", "dpo")}, "each once and dpo among them"),
        ({"epochs": (0.5,)}, "with 1 among them"),
        ({"beta": 0.0}, "beta: got 0.0, expected above 0"),
        ({"sft_weight": -1.0}, "sft_weight: got -1.0, expected at least 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(made, change, said):
    with pytest.raises(ValueError, match=said):
        lab.load(dataclasses.replace(made[0], **change))
