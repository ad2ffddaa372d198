"""References that move: their formulas, and how they enter the step and the loop."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jaxpref import losses, runs
from jaxpref.training.loop import fit
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.references import (
    Tracked,
    average_by_block,
    block_shares,
    copied,
    following,
    policy_only,
    soup,
    tr_dpo_hard,
    tr_dpo_soft,
    tracked,
)
from jaxpref.training.step import init_state, make_step

MODELS = (
    {"w": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "b": jnp.array([3.0])},
    {"w": jnp.array([[0.0, 2.0], [-0.5, 1.0]]), "b": jnp.array([-1.0])},
)


def close(found, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), found, expected)


# --- formulas -------------------------------------------------------------------------------------


def test_soft_and_hard_updates_happen_at_their_steps():
    reference, policy = MODELS
    for step in range(7):
        due = step in (3, 6)
        for number in (step, jnp.array(step)):
            soft = tr_dpo_soft(reference, policy, number, alpha=0.25, every=3)
            mixed = jax.tree.map(lambda r, p: 0.25 * p + 0.75 * r, reference, policy)
            close(soft, mixed if due else reference, rtol=1e-12)
            hard = tr_dpo_hard(reference, policy, number, every=3)
            close(hard, policy if due else reference, rtol=0)


def test_the_soft_update_of_share_1_is_the_hard_one():
    soft = jax.jit(functools.partial(tr_dpo_soft, alpha=1, every=2))(*MODELS, 4)
    close(soft, tr_dpo_hard(*MODELS, 4, every=2), rtol=0)


def test_narrow_parameters_are_averaged_in_float32():
    reference, policy = jnp.array([1.0], jnp.bfloat16), jnp.array([1.0078125])  # 1 + 2^-7
    found = tr_dpo_soft(reference, policy.astype(jnp.bfloat16), 1, alpha=0.75, every=1)
    assert found.dtype == jnp.bfloat16
    assert float(found[0]) == 1.0078125  # 0.75 * 2^-7 rounds up; 0.25 in bfloat16 would be lost


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_divergence_from_a_soup_is_the_mean_divergence_less_a_constant(share, key):
    """Of policies that are log-linear in their parameters."""
    features, *kernels = jax.random.normal(key, (4, 3, 3))
    mixed = soup(kernels[:2], [share, 1 - share])

    def kl(kernel, other):
        log_p, log_q = (jax.nn.log_softmax(features @ k) for k in (kernel, other))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)

    def constant(kernel):
        mean = share * kl(kernel, kernels[0]) + (1 - share) * kl(kernel, kernels[1])
        return mean - kl(kernel, mixed)

    np.testing.assert_allclose(constant(kernels[2]), constant(-kernels[2]), rtol=1e-9, atol=1e-12)
    assert (constant(kernels[2]) >= -1e-12).all()


def test_soups_of_three_and_their_errors():
    found = soup([*MODELS, MODELS[0]], [0.5, 0.2, 0.3])
    close(found, jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, *MODELS), rtol=1e-12)
    for weights in ([0.5], [0.7, 0.7], [1.5, -0.5], []):
        with pytest.raises(ValueError, match=r"weights: got .* of 2 models, expected one a model"):
            soup(MODELS, weights)


def test_block_shares_keep_their_mean_and_their_order():
    logits = jnp.array([-3.0, 0.4, 9.0])
    shares = block_shares(logits, mean=0.3, epsilon=0.1)
    np.testing.assert_allclose(shares.mean(), 0.3, rtol=1e-12)
    size = 1 / (1 + np.exp(-np.asarray(logits))) + 0.1
    np.testing.assert_allclose(shares, 0.9 * size / size.sum(), rtol=1e-12)
    slope = jax.jacobian(lambda s: block_shares(s).sum())(logits)
    np.testing.assert_allclose(slope, 0, atol=1e-15)


def test_averages_by_block_take_each_leafs_share():
    first, second = MODELS
    shares = jnp.array([0.25, 0.5, 1.0])
    found = average_by_block(first, second, shares, {"w": np.array([2, 0]), "b": 1})
    np.testing.assert_allclose(found["w"], [[1.0, -2.0], [-0.25, 1.75]], rtol=1e-12)
    np.testing.assert_allclose(found["b"], [1.0], rtol=1e-12)

    def second_row(shares):
        return average_by_block(first, second, shares, {"w": np.array([2, 0]), "b": 1})["w"][1, 1]

    np.testing.assert_allclose(jax.grad(second_row)(shares), [3.0, 0, 0], rtol=1e-12)
    with pytest.raises(ValueError, match=r"blocks: got shape \(3,\) for a leaf of shape \(2, 2\)"):
        average_by_block(first, second, shares, {"w": np.array([0, 1, 2]), "b": 1})


@pytest.mark.parametrize(
    ("function", "bad"),
    [
        (lambda v: tr_dpo_soft(*MODELS, 1, alpha=v), {"alpha": [0.0, -1.0, 1.5, float("nan")]}),
        (lambda v: tr_dpo_soft(*MODELS, 1, every=v), {"every": [0, -2, 1.5, True]}),
        (lambda v: tr_dpo_hard(*MODELS, 1, every=v), {"every": [0, -2, 1.5, True]}),
        (lambda v: block_shares(jnp.zeros(2), mean=v), {"mean": [-0.1, 1.5, float("nan")]}),
        (lambda v: block_shares(jnp.zeros(2), epsilon=v), {"epsilon": [0.0, float("inf")]}),
    ],
)
def test_settings_out_of_range_are_named(function, bad):
    ((name, values),) = bad.items()
    for value in values:
        with pytest.raises((ValueError, TypeError), match=name):
            function(value)


# --- in training ----------------------------------------------------------------------------------


class Scores(NamedTuple):
    logp: jax.Array
    reference: jax.Array


def score(params, batch):
    policy, reference = (toy.score(p, batch).logp for p in params)
    return Scores(policy, reference)


def loss(scores, batch):
    return losses.dpo(scores.logp, scores.reference, beta=0.5)


OPTIMIZER = optax.chain(optax.add_decayed_weights(0.1), torch_rmsprop(0.05))
STEP = make_step(score, loss, policy_only(OPTIMIZER))
SOFT = functools.partial(tr_dpo_soft, alpha=0.3, every=2)


def a_state():
    params = toy.a_state(OPTIMIZER).params
    return init_state(tracked(params), policy_only(OPTIMIZER), key=jax.random.key(7))


def test_a_step_that_follows_is_the_loop_by_hand():
    batch = toy.a_batch()
    reference = policy = toy.a_state(OPTIMIZER).params
    slots = OPTIMIZER.init(policy)
    state, step = a_state(), following(STEP, SOFT)
    for number in range(1, 6):
        still = toy.score(reference, batch).logp

        def mean_loss(policy, still=still):
            return losses.dpo(toy.score(policy, batch).logp, still, beta=0.5).mean()

        value, slope = jax.value_and_grad(mean_loss)(policy)
        change, slots = OPTIMIZER.update(slope, slots, policy)
        policy = optax.apply_updates(policy, change)
        if number % 2 == 0:
            reference = jax.tree.map(lambda r, p: 0.3 * p + 0.7 * r, reference, policy)
        state, metrics, scores = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-12)
        np.testing.assert_allclose(scores.reference, still, rtol=1e-10)
        close(state.params, Tracked(policy, reference), rtol=1e-9, atol=1e-12)
    assert int(state.step) == 5


def test_the_reference_has_no_slots_and_no_decay():
    state, batch = a_state(), toy.a_batch()
    before = copied(state.params.reference)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(OPTIMIZER.init(before))
    for _ in range(2):
        state, _, _ = STEP(state, batch)
    close(state.params.reference, before, rtol=0)
    assert np.abs(state.params.policy["kernel"] - before["kernel"]).max() > 0.01


def test_a_reference_that_is_always_the_policy_teaches_nothing_but_pulls_for_ever():
    state, batch = a_state(), toy.a_batch()
    step = following(STEP, functools.partial(tr_dpo_hard, every=1))
    for _ in range(3):
        state, metrics, _ = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-12)
        assert metrics["gradient_norm"] > 0.1
        close(state.params.reference, state.params.policy, rtol=0)


def test_the_next_iterate_of_spin_outlives_the_steps_that_use_up_the_policy():
    state, batch = a_state(), toy.a_batch()
    for _ in range(2):
        state, _, _ = STEP(state, batch)
    iterate = copied(state.params.policy)
    value = np.asarray(iterate["kernel"])
    state = state._replace(params=Tracked(state.params.policy, copied(iterate)))
    state, metrics, _ = STEP(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-12)  # a new beginning
    np.testing.assert_array_equal(iterate["kernel"], value)


def test_a_run_that_stops_goes_on_with_the_reference_it_had(tmp_path):
    step = following(STEP, SOFT)

    def train(folder, steps, **options):
        run = runs.create("toy", "run", {}, root=tmp_path / folder, **options)
        return fit(
            step, a_state(), lambda n: toy.a_batch(), steps=steps, run=run, checkpoint_every=3
        )

    whole = train("once", 5)
    train("twice", 3)
    continued = train("twice", 5, resume=True)
    jax.tree.map(np.testing.assert_array_equal, continued.params, whole.params)
    start = a_state().params.reference
    assert np.abs(continued.params.reference["kernel"] - start["kernel"]).max() > 1e-3
