"""`jaxpref.gradients`: fast Gram matrices of decoders against plain gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grams import check, largest_array, slopes

from jaxpref import gradients, logprobs
from jaxpref.gradients import contractions
from jaxpref.models import decoder

VOCAB, WIDTH, TIME = 23, 12, 7
BASE = decoder.DecoderConfig(
    vocab=VOCAB, width=WIDTH, layers=1, heads=2, kv_heads=1, head_width=6, mlp_width=16
)
MODELS = {  # where layers are not shared or scanned one has all rules of its family
    "gpt2, scanned and recomputed": {
        "layers": 2,
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
        "positions": "learned",
        "kv_heads": 2,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "scan": True,
        "remat": True,
    },
    "neox": {
        "norm": "layer",
        "gated": False,
        "activation": "gelu",
        "kv_heads": 2,
        "tied": False,
        "parallel_residual": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "rope_fraction": 0.34,
    },
    "olmo": {"norm": "layer_plain", "kv_heads": 2},
    "gemma": {
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_scale": 3.0,
    },
    "qwen2, recomputed": {"qkv_bias": True, "remat": True},
    "qwen3": {"query_key_norm": True, "tied": False},
    "gemma2": {"norms": "both", "score_width": 9.0, "score_cap": 0.4, "logit_cap": 3.0},
    "gemma3, scanned": {
        "layers": 2,
        "norm_offset": 1.0,
        "norms": "both",
        "query_key_norm": True,
        "window": 3,
        "sliding": (True, False),
        "local_rope_base": 100.0,
        "scan": True,
    },
    "olmo2": {"norms": "after", "query_key_norm": "whole", "tied": False},
    "llama": {},
    "llama, scanned": {"layers": 2, "scan": True},
}


def a_model(scan=False, remat=False, dtype=jnp.float64, compute_dtype=jnp.float64, **changes):
    """A random decoder whose every parameter matters; of one layer and in float64 if not asked."""
    config = dataclasses.replace(BASE, **changes)
    policy, shapes = decoder.abstract(
        config, scan=scan, remat=remat, param_dtype=dtype, compute_dtype=compute_dtype
    )
    random = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 8.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        waves = 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)
        return jnp.asarray(mean + 0.16 * random.standard_normal(leaf.shape) + waves, leaf.dtype)

    return policy, jax.tree_util.tree_map_with_path(draw, shapes)


def some_pairs(pairs=2, seed=5):
    """Tokens and masks ``[pairs 2 time]``: padded on either side, tokens that repeat."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 9, (pairs, 2, TIME))
    tokens[:, 1, :3] = tokens[:, 0, :3]
    real = np.ones(tokens.shape, bool)
    real[0, 0, -2:] = real[0, 1, -1:] = real[1, 0, :1] = False
    scored = real & (np.arange(TIME) >= 3)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(real), jnp.asarray(scored)


def response_logp(policy):
    def logp_fn(params, response):
        return logprobs.response_scores(policy, params, *response, max_response=4).logp

    return logp_fn


@functools.cache
def measured(name):
    """Three pairs of a family: fast Gram matrices, and gradients of the six responses."""
    policy, params = a_model(**MODELS[name])
    pairs, logp_fn = some_pairs(3), response_logp(policy)
    chunk = 3 if name == "llama" else 1  # pairs at once
    fast = jax.jit(functools.partial(gradients.pair_grams, logp_fn, chunk=chunk))
    examples = tuple(x.reshape(6, TIME) for x in pairs)
    return fast(params, pairs), slopes(logp_fn, params, examples, jax.grad)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_equals_plain_gradients(name):
    found, jacobian = measured(name)
    flat = np.concatenate([np.reshape(x, (3, 2, -1)) for x in jax.tree.leaves(jacobian)], axis=2)
    np.testing.assert_allclose(found.gram, np.einsum("pix,pjx->pij", flat, flat), rtol=1e-9)
    policy, params = a_model(**MODELS[name])
    rules = gradients.explain(response_logp(policy), params, tuple(x[0] for x in some_pairs()))
    # The unembedding's, too: of the default head, whose own derivative is a whole table.
    whole = {path for path, rule in rules.items() if rule == "gradient"}
    assert not any(name in path for path in whole for name in ("kernel", "embedding", "positions"))


def test_the_definition_is_a_product_of_plain_gradients():
    random = np.random.default_rng(6)
    params = {"W": random.normal(size=(4, 4)), "b": random.normal(size=4)}
    pair = random.normal(size=(2, 5, 4))

    def logp_fn(params, x):
        return jnp.tanh(x @ params["W"] + params["b"][None]).sum()

    slopes = 1 - np.tanh(pair @ params["W"] + params["b"]) ** 2
    flat = [
        np.append(x.T @ slope, slope.sum(axis=0)) for x, slope in zip(pair, slopes, strict=True)
    ]
    found = jax.jit(functools.partial(gradients.pair_gram, logp_fn))(params, pair)
    np.testing.assert_allclose(found, flat @ np.transpose(flat), rtol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_no_gradient_of_the_tables_size_is_held(tied):
    """By the head that is the default: the largest are the slopes of its logits."""
    vocab, width = 600, 24
    policy, params = a_model(vocab=vocab, width=width, tied=tied)
    pair, logp_fn = tuple(x[0] for x in some_pairs()), response_logp(policy)
    fast = functools.partial(gradients.gram, logp_fn)
    assert largest_array(fast, params, pair) == 2 * 4 * vocab  # responses, tokens
    plain = jax.vmap(jax.grad(logp_fn), (None, 0))
    assert largest_array(plain, params, pair) == 2 * vocab * width


def test_parts_are_the_grams_of_single_parameters():
    found, jacobian = measured("llama, scanned")
    pieces = jax.tree.leaves(jacobian), jax.tree.leaves(found.by_parameter)
    for gradient, part in zip(*pieces, strict=True):
        flat = np.reshape(gradient, (3, 2, -1))
        total = part.reshape(3, -1, 2, 2).sum(axis=1)
        np.testing.assert_allclose(total, np.einsum("pix,pjx->pij", flat, flat), rtol=1e-9)
    kernel = found.by_parameter["layers"]["attention"]["query"]["kernel"][...]
    assert kernel.shape == (3, 2, 2, 2)  # a layer each, of each pair
    np.testing.assert_allclose(
        found.gram,
        sum(x.reshape(3, -1, 2, 2).sum(axis=1) for x in jax.tree.leaves(found.by_parameter)),
        rtol=1e-12,
    )


def test_a_function_of_the_whole_pair_gives_the_same():
    policy, params = a_model()
    apart, _ = measured("llama")

    def both(params, pair):
        scores = logprobs.shared_prompt_scores(
            policy, params, *(x[None] for x in pair), packed_time=2 * TIME, max_response=4
        )
        return scores.logp[0]

    fast = functools.partial(gradients.pair_grams, both, responses="together")
    together = jax.jit(fast)(params, some_pairs(3))
    np.testing.assert_allclose(together.gram, apart.gram, rtol=1e-9)
    np.testing.assert_allclose(together.logp, apart.logp, rtol=1e-12)


def test_all_pairs_of_a_batch():
    policy, params = a_model()
    examples = tuple(x.reshape(6, TIME) for x in some_pairs(3))
    assert len(examples[0]) > contractions.UNROLLED  # all blocks are one program
    found = check(response_logp(policy), params, examples, jacobian=measured("llama")[1])
    assert found.gram.shape == (6, 6)


def test_a_metric_weights_every_entry():
    policy, params = a_model()
    (apart, jacobian), logp_fn = measured("llama"), response_logp(policy)
    pair, jacobian = tuple(x[0] for x in some_pairs(3)), jax.tree.map(lambda x: x[:2], jacobian)
    weights = jax.tree.map(lambda x: 1 + np.sin(np.arange(x.size)).reshape(x.shape), params)
    fast = jax.jit(functools.partial(gradients.gram, logp_fn))
    found = check(logp_fn, params, pair, metric=weights, jacobian=jacobian, fast=fast)
    weighted = fast(params, pair, metric=jax.tree.map(np.ones_like, params))
    np.testing.assert_allclose(weighted.gram, apart.gram[0], rtol=1e-9)
    assert abs(found.gram - apart.gram[0]).max() > 0.1


def test_low_rank_adapters_of_the_decoder():
    """Of queries and values; the model's own parameters are closed over, not trained."""
    policy, params = a_model(layers=2)
    random = np.random.default_rng(4)

    def adapter(kernel):
        shapes = (kernel.shape[0], 2), (2, kernel.shape[1])
        return [jnp.asarray(random.standard_normal(shape)) for shape in shapes]

    leaves, structure = jax.tree.flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    adapters = [
        adapter(leaf) if "query" in path or "value']['k" in path else None
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]

    def logp_fn(adapters, response):
        adapted = [
            leaf if pair is None else leaf + 0.1 * pair[0] @ pair[1]
            for (_, leaf), pair in zip(leaves, adapters, strict=True)
        ]
        return response_logp(policy)(jax.tree.unflatten(structure, adapted), response)

    assert len(jax.tree.leaves(adapters)) == 2 * 2 * 2  # layers, projections, factors
    both = jax.tree.map(lambda x: x[0], some_pairs())
    check(logp_fn, adapters, both)


def test_half_precision_compute_is_summed_in_float32():
    """Plain gradients leave bfloat16 rounded entry by entry, 2^-9 each; the factors do not."""
    sizes = {"width": 64, "head_width": 32, "mlp_width": 96, "vocab": 101}
    policy, params = a_model(dtype=jnp.float32, compute_dtype=jnp.bfloat16, **sizes)
    logp_fn, examples = response_logp(policy), some_pairs()
    found = jax.jit(functools.partial(gradients.pair_grams, logp_fn))(params, examples).gram
    assert found.dtype == jnp.float32
    responses = tuple(x.reshape(4, TIME) for x in examples)
    jacobian = slopes(logp_fn, params, responses, jax.grad)
    rows = [np.reshape(x, (2, 2, -1)) for x in jax.tree.leaves(jacobian)]
    flat = np.concatenate(rows, axis=2).astype(np.float64)
    expected = np.einsum("pix,pjx->pij", flat, flat)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * abs(expected).max())
