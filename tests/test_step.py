"""The jitted step, on the toy policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import Scores, a_batch, a_state, dpo, score

from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import (
    Update,
    init_state,
    make_step,
    pair_means,
    tree_norm,
    update_norm,
)

OPTIMIZER = torch_rmsprop(0.01)


@functools.cache
def a_step(**options):
    return make_step(score, dpo, OPTIMIZER, **options)


def everything(update):
    return pair_means(update) | update_norm(update)


def test_golden_numbers_of_the_first_updates():
    """If this moves, the training of every experiment moves.

    Find the change that did it. If it was meant to, print the new numbers, write them here, and say
    in CHANGELOG.md that earlier runs cannot be compared; if not, undo it.
    """
    step, state = a_step(metrics=everything), a_state(OPTIMIZER)
    state, first, _ = step(state, a_batch())
    state, second, _ = step(state, a_batch(seed=2))
    golden = {
        "loss": [0.6653201610420458, 0.6455596360776519],
        "gradient_norm": [0.16681600198533994, 0.16556543856889316],
        "logp_chosen": [-1.569487480019788, -1.5918631655803956],
        "logp_rejected": [-1.7004398609721687, -1.799000790963238],
        "update_norm": [0.4471994126379294, 0.3362219919687791],
    }
    bias = [0.17734535, 0.15707148, 0.00057102, -0.16165976, -0.16128613]
    assert first.keys() == golden.keys()
    for name, numbers in golden.items():  # float64; another compiler may sum in another order
        np.testing.assert_allclose([first[name], second[name]], numbers, rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(state.params["bias"], bias, atol=5e-9)  # the digits written here


def test_update_is_the_optimizers_on_the_gradient_of_the_mean_loss():
    batch, state = a_batch(), a_state(OPTIMIZER)

    def mean_loss(params):  # a pair at a time
        each = []
        for i in range(8):
            logits = batch.features[i] @ params["kernel"] + params["bias"]
            logp = logits - jax.nn.logsumexp(logits)
            chosen, rejected = (logp[k] - batch.reference[i, 0] for k in batch.answers[i])
            each.append(jnp.log(1 + jnp.exp(-0.5 * (chosen - rejected))))
        return sum(each) / 8

    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    change, _ = OPTIMIZER.update(gradient, state.opt_state)
    expected = jax.tree.map(np.asarray, optax.apply_updates(state.params, change))
    logp = np.asarray(score(state.params, batch).logp)
    new, metrics, scores = a_step()(state, batch)
    np.testing.assert_allclose(scores.logp, logp, rtol=1e-12)  # those before the update
    # float64; the first update divides by the gradient's size, so its rounding stays relative.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), new.params, expected)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-12)
    assert int(new.step) == 1


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_equal_the_large_batch(micro_batches):
    whole, parts = a_state(OPTIMIZER), a_state(OPTIMIZER)
    for seed in (1, 2, 3):
        batch = a_batch(seed=seed)
        whole, metrics, scores = a_step(metrics=everything)(whole, batch)
        parts, others, other_scores = a_step(micro_batches=micro_batches, metrics=everything)(
            parts, batch
        )
        # float64 and another order of summation
        close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
        jax.tree.map(close, (parts[:3], others), (whole[:3], metrics))
        close(other_scores.logp, scores.logp)  # in the batch's own order


def test_half_precision_parameters_sum_their_micro_batches_in_float32():
    """In bfloat16 a sum of 256 parts stops growing: its gradient would be 1.6e-2 off."""
    parts, width = 256, 64
    features = 1 + jnp.arange(parts * width).reshape(parts, width) % 7 / 16  # exact in bfloat16
    params = {"kernel": jnp.zeros(width, jnp.bfloat16)}

    def linear(params, batch):
        return batch.astype(jnp.bfloat16) @ params["kernel"]

    def gradient_of(micro_batches):
        optimizer = optax.sgd(1.0)
        shown = {"metrics": lambda update: {"gradient": update.gradient["kernel"]}}
        step = make_step(linear, lambda s, _: s, optimizer, micro_batches=micro_batches, **shown)
        state = init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(0))
        return step(state, features)[1]["gradient"]

    found, exact = gradient_of(parts), features.mean(axis=0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float64), exact, rtol=2**-8)  # one rounding


@pytest.mark.parametrize("where", ["features", "loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(where):
    state, _, _ = a_step(metrics=everything)(a_state(OPTIMIZER), a_batch())
    before = jax.tree.map(np.asarray, state[:3])
    batch = a_batch()
    if where == "features":
        batch = batch._replace(features=batch.features.at[2, 0].set(jnp.nan))
    elif where == "loss":  # -log sigmoid(-inf)
        batch = batch._replace(reference=batch.reference.at[2, 0].set(jnp.inf))
    else:  # the loss is finite, the square of the gradient is not
        batch = batch._replace(features=batch.features.at[2].set(1e250 * jnp.array([1.0, -1, 1])))
    after, metrics, _ = a_step(metrics=everything)(state, batch)
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"]))
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert np.isnan(metrics["update_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after[:3]), before)
    assert jax.random.key_data(after.key).tolist() == [0, 7]
    recovered, metrics, _ = a_step(metrics=everything)(after, a_batch())
    assert int(recovered.step) == 2
    assert np.isfinite(metrics["update_norm"])


def test_state_is_updated_in_place():
    state = a_state(OPTIMIZER)
    compiled = a_step().lower(state, a_batch()).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state[:3]))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    a_step()(state, a_batch())
    assert state.params["kernel"].is_deleted()


def test_metrics_see_the_update():
    seen = Update(
        scores=Scores(jnp.array([[-1.0, -2.0], [-3.0, -6.0]])),
        batch=None,
        params=None,
        gradient=None,
        change={"a": jnp.array([3.0]), "b": jnp.array([[4.0]])},
    )
    assert pair_means(seen) == {"logp_chosen": -2.0, "logp_rejected": -4.0}
    assert update_norm(seen) == {"update_norm": 5.0}


def test_one_compiled_step_serves_all_learning_rates_in_the_state():
    def injected(rate):
        return optax.inject_hyperparams(torch_rmsprop)(learning_rate=rate)

    step = make_step(score, dpo, injected(0.0))
    moved = {}
    for rate in (0.0, 0.01, 0.02):
        state, _, _ = step(a_state(injected(rate)), a_batch())
        moved[rate] = state.params["kernel"] - a_state(OPTIMIZER).params["kernel"]
    np.testing.assert_array_equal(moved[0.0], 0.0)
    np.testing.assert_allclose(moved[0.02], 2 * moved[0.01], rtol=1e-12)
    assert step._cache_size() == 1


def test_norm_is_that_of_all_leaves_and_holds_at_least_float32():
    tree = {"ones": jnp.ones(1000, jnp.bfloat16), "none": jnp.ones((0, 3)), "one": jnp.array(5.0)}
    # A sum in bfloat16 would stop at 256.
    np.testing.assert_allclose(tree_norm(tree), np.sqrt(1025), rtol=1e-12)
    assert tree_norm({"a": jnp.ones(2, jnp.bfloat16)}).dtype == jnp.float32
    assert tree_norm({}) == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="micro_batches is 0, expected at least 1"):
        make_step(score, dpo, OPTIMIZER, micro_batches=0)
    with pytest.raises(ValueError, match=r"shape \(8, 3\), expected .* micro_batches=3 divides"):
        a_step(micro_batches=3)(a_state(OPTIMIZER), a_batch())
    averaged = make_step(score, lambda s, b: dpo(s, b).mean(), OPTIMIZER)
    with pytest.raises(ValueError, match=r"loss returned shape \(\), expected \[pairs\]"):
        averaged(a_state(OPTIMIZER), a_batch())
    mesh = jax.make_mesh((1,), ("model",), (jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="mesh: got the axes"):
        make_step(score, dpo, OPTIMIZER, mesh=mesh)
