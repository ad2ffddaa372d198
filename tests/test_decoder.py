"""The decoder: one code for every family, held against a loop in NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jaxpref.models import blocks, decoder
from jaxpref.models.decoder import DecoderConfig, RopeScaling

SMALL = DecoderConfig(
    vocab=13, width=12, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=10, max_positions=32
)
LAYER = {"norm": "layer", "qkv_bias": True, "output_bias": True, "mlp_bias": True, "gated": False}
ONE = dataclasses.replace(SMALL, layers=1)
FAMILIES = {
    "llama": SMALL,
    "llama3": dataclasses.replace(ONE, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
    "gpt2": dataclasses.replace(
        ONE, **LAYER, activation="gelu_tanh", positions="learned", kv_heads=4
    ),
    "gpt_neox": dataclasses.replace(
        ONE, **LAYER, activation="gelu", rope_fraction=0.34, parallel_residual=True, tied=False
    ),
    "olmo": dataclasses.replace(ONE, norm="layer_plain", clip_qkv=0.05),
    "gemma": dataclasses.replace(
        ONE, norm_offset=1.0, activation="gelu_tanh", embedding_scale=12**0.5, kv_heads=1
    ),
    "qwen2": dataclasses.replace(ONE, qkv_bias=True),
    "qwen3": dataclasses.replace(ONE, query_key_norm=True),
    "mistral": dataclasses.replace(ONE, window=3),
    "olmo2": dataclasses.replace(ONE, norms="after", query_key_norm="whole"),
    "gemma2": dataclasses.replace(
        *(SMALL,),
        norms="both",
        window=4,
        sliding=(True, False),
        score_width=9.0,
        score_cap=0.4,
        logit_cap=3.0,
    ),
    "gemma3": dataclasses.replace(
        SMALL,
        norms="both",
        query_key_norm=True,
        rope_factors=(8.0,) * 3,
        window=2,
        sliding=(True, False),
        local_rope_base=100.0,
    ),
    "smollm3": dataclasses.replace(SMALL, rotary=(True, False)),
}
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])


@functools.cache
def build(config, **options):
    """A decoder whose scales are about one, and no bias is zero: every one of them counts."""
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, shapes = decoder.abstract(config, **types | options)
    random = np.random.default_rng(1)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return mean + 0.3 * random.standard_normal(leaf.shape)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return policy._replace(hidden=jax.jit(policy.hidden)), params


@functools.cache
def sum_and_slope(config, **options):
    """Of the sum of the states' sines; the slope not stacked."""
    policy, _ = build(config, **options)
    _, params = build(config)

    def sine(params):
        return jnp.sin(policy.hidden(params, TOKENS)).sum()

    own = decoder.stack_layers(params) if options.get("scan") else params
    value, slope = jax.jit(jax.value_and_grad(sine))(own)
    return value, decoder.unstack_layers(slope) if options.get("scan") else slope


@pytest.fixture(scope="module", params=FAMILIES, ids=list(FAMILIES))
def family(request):
    config = FAMILIES[request.param]
    return config, *build(config)


@pytest.fixture(scope="module")
def llama():
    return build(ONE)


# -- A second implementation: one sequence, one position, one head at a time


def naive(config, params, tokens, positions):
    get = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }

    def norm(x, name, kind=config.norm):
        if kind != "rms":
            x = x - x.mean()
        x = x / np.sqrt((x * x).mean() + config.norm_epsilon)
        if kind == "layer_plain":
            return x
        x = x * (get[f"{name}.scale"] + config.norm_offset)
        return x + get[f"{name}.bias"] if kind == "layer" else x

    def linear(x, name):
        return x @ get[f"{name}.kernel"] + get.get(f"{name}.bias", 0.0)

    def slides(layer):
        return config.window is not None and (config.sliding is None or config.sliding[layer])

    def rope(x, position, layer):
        x, rotated = x.copy(), 2 * int(config.head_width * config.rope_fraction / 2)
        if config.rotary is not None and not config.rotary[layer]:
            return x
        for i in range(rotated // 2):
            speed = config.rope_base ** (-2 * i / rotated)
            if config.local_rope_base and slides(layer):
                speed = config.local_rope_base ** (-2 * i / rotated)
            elif config.rope_factors:
                speed /= config.rope_factors[i]
            if config.rope_scaling:
                s = config.rope_scaling
                wave = 2 * np.pi / speed
                if wave > s.original_positions / s.low_frequency_factor:
                    speed /= s.factor
                elif wave > s.original_positions / s.high_frequency_factor:
                    low, high = s.low_frequency_factor, s.high_frequency_factor
                    mix = (s.original_positions / wave - low) / (high - low)
                    speed = (1 - mix) * speed / s.factor + mix * speed
            turn = np.exp(1j * position * speed) * (x[i] + 1j * x[i + rotated // 2])
            x[i], x[i + rotated // 2] = turn.real, turn.imag
        return x

    def activation(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        if config.activation == "gelu_tanh":
            return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x / 2 * np.array([1 + math.erf(v / 2**0.5) for v in x])

    def heads(x, name, count, position, layer, *, turned):
        y = linear(x, f"{name}")
        if config.clip_qkv:
            y = np.clip(y, -config.clip_qkv, config.clip_qkv)
        if turned and config.query_key_norm == "whole":
            y = norm(y, f"{name}_norm", "rms")
        y = y.reshape(count, config.head_width)
        if turned and config.query_key_norm is True:
            y = np.stack([norm(row, f"{name}_norm", "rms") for row in y])
        if turned and learned is None:
            y = np.stack([rope(row, position, layer) for row in y])
        return y

    def before(x, name):
        return x if config.norms == "after" else norm(x, name)

    def behind(x, name):
        return x if config.norms == "before" else norm(x, name)

    learned = get.get("positions")
    stream = [get["embedding"][t] * config.embedding_scale for t in tokens]
    if learned is not None:
        stream = [x + learned[p] for x, p in zip(stream, positions, strict=True)]
    for layer in range(config.layers):
        at = f"layers.{layer}"
        normed = [before(x, f"{at}.attention_norm") for x in stream]
        place = list(zip(normed, positions, strict=True))
        attn = f"{at}.attention"
        q = [heads(x, f"{attn}.query", config.heads, p, layer, turned=True) for x, p in place]
        k = [heads(x, f"{attn}.key", config.kv_heads, p, layer, turned=True) for x, p in place]
        v = [heads(x, f"{attn}.value", config.kv_heads, p, layer, turned=False) for x, p in place]
        after = []
        for t, x in enumerate(stream):
            mixed = []
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                width = config.score_width or config.head_width
                near = config.window if slides(layer) else np.inf
                seen = [s for s in range(t + 1) if positions[t] - positions[s] < near]
                score = np.array([q[t][head] @ k[s][group] / width**0.5 for s in seen])
                if config.score_cap:
                    score = config.score_cap * np.tanh(score / config.score_cap)
                weight = np.exp(score - np.max(score))
                weight /= weight.sum()
                mixed.append(sum(w * v[s][group] for s, w in zip(seen, weight, strict=True)))
            y = linear(np.concatenate(mixed), f"{attn}.output")
            after.append(x + behind(y, f"{at}.attention_output_norm"))
        read = stream if config.parallel_residual else after
        stream = []
        for x, mixed in zip(read, after, strict=True):
            y = before(x, f"{at}.mlp_norm")
            up = linear(y, f"{at}.mlp.up")
            inner = activation(linear(y, f"{at}.mlp.gate")) * up if config.gated else activation(up)
            y = behind(linear(inner, f"{at}.mlp.down"), f"{at}.mlp_output_norm")
            stream.append(mixed + y)
    return np.stack([norm(x, "norm") for x in stream])


def test_every_family_equals_the_loop(family):
    config, policy, params = family
    expected = naive(config, params, TOKENS[1], np.arange(7))
    hidden = policy.hidden(params, TOKENS)
    assert hidden.shape == (2, 7, config.width)
    # Float64; sums of a few dozen terms.
    np.testing.assert_allclose(hidden[1], expected, rtol=1e-11, atol=1e-12)


def test_the_unembedding_is_the_embedding_where_tied(family):
    config, policy, params = family
    name = "embedding" if config.tied else "unembedding"
    table, cap = policy.head(params)
    np.testing.assert_array_equal(table, params[name][...])
    assert cap == config.logit_cap
    if cap is None:
        np.testing.assert_array_equal(policy.unembedding(params), table)
    else:
        with pytest.raises(
            ValueError, match=r"^unembedding: this model caps its logits at 3\.0, exp"
        ):
            policy.unembedding(params)
    assert ("unembedding" in params) != config.tied


def test_the_future_changes_nothing(family):
    config, policy, params = family
    changed = TOKENS.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab
    before, after = policy.hidden(params, TOKENS), policy.hidden(params, changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:] > 1e-6).any(axis=-1).all()


@pytest.mark.parametrize(("left", "right"), [(0, 4), (4, 0), (3, 1)])
def test_padding_changes_nothing(family, left, right):
    _, policy, params = family
    padded = np.pad(TOKENS, ((0, 0), (left, right)), constant_values=6)
    time = padded.shape[1]
    is_token = np.zeros(time, bool)
    is_token[left : left + 7] = True
    positions = np.broadcast_to(np.clip(np.arange(time) - left, 0, None), padded.shape)
    attend = np.tril(np.ones((time, time), bool)) & is_token[None, :]
    attend = np.broadcast_to(attend, (2, time, time))
    hidden = policy.hidden(params, padded, positions, attend)
    assert jnp.isfinite(hidden).all()  # also of the first padding, which sees nothing
    np.testing.assert_allclose(
        hidden[:, left : left + 7], policy.hidden(params, TOKENS), rtol=1e-12, atol=1e-13
    )


def test_a_row_that_sees_nothing_has_finite_derivatives(llama):
    policy, params = llama
    attend = np.broadcast_to(
        np.tril(np.ones((7, 7), bool), -1), (2, 7, 7)
    )  # the first sees nothing
    gradient = jax.jit(
        jax.grad(lambda p: jnp.square(policy.hidden(p, TOKENS, None, attend)).sum())
    )(params)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_rope_depends_on_distances_alone(llama):
    policy, params = llama
    places = np.stack([np.broadcast_to(x, 7) for x in (np.arange(7), np.arange(7) + 11)])
    here, moved = policy.hidden(params, TOKENS[[1, 1]], places)
    np.testing.assert_allclose(moved, here, rtol=1e-10, atol=1e-12)
    stretched = np.stack([2 * np.arange(7)] * 2)
    other = policy.hidden(params, TOKENS[[1, 1]], stretched)[0]
    assert np.abs(other - here).max() > 1e-3


# Both wrap a layer whatever is in it: each alone, and together on layers with all there can be.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"scan": True}),
        ("llama", {"remat": True}),
        ("gpt_neox", {"scan": True, "remat": True}),
        ("gemma3", {"scan": True, "remat": True}),
    ],
    ids=str,
)
def test_scan_and_remat_change_nothing(name, options):
    config = dataclasses.replace(FAMILIES[name], layers=2)
    expected, slope = sum_and_slope(config)
    value, gradient = sum_and_slope(config, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_window_counts_positions_and_not_columns():
    """Both sequences in one row, their common beginning once, as pairs are encoded."""
    policy, params = build(FAMILIES["gemma3"])
    first, second = np.array([3, 1, 4, 1, 5]), np.array([3, 1, 4, 9, 2])
    row = np.concatenate([first, second[3:]])[None]
    positions = np.array([[0, 1, 2, 3, 4, 3, 4]])
    attend = np.tril(np.ones((7, 7), bool))
    attend[5:, 3:5] = False
    found = policy.hidden(params, row, positions, attend[None])[0]
    alone = policy.hidden(params, np.stack([first, second]))
    np.testing.assert_allclose(found[:5], alone[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found[5:], alone[1, 3:], rtol=1e-12, atol=1e-13)


def test_stacking_and_unstacking_are_inverse():
    _, params = build(SMALL)
    back = decoder.unstack_layers(decoder.stack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    _, scanned = build(SMALL, scan=True)
    assert jax.tree.structure(decoder.stack_layers(params)) == jax.tree.structure(scanned)


def test_the_derivative_is_that_of_the_value():
    config = dataclasses.replace(SMALL, layers=1, query_key_norm=True)
    policy, params = build(config)
    # Central differences of step 1e-5: rounding 1e-9, curvature of a few hundred parameters 1e-7.
    total = jax.jit(lambda p: policy.hidden(p, TOKENS).sum())
    check_grads(total, (params,), 1, ["rev", "fwd"], 1e-6, 1e-6, eps=1e-5)


def test_half_precision_compute_keeps_its_dtype_and_comes_close():
    policy, shapes = decoder.abstract(SMALL, compute_dtype=jnp.bfloat16)
    exact, _ = decoder.abstract(SMALL)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
    random = np.random.default_rng(2)

    def draw(path, leaf):
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return np.asarray(mean + 0.02 * random.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    both = jax.jit(lambda p: (policy.hidden(p, TOKENS), exact.hidden(p, TOKENS)))
    hidden, expected = both(params)
    assert hidden.dtype == jnp.bfloat16
    # Eight bits of mantissa through two layers; the states are of size one.
    np.testing.assert_allclose(hidden.astype(jnp.float32), expected, atol=0.05, rtol=0)


def test_abstract_has_the_shapes_without_the_numbers():
    _, params = decoder.functional(decoder.Decoder(ONE, rngs=nnx.Rngs(0)))
    policy, shapes = decoder.abstract(ONE)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    hidden = jax.eval_shape(policy.hidden, shapes, jax.ShapeDtypeStruct((2, 7), jnp.int32))
    assert hidden.shape == (2, 7, SMALL.width)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab", 0),
        ("layers", -1),
        ("kv_heads", 3),
        ("head_width", 5),
        ("norm", "batch"),
        ("activation", "relu"),
        ("positions", "sine"),
        ("rope_fraction", 1.5),
        ("norms", "around"),
        ("window", 0),
        ("sliding", (True,)),
        ("rotary", (True, True, False)),
        ("local_rope_base", 0.0),
        ("score_cap", -1.0),
        ("logit_cap", 0.0),
    ],
)
def test_bad_configurations_are_named(field, value):
    with pytest.raises(Exception, match=field):  # a wrong literal may meet the type checker first
        dataclasses.replace(SMALL, **{field: value})


def test_plain_rope_frequencies_by_hand():
    config = dataclasses.replace(SMALL, head_width=4, rope_base=100.0)
    np.testing.assert_allclose(blocks.rope_frequencies(config), [1.0, 0.1])
