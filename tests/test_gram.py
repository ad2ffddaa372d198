"""`jaxpref.gradients`: fast Gram matrices of decoders against plain gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grams import check, largest_array

from jaxpref import gradients, logprobs
from jaxpref.gradients import contractions
from jaxpref.models import decoder

VOCAB, WIDTH, TIME = 23, 12, 7
BASE = decoder.DecoderConfig(
    vocab=VOCAB, width=WIDTH, layers=2, heads=2, kv_heads=1, head_width=6, mlp_width=16
)
MODELS = {  # where layers are not shared or scanned one has all rules of its family
    "llama": {},
    "llama, untied": {"tied": False, "layers": 1},
    "gpt2": {
        "layers": 1,
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
        "positions": "learned",
        "kv_heads": 2,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    "neox": {
        "layers": 1,
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
    "olmo": {"norm": "layer_plain", "kv_heads": 2, "layers": 1},
    "gemma": {
        "layers": 1,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_scale": 3.0,
    },
    "qwen2": {"qkv_bias": True, "layers": 1},
    "qwen3": {"query_key_norm": True, "tied": False, "layers": 1},
    "llama, scanned": {"scan": True},
    "llama, recomputed": {"remat": True},
    "gpt2, scanned and recomputed": {
        "norm": "layer",
        "gated": False,
        "positions": "learned",
        "kv_heads": 2,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "scan": True,
        "remat": True,
    },
}


def a_model(scan=False, remat=False, **changes):
    """A random decoder in float64 whose every parameter matters."""
    model = decoder.Decoder(
        dataclasses.replace(BASE, **changes),
        rngs=nnx.Rngs(0),
        scan=scan,
        remat=remat,
        param_dtype=jnp.float64,
        compute_dtype=jnp.float64,
    )
    policy, params = decoder.functional(model)
    return policy, jax.tree.map(
        lambda x: 8 * x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
    )


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


@pytest.mark.parametrize("name", MODELS)
def test_every_family_equals_plain_gradients(name):
    policy, params = a_model(**MODELS[name])
    pairs, logp_fn = some_pairs(), response_logp(policy)
    found = jax.jit(functools.partial(gradients.pair_grams, logp_fn))(params, pairs)
    plain = jax.jit(functools.partial(gradients.pair_gram, logp_fn))
    for i in range(2):
        expected = plain(params, tuple(x[i] for x in pairs))
        np.testing.assert_allclose(found.gram[i], expected, rtol=1e-9)
    rules = gradients.explain(logp_fn, params, tuple(x[0] for x in pairs))
    # The unembedding's, too: of the default head, whose own derivative is a whole table.
    whole = {path for path, rule in rules.items() if rule == "gradient"}
    assert not any(name in path for path in whole for name in ("kernel", "embedding", "positions"))


@pytest.mark.parametrize("tied", [False, True])
def test_no_gradient_of_the_tables_size_is_held(tied):
    """By the head that is the default: the largest are the slopes of its logits."""
    vocab, width = 600, 24
    policy, params = a_model(vocab=vocab, width=width, layers=1, tied=tied)
    pair, logp_fn = tuple(x[0] for x in some_pairs()), response_logp(policy)
    fast = functools.partial(gradients.gram, logp_fn)
    assert largest_array(fast, params, pair) == 2 * 4 * vocab  # responses, tokens
    plain = jax.vmap(jax.grad(logp_fn), (None, 0))
    assert largest_array(plain, params, pair) == 2 * vocab * width


def test_parts_are_the_grams_of_single_parameters():
    policy, params = a_model(scan=True)
    pair, logp_fn = tuple(x[0] for x in some_pairs()), response_logp(policy)
    found = jax.jit(functools.partial(gradients.gram, logp_fn))(params, pair)
    jacobian = jax.jit(jax.vmap(jax.grad(logp_fn), (None, 0)))(params, pair)
    pieces = jax.tree.leaves(jacobian), jax.tree.leaves(found.by_parameter)
    for gradient, part in zip(*pieces, strict=True):
        flat = gradient.reshape(2, -1)
        total = part.reshape(-1, 2, 2).sum(axis=0)
        np.testing.assert_allclose(total, flat @ flat.T, rtol=1e-9)
    kernel = found.by_parameter["layers"]["attention"]["query"]["kernel"][...]
    assert kernel.shape == (2, 2, 2)  # a layer each
    np.testing.assert_allclose(
        found.gram,
        sum(x.reshape(-1, 2, 2).sum(axis=0) for x in jax.tree.leaves(found.by_parameter)),
        rtol=1e-12,
    )


def test_a_function_of_the_whole_pair_gives_the_same():
    policy, params = a_model()
    pairs = some_pairs()
    fast = functools.partial(gradients.pair_grams, response_logp(policy), chunk=2)
    apart = jax.jit(fast)(params, pairs)

    def both(params, pair):
        scores = logprobs.shared_prompt_scores(
            policy, params, *(x[None] for x in pair), packed_time=2 * TIME, max_response=4
        )
        return scores.logp[0]

    fast = functools.partial(gradients.pair_grams, both, responses="together")
    together = jax.jit(fast)(params, pairs)
    np.testing.assert_allclose(together.gram, apart.gram, rtol=1e-9)
    np.testing.assert_allclose(together.logp, apart.logp, rtol=1e-12)


def test_all_pairs_of_a_batch():
    policy, params = a_model()
    examples = tuple(x.reshape(6, TIME) for x in some_pairs(3))
    assert len(examples[0]) > contractions.UNROLLED  # all blocks are one program
    found = check(response_logp(policy), params, examples)
    assert found.gram.shape == (6, 6)


def test_a_metric_weights_every_entry():
    policy, params = a_model()
    pair, logp_fn = tuple(x[0] for x in some_pairs()), response_logp(policy)
    weights = jax.tree.map(lambda x: 1 + jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    found = check(logp_fn, params, pair, metric=weights)
    ones = jax.tree.map(jnp.ones_like, params)
    fast = jax.jit(functools.partial(gradients.gram, logp_fn))
    plain, weighted = fast(params, pair), fast(params, pair, metric=ones)
    np.testing.assert_allclose(weighted.gram, plain.gram, rtol=1e-9)
    assert abs(found.gram - plain.gram).max() > 0.1


def test_low_rank_adapters_of_the_decoder():
    """Of queries and values; the model's own parameters are closed over, not trained."""
    policy, params = a_model()
    keys = iter(jax.random.split(jax.random.key(4), 99))

    def adapter(kernel):
        shapes = (kernel.shape[0], 2), (2, kernel.shape[1])
        return [jax.random.normal(next(keys), shape, kernel.dtype) for shape in shapes]

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
    model = decoder.Decoder(
        dataclasses.replace(BASE, width=64, head_width=32, mlp_width=96, vocab=101),
        rngs=nnx.Rngs(0),
        compute_dtype=jnp.bfloat16,
    )
    policy, params = decoder.functional(model)
    logp_fn, examples = response_logp(policy), some_pairs()
    found = jax.jit(functools.partial(gradients.pair_grams, logp_fn))(params, examples).gram
    assert found.dtype == jnp.float32
    plain = jax.jit(functools.partial(gradients.pair_gram, logp_fn))
    expected = np.stack(
        [plain(params, jax.tree.map(lambda x, i=i: x[i], examples)) for i in (0, 1)]
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-8 * abs(expected).max())
