"""`jaxpref.training.courses`: one program for all losses, against plain autodiff and optax."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pairset import model as model
from test_pairset import pairs as pairs

from jaxpref import losses
from jaxpref.training import courses
from jaxpref.training.courses import Course
from jaxpref.training.mitigations import projected_pull
from jaxpref.training.objectives import objective
from jaxpref.training.optimizers import unit_optimizer

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")

ROWS, RATES = np.array([5, 0, 3, 6, 1]), (1e-3, 3e-3, 2e-3)  # an update of the second epoch, too
LOSSES = {
    "dpo": lambda logp, reference: losses.dpo(logp, reference, beta=0.1),
    "ipo": lambda logp, reference: losses.ipo(logp, reference, tau=0.1),
    "sft": lambda logp, reference: -logp[:, 0],
}
LOSSES["projected"] = LOSSES["dpo"]


@pytest.fixture(scope="module")
def made(model, pairs):
    """Pairs that refer to the start, and one program for all losses."""
    objectives = {"dpo": objective("dpo"), "ipo": objective("ipo"), "sft": objective("sft")}
    objectives["projected"] = objectives["dpo"]
    return (
        pairs.referring_to(model[1], ROWS),
        courses.programs(pairs, objectives, {"projected": projected_pull}),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def slope(pairs, name, params, batch, swap):
    """Gradient of a loss, all pairs in one array and turned there; what was seen, and its pulls."""

    def turned(x):
        return jnp.where(swap[:, None], x[:, ::-1], x)

    logp, back = jax.vjp(lambda p: turned(pairs.score(p, batch).logp), params)
    pull = jax.grad(lambda x: LOSSES[name](x, turned(batch.reference)).sum())(logp)
    if name == "projected":
        rows = jax.jacrev(lambda p: turned(pairs.score(p, batch).logp))(params)
        flat = [x.reshape(*logp.shape, -1) for x in jax.tree.leaves(rows)]
        gram = jnp.stack([jnp.einsum("nap,nbp->nab", x, x) for x in flat]).sum(axis=0)
        pull = projected_pull(gram, pull)
    return back(pull / len(pull))[0], turned(logp), turned(pull)


@pytest.mark.parametrize(
    ("name", "optimizer", "swapped", "scale"),
    [("dpo", "adam", (), 1), ("ipo", "sgd", (2, 5, 6), 0.5), ("projected", "sgd", (5,), 1)],
)
def test_a_training_is_the_loss_s_own(model, made, name, optimizer, swapped, scale):
    """By number, by length, in parts: as gradients of the loss itself, in float64."""
    pairs, run = made
    course, unit = Course(ROWS, 2, 0, np.array(swapped, int)), unit_optimizer(optimizer)
    kept = {}
    found = courses.train(
        run, pairs, model[1], course, name, RATES, optimizer=unit, scale=scale, looks={1},
        look=lambda number, params, state: kept.update({number: jax.tree.map(jnp.copy, params)}),
    )  # fmt: skip
    assert sorted(found.index[:2].ravel()) != sorted(found.index[1:].ravel())
    assert len(course.parts(pairs, 0)) + len(course.parts(pairs, 1)) > 2  # of two sizes
    params, state = model[1], unit.init(model[1])
    known = pairs.known[found.index[0]]
    np.testing.assert_array_less(
        np.abs(found.seen[0] - known), 1e-5 * pairs.lengths[found.index[0]]
    )
    for number, (rows, rate) in enumerate(zip(found.index, RATES, strict=True)):
        swap = np.isin(rows, swapped)
        gradient, seen, pull = slope(pairs, name, params, pairs.rows(rows), swap)
        np.testing.assert_allclose(found.seen[number], seen, rtol=1e-6)
        np.testing.assert_allclose(found.pull[number], pull, rtol=1e-6)
        gradient = jax.tree.map(lambda g: g / scale, gradient)
        update, state = unit.update(gradient, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u, r=rate: r * u, update))
        if number == 0:
            near(kept[1], params, model[1])
    assert kept.keys() == {1}
    near(found.params, params, model[1])
    assert found.diverged == -1


@pytest.mark.parametrize("swapped", [(), (2, 5)])
def test_log_ratios_of_the_first_update_are_exactly_zero(model, made, swapped, monkeypatch):
    """Of DPO and IPO the pull at zero is known; a reference of another program is off, and told."""
    pairs, run = made
    course, sgd = Course(ROWS, 2, 0, np.array(swapped, int)), unit_optimizer("sgd")
    for name, steep in (("dpo", LOSSES["dpo"]), ("ipo", LOSSES["ipo"])):
        found = courses.train(run, pairs, model[1], course, name, RATES[:1], optimizer=sgd)
        turn = np.where(np.isin(found.index[0], swapped), -1, 1)
        zero = np.asarray(jax.grad(lambda x, f=steep: f(x, jnp.zeros((1, 2))).sum())(
            jnp.zeros((1, 2))
        ))  # fmt: skip
        np.testing.assert_array_equal(found.pull[0], np.float32(zero * turn[:, None]))
    calls = itertools.count()

    def step(*arguments):  # a device that adds up in another order the second time
        *moved, logp, pull = run.step(*arguments)
        return *moved, logp + 1e-3 * next(calls), pull

    other = run._replace(step=step)
    with pytest.raises(
        ArithmeticError, match=r"first update.s log-ratios are up to .*, expected 0"
    ):
        courses.train(other, pairs, model[1], course, "dpo", RATES[:1], optimizer=sgd)


def near(found, expected, start):
    """Of changes: entries whose gradient is rounding move as far as any under Adam."""
    for a, b, c in zip(*map(jax.tree.leaves, (found, expected, start)), strict=True):
        assert np.abs(b - c).max() > 0
        np.testing.assert_allclose(a - c, b - c, atol=1e-4 * np.abs(b - c).max())


def test_an_update_apart_is_the_step(model, made):
    """`slope`, an optimizer's state from elsewhere, and `updated`: for one's own loop."""
    pairs, run = made
    course, adam = Course(ROWS, 2, 0), unit_optimizer("adam")
    once = courses.train(run, pairs, model[1], course, "dpo", RATES[:1], optimizer=adam)
    params, parts = jax.tree.map(jnp.copy, model[1]), course.parts(pairs, 0)
    gram = run.gram(params, parts, "dpo")
    swap = course.swap(parts)
    *_, gradient = run.slope(params, parts, run.number("dpo"), swap, gram)
    params, _ = courses.updated(adam, params, adam.init(params), gradient, jnp.float32(RATES[0]))
    near(params, once.params, model[1])


def test_a_training_that_diverges_ends_there(model, made):
    pairs, run = made
    looked, rates = [], (1e-3, np.inf, 1e-3, 1e-3)
    found = courses.train(
        run, pairs, model[1], Course(ROWS, 2, 0), "sft", rates, looks={1, 3, 4},
        optimizer=unit_optimizer("sgd"), look=lambda number, params, state: looked.append(number),
    )  # fmt: skip
    assert found.diverged == 2
    assert looked == [1]
    assert np.isfinite(found.seen[:2]).all()
    assert np.isnan(found.seen[2:]).all()


def test_a_course_shows_each_pair_once_an_epoch_and_some_the_wrong_way(pairs):
    course, pairs = (
        Course(np.arange(6), 2, 3, np.array([1, 4])),
        pairs.with_reference(np.zeros((7, 2))),
    )
    assert course.epoch == 3
    epochs = [np.concatenate([course.index(n + 3 * e) for n in range(3)]) for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(6)]
    assert epochs[0].tolist() != epochs[1].tolist()
    for number in range(3):
        parts = course.parts(pairs, number)
        rows = courses.rows_of(parts)
        assert sorted(rows) == sorted(course.index(number))
        assert course.swap(parts).tolist() == [row in (1, 4) for row in rows]


def test_a_coin_turns_half_of_the_pairs_the_same_ones_every_time():
    coins = [courses.coin(1000, seed) for seed in (0, 0, 1)]
    assert 450 < len(coins[0]) < 550
    assert coins[0].tolist() == coins[1].tolist() != coins[2].tolist()


def test_a_training_needs_an_update(model, made):
    pairs, run = made
    with pytest.raises(ValueError, match="rates: got none, expected one for each update"):
        courses.train(run, pairs, model[1], Course(ROWS, 2, 0), "sft", (),
                      optimizer=unit_optimizer("sgd"))  # fmt: skip
