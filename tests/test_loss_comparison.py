"""`experiments.loss_comparison` on a tiny model: numbers, choice of the rate, resume, command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import smoke

import experiments.loss_comparison as lab
from experiments.loss_comparison import measure, protocol, summary
from jaxpref.data import batches
from jaxpref.training.objectives import NAMES

WORDS = ("tea", "milk", "rain", "snow", "fish", "bread", "salt", "wind")


pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """All runs of this file have the same pairs and settings, so the same programs."""
    kept, make = [], measure.programs

    def programs(*some):
        if not kept:
            kept.append(make(*some))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "programs", programs)
        patch.setattr(summary, "DRAWS", 5)
        yield


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    rows = [{"prompt": "Drink", "chosen": " tea" * 40, "rejected": " no"}]  # too long
    for word in WORDS:
        rows.append({"prompt": f"I like {word}.", "chosen": " Good.", "rejected": f" No {word}!"})
    (cwd / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        lab.SMOKE, losses=("dpo", "sft", "kto"), rates=(1e-3, 3e-3), train=4,
        model=str(tiny_model), data=str(cwd / "pairs.jsonl"),
    )  # fmt: skip
    return config, *smoke.command(lab, config, cwd)


@pytest.fixture(scope="module")
def arrays(made):
    return dict(np.load(made[1] / "arrays.npz"))


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed = made
    shapes = {
        "logp": (3, 1, 2, 3, 8, 2), "entropy": (3, 1, 2, 3, 8, 2), "kl": (3, 1, 2, 3, 2, 2),
        "pull": (3, 1, 4, 2), "gram": (1, 6, 2, 6, 2), "lengths": (1, 8, 2), "step": (3,),
    }  # fmt: skip
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert (folder / "figure.png").stat().st_size > 10_000
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows if row["kind"] == "loss"] == ["dpo", "kto", "sft"]
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed
    assert (arrays["kl"][:, :, :, 0] == 0).all()
    assert (arrays["kl"][:, :, :, 1:] > 0).all()


def test_training_and_measures_are_those_of_plain_autodiff(made, arrays):
    """KTO by its formula through whole softmaxes of unpacked sequences, Adam by hand."""
    config, _, _ = made
    subject, pairs = lab.load(config)
    batch = pairs.rows(batches.order(len(pairs), 8, 0, 0))
    tokens, _, scored = map(jnp.asarray, batch[:3])
    mask = scored[:, :, 1:]

    def distribution(params, at):  # [some 2 time vocab], of next tokens
        some = tokens[at].reshape(-1, tokens.shape[-1])
        hidden = subject.policy.hidden(params, some)
        logits = hidden @ subject.policy.unembedding(params).T
        return jax.nn.log_softmax(logits).reshape(len(at), 2, tokens.shape[-1], -1)[:, :, :-1]

    def logp_of(params, at):
        each = jnp.take_along_axis(distribution(params, at), tokens[at, :, 1:, None], axis=-1)
        return jnp.where(mask[at], each[..., 0], 0).sum(axis=-1)

    everything = np.arange(8)
    both = jax.jit(lambda params: (distribution(params, everything), logp_of(params, everything)))
    first, reference = both(subject.params)
    np.testing.assert_allclose(arrays["logp"][1, 0, 1, 0], reference, rtol=1e-5)
    scale = np.sqrt((arrays["pull"][1, 0] ** 2).mean())

    @jax.jit
    def slope(params, at):
        def loss(params):
            u = logp_of(params, at) - reference[at]
            z = jax.nn.relu(jax.lax.stop_gradient(u).mean())
            gap = 0.1 * (u - z) * jnp.array([1.0, -1.0])[None]
            return jax.nn.sigmoid(-gap).mean() / scale

        return jax.grad(loss)(params)

    params, mean, square = subject.params, 0.0, 0.0
    for number in range(2):
        gradient = slope(params, batches.order(4, 2, 0, number))
        mean = jax.tree.map(lambda g, m: 0.9 * m + 0.1 * g, gradient, _tree(mean, gradient))
        square = jax.tree.map(lambda g, v: 0.999 * v + 0.001 * g * g, gradient,
                              _tree(square, gradient))  # fmt: skip
        sizes = 1 - 0.9 ** (number + 1), 1 - 0.999 ** (number + 1)
        params = jax.tree.map(
            lambda p, m, v, sizes=sizes: (
                p - 3e-3 * (m / sizes[0]) / (jnp.sqrt(v / sizes[1]) + 1e-8)
            ).astype(p.dtype),
            params, mean, square,
        )  # fmt: skip
    last, after = both(params)
    moved = arrays["logp"][1, 0, 1, -1] - arrays["logp"][1, 0, 1, 0]
    expected = after - reference
    assert np.abs(moved).max() > 0.1
    # float32, and Adam divides gradients that are nearly zero by themselves and eps
    np.testing.assert_allclose(moved, expected, atol=5e-3 * np.abs(moved).max())
    count = mask.sum(axis=-1)
    entropy = np.where(mask, -(np.exp(last) * last).sum(axis=-1), 0).sum(axis=-1) / count
    np.testing.assert_allclose(arrays["entropy"][1, 0, 1, -1], entropy, rtol=1e-3)
    kl = np.where(mask, (np.exp(last) * (last - first)).sum(axis=-1), 0).sum(axis=-1) / count
    np.testing.assert_allclose(arrays["kl"][1, 0, 1, -1], kl[6:], rtol=2e-2, atol=1e-6)


def _tree(value, like):
    return jax.tree.map(jnp.zeros_like, like) if isinstance(value, float) else value


def test_predictions_are_sums_of_the_grams(made, arrays):
    config, _, _ = made
    gram, pull = arrays["gram"][0], arrays["pull"][0, 0]
    found = summary.predicted(config, arrays)
    every = -np.einsum("iajb,jb->ia", gram[:, :, :4], pull)
    np.testing.assert_allclose(found["all"][0, 0] * 6, every, rtol=1e-4, atol=1e-4)
    own = -np.einsum("iaib,ib->ia", gram[:4, :, :4], pull)
    np.testing.assert_allclose(found["own"][0, 0], own, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pull, np.array([[-0.05, 0.05]] * 4), rtol=1e-5)


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    smoke.same_after_a_kill(lab, config, folder, tmp_path, ("kto_0",))


def test_every_loss_has_its_place_in_the_table():
    assert {protocol.family(name) for name in NAMES} <= {*protocol.FAMILIES}


def a_world(*margins):
    """Two losses at three rates, whose pairs gain these margins ``[pairs]`` at each rate."""
    config = dataclasses.replace(lab.SMOKE, losses=("dpo", "sft"), rates=(1.0, 2.0, 3.0), looks=1)
    logp = np.full((2, 1, 3, 2, 6, 2), -5.0)
    for rate, each in enumerate(margins):
        logp[:, 0, rate, 1, :, 0] += np.array(each) / 2
        logp[:, 0, rate, 1, :, 1] -= np.array(each) / 2
    pull = np.tile([-0.05, 0.05], (2, 1, 2, 1))
    pull[1] = [-1, 0]
    gram = np.zeros((1, 4, 2, 4, 2))
    for i in range(4):
        gram[0, i, :, i] = [[1.0, 2.0], [2.0, 5.0]]
    return config, {
        "logp": logp, "entropy": np.ones_like(logp), "kl": np.full((2, 1, 3, 2, 2, 2), 0.1),
        "pull": pull, "gram": gram, "lengths": np.full((1, 6, 2), 5.0), "step": np.array([0, 2]),
    }  # fmt: skip


def test_the_rate_is_chosen_on_validation_pairs_alone():
    # Pairs: two of training, two of validation, two of test.
    config, arrays = a_world([9, 9, 1, -1, 9, 9], [0, 0, 1, 1, 0, 0], [9, 9, -1, -1, 9, 9])
    assert summary.chosen_rates(config, arrays).tolist() == [[1], [1]]  # more in the right order
    arrays["logp"][0, :, :, :, [0, 1, 4, 5]] = np.nan
    arrays["logp"][1, :, 2, :, [0, 1, 4, 5]] += 100
    assert summary.chosen_rates(config, arrays).tolist() == [[1], [1]]
    config, arrays = a_world([0, 0, 1, 1, 0, 0], [0, 0, 1, 2, 0, 0], [0, 0, 0.5, 1, 0, 0])
    assert summary.chosen_rates(config, arrays).tolist() == [[1], [1]]  # the larger margins
    config, arrays = a_world([0, 0, 1, 2, 0, 0], [0, 0, 2, 1, 0, 0], [0, 0, np.nan, 9, 0, 0])
    assert summary.chosen_rates(config, arrays).tolist() == [[0], [0]]  # the smallest; never NaN


@pytest.mark.usefixtures("any_size")
def test_the_summary_and_the_verdict_follow_the_numbers():
    same = [3.0, 1.0, 1.0, 1.0, 2.0, -1.0]
    config, arrays = a_world(same, same, same)
    arrays["logp"][0, :, :, 1] -= 4  # DPO's fall, SFT's do what their margins say
    rows = lab.summarise(config, arrays)
    dpo, sft = rows[:2]
    assert (dpo["rates"], dpo["train_chosen"], dpo["train_rejected"]) == ([1.0], -3.0, -5.0)
    assert (dpo["test_margin"], dpo["test_accuracy"], dpo["test_plain"]) == (0.5, 0.5, 0.5)
    assert dpo["test_chosen_token"] == pytest.approx(dpo["test_chosen"] / 5)
    assert (dpo["measured_both_down"], dpo["all_both_down"], dpo["agree_all"]) == (1, 1, 1)
    assert (sft["measured_ideal"], sft["all_both_up"], sft["agree_own"]) == (1, 1, 0)
    # These pairs are orthogonal: DPO moves them by (-1, -3), SFT by (1, 2).
    assert dpo["share_all"] == pytest.approx(-1 / 4)
    assert sft["share_all"] == pytest.approx(1 / 3)
    assert dpo["share_measured"] == pytest.approx(-3 / 8)
    printed = lab.report(config, rows)
    assert (
        "On training pairs the chosen response rises under 1 of 2 losses: sft and does" in printed
    )
    assert "Of 2 runs 0 chose the largest rate and 2 the smallest" in printed
    assert "The claim cannot be judged" in printed  # of two losses
    lab.draw(config, arrays)
    plt.close("all")


def test_trivial_predictors_stand_beside_the_grams():
    """DPO's chosen responses fall, SFT's rise: the pulls alone would have both rise."""
    config, arrays = a_world(*[[1.0] * 6] * 3)
    arrays["logp"][0, :, :, 1] -= 4
    arrays["pull"][0, :, :, 1] = 0.15
    found = {r["name"]: r for r in lab.summarise(config, arrays) if r["kind"] == "predictor"}
    assert tuple(found) == tuple(summary.PREDICTORS)
    signs = {name: row["signs"] for name, row in found.items()}
    assert signs == {"all": 1, "own": 1, "ratio": 0.5, "up": 0.5, "test": 0, "test_ratio": 0.5,
                     "test_up": 0.5}  # fmt: skip
    np.testing.assert_allclose(summary.share(summary.predicted(config, arrays)["ratio"])[:, 0],
                               [0.05 / 0.2, 1])  # fmt: skip
    assert np.isnan(found["up"]["rho"])  # it has no order


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    ("rho", "low", "told"),
    [(0.9, 0.5, "holds:"), (0.9, 0.1, "holds in part"), (0.1, 0.0, "does not hold"),
     (0.79, 0.5, "holds no better than by the pull ratio alone")],
)  # fmt: skip
def test_the_claim_is_judged(rho, low, told):
    config, arrays = a_world(*[[1.0] * 6] * 3)
    rows = lab.summarise(config, arrays)
    for row in rows[2:]:
        row |= {"rho": rho if row["name"] == "all" else 0.8, "low": low, "high": 1.0}
    assert f"The claim {told}" in lab.report(config, rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates: got 0, expected at least 1"),
        ({"batch": 3}, "batch: got 3, expected at most the 2 pairs"),
        ({"rates": (2e-6, 1e-6)}, r"rates: got \(2e-06, 1e-06\), expected numbers above 0, rising"),
        ({"losses": ("dpo", "nonsense")}, "loss: got nonsense, expected a name"),
        ({"losses": ("tdpo1",)}, "loss: got tdpo1, which reads divergences of single tokens"),
        ({"losses": ("dpo", "dpo")}, "expected names, each once"),
        ({"supervised": -1}, "supervised: got -1, expected at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        lab.load(dataclasses.replace(lab.SMOKE, **settings))


def test_too_few_pairs_are_named(made):
    config, _, _ = made
    with pytest.raises(ValueError, match="got 9 pairs, expected at most the 8 that fit into 28"):
        lab.load(dataclasses.replace(config, validation=3))
