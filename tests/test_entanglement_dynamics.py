"""`experiments.entanglement_dynamics` on a tiny model: numbers, resume, command line."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
import smoke

import experiments.entanglement_dynamics as lab
from experiments import common
from jaxpref import losses
from jaxpref.data import batches
from jaxpref.training.step import init_state, make_step


@pytest.fixture(autouse=True, scope="module")
def as_optax_needs_it():
    """optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def written(folder, count):
    """A file of pairs, two of which do not fit: one is too long, one has no difference."""
    words = ("tea", "milk", "rain", "snow", "fish", "bread", "salt", "wind", "wood", "iron")
    rows = [{"prompt": "Drink", "chosen": " tea" * 40, "rejected": " no"}]
    rows += [{"prompt": "Drink", "chosen": " tea", "rejected": " tea"}]
    for word in words[:count]:
        rows.append({"prompt": f"I like {word}.", "chosen": " Good.", "rejected": f" No {word}!"})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """All runs of this file that train have the same pairs and settings, so the same programs."""
    module = sys.modules["experiments.entanglement_dynamics.measure"]
    make, kept = module.programs, []

    def programs(config, problem):
        if not kept:
            kept.append(make(config, problem))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "programs", programs)
        yield kept


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, losses=("dpo", "simpo", "dpop", "sft"), model=str(tiny_model),
        data=written(cwd, 8), bad="skip", supervised=1, supervised_rate=1e-3, rate=1e-3, limit=32,
    )  # fmt: skip
    return config, *smoke.command(lab, config, cwd)


@pytest.fixture(scope="module")
def arrays(made):
    return dict(np.load(made[1] / "arrays.npz"))


@pytest.fixture(scope="module")
def begun(made):
    """The problem, the first seed's pairs and the parameters of its start, made by hand."""
    config, _, _ = made
    subject, problem = lab.load(config)
    batch = problem.rows(batches.order(len(problem), 6, 0, 0))._replace(reference=np.zeros((6, 2)))
    rows = batches.order(4, 2, 0, 0)
    update, _ = by_make_step(problem, "sft", 1e-3)
    return subject, problem, batch, update(subject.params, batch, [rows])


def by_make_step(problem, name, rate):
    """Training by the library's step, which differentiates the loss itself."""
    optimizer = optax.adam(rate)
    step = make_step(problem.score, lab.LOSSES[name], optimizer)

    def update(params, batch, orders):
        state = init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(0))
        for rows in orders:
            state, _, _ = step(state, jax.tree.map(lambda x, rows=rows: x[rows], batch))
        return state.params

    return update, optimizer


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed = made
    shapes = {
        "logp": (4, 2, 3, 6, 2), "pull": (4, 2, 3, 6, 2), "gram": (4, 2, 3, 2, 2, 2),
        "together": (2, 2, 2, 2, 2), "lengths": (2, 6, 2), "step": (3,),
    }  # fmt: skip
    assert {name: array.shape for name, array in arrays.items()} == shapes
    assert all(np.isfinite(array).all() for array in arrays.values())
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows if row["kind"] == "loss"] == list(config.losses)
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "After 3 updates the chosen response is up under" in printed
    assert lab.report(config, lab.summarise(config, arrays)) in printed


def test_every_loss_starts_from_the_same_numbers(arrays):
    for name in ("logp", "gram"):
        assert (arrays[name][:, :, 0] == arrays[name][:1, :, 0]).all(), name
    assert np.abs(arrays["logp"][:, :, -1] - arrays["logp"][:, :, 0]).min(axis=(2, 3)).max() > 0
    own = np.einsum("sijik->sijk", arrays["together"])
    np.testing.assert_allclose(own, arrays["gram"][0, :, 0], rtol=1e-4, atol=1e-4)


def test_training_is_that_of_the_library(made, arrays, begun):
    """The loss as an argument, its pull carried back by one program, against `make_step`."""
    config, _, _ = made
    _, problem, batch, params = begun
    score = jax.jit(problem.score)
    before = score(params, batch).logp
    np.testing.assert_allclose(arrays["logp"][0, 0, 0], before, rtol=1e-5)
    orders = [batches.order(4, 2, 0, number) for number in range(3)]
    update, _ = by_make_step(problem, "simpo", config.rate)
    after = score(update(params, batch, orders), batch).logp
    moved = arrays["logp"][1, 0, -1] - arrays["logp"][1, 0, 0]
    assert np.abs(moved).max() > 0.1
    # float32, and Adam divides gradients that are nearly zero by themselves and eps
    np.testing.assert_allclose(moved, after - before, atol=2e-3 * np.abs(moved).max())


def test_grams_and_pulls_by_plain_autodiff(arrays, begun):
    _, problem, batch, params = begun

    def one(params, pair, side):
        return problem.logp(params, pair)[side]

    slope = jax.jit(jax.grad(one), static_argnums=2)
    pair = tuple(x[0] for x in batch[:3])
    rows = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(slope(params, pair, side))])
        for side in (0, 1)
    ]
    gram = np.array([[np.vdot(x, y) for x in rows] for y in rows])
    np.testing.assert_allclose(arrays["gram"][0, 0, 0, 0], gram, rtol=1e-4)
    logp, reference = arrays["logp"][0, 0, -1], arrays["logp"][0, 0, 0]
    weight = 0.1 * jax.nn.sigmoid(-0.1 * np.subtract(*np.moveaxis(logp - reference, -1, 0)))
    expected = np.stack([-weight, weight], axis=-1)
    np.testing.assert_allclose(arrays["pull"][0, 0, -1], expected, rtol=1e-5)


def test_dpop_starts_with_the_ratio_of_dpo(made, arrays):
    """The penalty's kink lies at the start: rounding must not decide on which side of it."""
    config, _, _ = made
    dpo, dpop = (config.losses.index(name) for name in ("dpo", "dpop"))
    assert (arrays["pull"][dpop, :, 0] == arrays["pull"][dpo, :, 0]).all()
    moved = (arrays["logp"][dpop] - arrays["logp"][dpop, :, :1])[..., 0]
    ratio = lab.log_ratio(arrays["pull"][dpop])
    np.testing.assert_allclose(ratio, np.where(moved < 0, math.log(51), 0), rtol=1e-4)


def test_the_first_update_sees_no_log_ratio(made, arrays, begun, compiled_once):
    """However the reference was rounded; from the second update on it counts."""
    dpop = lab.branches(made[0]).index("dpop")
    _, _, batch, params = begun

    def updated(shift, first):
        some = jax.tree.map(lambda x: x[:2], batch)
        some = some._replace(reference=(arrays["logp"][0, 0, 0, :2] + shift).astype(np.float32))
        mine = jax.tree.map(jnp.copy, params)
        numbers = jnp.int32(dpop), jnp.float32(1), jnp.float32(1e-3)
        state = optax.adam(1.0).init(mine)
        mine, _ = compiled_once[0].step(mine, state, some, *numbers, jnp.bool_(first))
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(mine)])

    above, below = (updated(shift, True) for shift in (1e-3, -1e-3))
    np.testing.assert_array_equal(above, below)
    assert np.abs(updated(1e-3, False) - below).max() > 1e-4


def test_the_summary_says_what_the_arrays_hold(made, arrays):
    config, _, _ = made
    rows = {row["name"]: row for row in lab.summarise(config, arrays) if row["kind"] == "loss"}
    moved = arrays["logp"][0, :, -1, :4] - arrays["logp"][0, :, 0, :4]
    assert rows["dpo"]["chosen"] == pytest.approx(moved[..., 0].mean())
    assert rows["dpo"]["margin"] == pytest.approx((moved[..., 0] - moved[..., 1]).mean())
    assert rows["dpo"]["log_r"] == 0
    assert rows["sft"]["log_r"] == math.inf
    gram = arrays["gram"][0, :, 0]
    dot = gram[..., 0, 1]
    assert rows["dpo"]["up"] == pytest.approx((gram[..., 0, 0] > dot).mean())
    down = (gram[..., 0, 0] < dot) & (dot < gram[..., 1, 1])
    assert rows["dpo"]["both_down_start"] == pytest.approx(down.mean())
    inside = (dot <= gram[..., 0, 0]) & (dot <= gram[..., 1, 1])
    assert rows["dpo"]["inside"] == pytest.approx(inside.mean())


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    smoke.same_after_a_kill(lab, config, folder, tmp_path, ("simpo_1",))


def test_every_loss_pulls_as_its_own_derivative():
    """One program for all of them: the number of a loss picks its pull and no other's."""
    key = jax.random.key(1)
    logp = jax.random.uniform(key, (3, 2), minval=-20, maxval=-5).astype(jnp.float32)
    reference = logp + jax.random.normal(jax.random.key(2), (3, 2)).astype(jnp.float32)
    lengths = jnp.array([[4.0, 7.0], [3.0, 3.0], [9.0, 2.0]], jnp.float32)
    dpo = lab.pulls("dpo", logp, reference, lengths)
    for name, bound in {
        "dpo": lambda x: losses.dpo(x, reference, beta=0.1),
        "cpo": lambda x: losses.cpo(x, beta=0.1, alpha=1.0),
        "orpo": lambda x: losses.orpo(x, lengths, lam=0.1),
        "sft": lambda x: -x[:, 0],
    }.items():
        expected = jax.grad(lambda x, bound=bound: bound(x).sum())(logp)
        found = lab.pulls(name, logp, reference, lengths)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        assert name == "dpo" or np.abs(found - dpo).max() > 1e-3
    everything = [lab.pulls(name, logp, reference, lengths) for name in lab.LOSSES]
    assert np.isfinite(everything).all()


def test_ratios_by_hand():
    pull = np.array([[-3.0, 1.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [2.0, -1.0]])
    np.testing.assert_equal(
        lab.log_ratio(pull), [math.log(3), math.inf, -math.inf, math.nan, math.nan]
    )
    assert lab.median(lab.log_ratio(pull)) == math.log(3)
    assert lab.median(np.array([0.0, math.inf])) == 0.0
    assert math.isnan(lab.median(np.array([math.nan])))


def test_equal_margin_by_hand():
    margin, chosen = np.array([0.0, 1.0, 3.0, 2.0]), np.array([0.0, -1.0, -2.0, 5.0])
    assert lab.at_margin(margin, chosen, 0.5) == -0.5
    assert lab.at_margin(margin, chosen, 2.0) == -1.5  # the first time
    assert math.isnan(lab.at_margin(margin, chosen, 3.5))
    assert math.isnan(lab.at_margin(margin, chosen, 0.0))


def test_looks_are_denser_early_on():
    assert lab.look_steps(dataclasses.replace(lab.SMOKE, steps=16, looks=5)) == [0, 1, 2, 4, 8, 16]
    assert lab.look_steps(dataclasses.replace(lab.SMOKE, steps=2, looks=9)) == [0, 1, 2]
    assert lab.look_steps(dataclasses.replace(lab.SMOKE, steps=1, looks=1)) == [0, 1]


def a_world(gain, falls):
    """Arrays of two losses whose chosen and rejected move by so many nats a look, and no more."""
    config = dataclasses.replace(lab.SMOKE, losses=("dpo", "sft"), seeds=1, looks=3)
    look = np.arange(3.0)
    logp = np.zeros((2, 1, 3, 6, 2))
    for i, (up, down) in enumerate(((falls, falls - gain), (1.0, 1.0 - gain))):
        logp[i, 0] += np.stack([up * look, down * look], axis=-1)[:, None]
    pull, gram = np.zeros_like(logp), np.zeros((2, 1, 3, 2, 2, 2))
    pull[0], pull[1], gram[:] = [-0.05, 0.05], [-1, 0], [[1.0, 2.0], [2.0, 5.0]]
    together = np.zeros((1, 2, 2, 2, 2))
    for i in range(2):
        together[0, i, :, i] = [[1.0, 2.0], [2.0, 5.0]]
    step = np.array([0, 1, 3])
    return config, {"logp": logp, "pull": pull, "gram": gram, "together": together, "step": step}


def test_the_verdict_follows_the_numbers():
    config, arrays = a_world(gain=2.0, falls=-1.0)
    rows = lab.summarise(config, arrays)
    dpo, sft = rows[:2]
    assert (dpo["chosen"], dpo["rejected"], dpo["matched"], dpo["level"]) == (-2, -6, -2, 4)
    assert (dpo["both_down_start"], dpo["up"], sft["up"], sft["both_up_start"]) == (1, 0, 1, 1)
    assert dpo["own"] == pytest.approx((1 - 2) / (1 - 4 + 5))  # of a nat of margin
    assert dpo["together"] == pytest.approx(dpo["own"])  # these pairs are orthogonal
    printed = lab.report(config, rows)
    assert "After 3 updates the chosen response is up under sft and down under dpo." in printed
    config, arrays = a_world(gain=2.0, falls=1.0)
    assert "is up under dpo, sft and down under no loss." in lab.report(
        config, lab.summarise(config, arrays)
    )


def test_without_margin_there_is_no_comparison_at_equal_margin():
    config, arrays = a_world(gain=-1.0, falls=1.0)
    rows = lab.summarise(config, arrays)
    assert math.isnan(rows[0]["matched"])
    assert "the comparison at equal margin says nothing" in lab.report(config, rows)
    lab.draw(config, arrays)
    plt.close("all")


def test_the_order_is_judged():
    """Three losses whose chosen rises with their ratio: a perfect order."""
    assert lab.rank([0.0, 1.0, math.inf], [-3.0, 0.0, 2.0]) == 1.0
    assert lab.rank([0.0, math.nan, 1.0, 2.0], [0.0, 9.0, -1.0, -2.0]) == -1.0
    assert math.isnan(lab.rank([0.0, 1.0], [0.0, 1.0]))
    assert math.isnan(lab.rank([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"batch": 99}, "batch: got 99, expected at most the 4 pairs"),
        ({"losses": ("dpo", "nonsense")}, "losses: got nonsense, expected some of dpo"),
        ({"losses": ("dpo", "dpo")}, "expected names, each once"),
        ({"margin": 0.0}, "margin: got 0.0, expected above 0"),
        ({"rate": -1.0}, "rate: got -1.0, expected above 0"),
        ({"supervised": -1}, "supervised: got -1, expected at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        lab.load(dataclasses.replace(lab.SMOKE, **settings))


def test_pairs_that_do_not_fit_are_not_used(made, tmp_path):
    config, _, _ = made
    _, problem = lab.load(config)
    assert len(problem) == 8
    few = dataclasses.replace(config, data=written(tmp_path, 5))
    with pytest.raises(ValueError, match="pairs: a seed draws 6, expected at most the 5 that fit"):
        lab.load(few)


def test_shipped_pairs_and_a_model_from_scratch():
    small = dataclasses.replace(lab.SMOKE, model="small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SMALL", {**common.SMALL, "width": 16, "layers": 1})
        subject, problem = lab.load(small)
    assert len(problem) == 96
    assert {x.shape[-1] for x in jax.tree.leaves(subject.params) if x.ndim == 2} >= {16}
