"""Masks of parameters: nothing moves outside, and inside all moves as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_decoder import SMALL, build

from jaxpref.models import decoder
from jaxpref.training.partial import half, only, salient

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")

PARAMS = {"a": jnp.arange(1.0, 5.0).reshape(2, 2), "b": jnp.ones(3), "c": jnp.ones(2)}
MASK = {"a": np.array([[True], [False]]), "b": True, "c": False}
OPTIMIZERS = {
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
}


def trained(optimizer, params, updates=4):
    """A loss with a slope everywhere."""
    state = optimizer.init(params)
    for number in range(updates):
        slope = jax.tree.map(lambda x, n=number: jnp.sin(x + n) + 0.1, params)
        change, state = optimizer.update(slope, state, params)
        params = optax.apply_updates(params, change)
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_moves_outside_and_inside_all_as_alone(name):
    found, state = trained(only(OPTIMIZERS[name], MASK), PARAMS)
    np.testing.assert_array_equal(found["c"], PARAMS["c"])
    np.testing.assert_array_equal(found["a"][1], PARAMS["a"][1])
    alone, _ = trained(OPTIMIZERS[name], {"a": PARAMS["a"][:1], "b": PARAMS["b"]})
    np.testing.assert_allclose(found["a"][:1], alone["a"], rtol=1e-12)
    np.testing.assert_allclose(found["b"], alone["b"], rtol=1e-12)
    assert (alone["a"] != PARAMS["a"][:1]).all()
    assert not any(x.shape == (2,) for x in jax.tree.leaves(state))  # no slots for what stays


def test_a_mask_of_all_is_no_mask():
    every = jax.tree.map(lambda x: np.ones(x.shape, bool), PARAMS)
    found, expected = (trained(o, PARAMS)[0] for o in
                       (only(OPTIMIZERS["adamw"], every), OPTIMIZERS["adamw"]))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_half_of_each_kind_of_each_layer_is_trained():
    _, params = build(SMALL)
    mask = jax.tree.leaves(half(params, key=jax.random.key(0)))
    paths = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
             for path, _ in jax.tree.leaves_with_path(params)]  # fmt: skip
    of = dict(zip(paths, mask, strict=True))
    for layer in ("layers.0", "layers.1"):
        count = lambda kind, at=layer: sum(  # noqa: E731
            x for path, x in of.items() if path.startswith(at) and kind in path
        )
        assert count(".attention.") == 2
        assert count(".mlp.") in (1, 2)
        assert count("_norm.") == 1
    assert of["embedding"]
    assert of["norm.scale"]


def test_stacked_layers_draw_the_same_half():
    _, params = build(SMALL)
    key = jax.random.key(3)
    full = lambda mask, like: jax.tree.map(  # noqa: E731
        lambda x, p: jnp.broadcast_to(jnp.asarray(x), p.shape), mask, like
    )
    apart, stack = full(half(params, key=key), params), decoder.stack_layers(params)
    found = full(half(stack, key=key), stack)
    jax.tree.map(np.testing.assert_array_equal, found, decoder.stack_layers(apart))
    other = full(half(stack, key=jax.random.key(4)), stack)
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (found, other)), strict=True))


def test_salient_entries_are_the_largest_of_all():
    random = np.random.default_rng(0)
    slope = {"a": random.standard_normal((20, 5)), "b": 10 * random.standard_normal(100)}
    mask = salient(slope, share=0.25)
    inside = np.concatenate([np.abs(slope[n])[mask[n]] for n in slope])
    outside = np.concatenate([np.abs(slope[n])[~mask[n]] for n in slope])
    assert len(inside) == 50
    assert inside.min() > outside.max()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True, "b": True}, "mask: got 2 leaves, expected the parameters' structure of 3"),
        (MASK | {"b": np.ones(2, bool)}, r"mask\['b'\]: got bool\[2\], expected booleans that fit"),
        (MASK | {"b": np.ones(3)}, r"mask\['b'\]: got float64\[3\], expected booleans that fit"),
    ],
    ids=["structure", "shape", "numbers"],
)
def test_masks_that_do_not_fit_are_named(mask, message):
    with pytest.raises(ValueError, match=message):
        only(optax.sgd(0.1), mask).init(PARAMS)


def test_a_share_out_of_range_is_named():
    with pytest.raises(ValueError, match="share: got 0, expected more than 0 and at most 1"):
        salient(PARAMS, share=0)
