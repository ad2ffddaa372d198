"""Adapters of a frozen decoder: what they compute, what trains them, and their Gram's law."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grams import slopes
from jax.extend import core
from test_decoder import FAMILIES, SMALL, TOKENS, build

from jaxpref import gradients
from jaxpref.data.pairs import TokenPair
from jaxpref.models import decoder, lora, sampling
from jaxpref.models.blocks import LowRank, product
from jaxpref.training import parallel
from jaxpref.training.checkpoints import Checkpoints
from jaxpref.training.pairset import PairSet
from jaxpref.training.step import init_state, make_step

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")

ALPHA, RANK = 6.0, 3
TWO = {"llama": SMALL, "gpt_neox": dataclasses.replace(FAMILIES["gpt_neox"], layers=2, kv_heads=4)}
PAIRS = [
    TokenPair((np.array([3, 1, 4, 1, 5]), np.array([3, 1, 2, 7])), (2, 2), (False, False)),
    TokenPair((np.array([9, 2, 6]), np.array([9, 5, 3, 5])), (1, 1), (False, False)),
]


def moved(adapters, seed=2):
    """B is not zero, so that A counts."""
    random = np.random.default_rng(seed)
    b = {m: 0.3 * random.standard_normal(x["b"].shape) for m, x in sorted(adapters.items())}
    return {module: {"a": x["a"], "b": jnp.asarray(b[module])} for module, x in adapters.items()}


@functools.cache
def adapted(name="llama", *, scan=False, targets=lora.KERNELS):
    """The base's policy and parameters, and those of trained adapters."""
    policy, params = build(TWO[name], scan=scan)
    if scan:
        params = decoder.stack_layers(build(TWO[name])[1])
    drawn = lora.draw(params, rank=RANK, key=jax.random.key(5), targets=targets)
    return policy, params, lora.attach(policy, params, alpha=ALPHA), drawn


def stacked(adapters):
    """Adapters of layers apart as those of a stack."""
    tails = sorted({module.split(".", 2)[2] for module in adapters})
    of = lambda tail, side: [adapters[f"layers.{i}.{tail}"][side] for i in range(2)]  # noqa: E731
    return {f"layers.{t}": {s: jnp.stack(of(t, s)) for s in ("a", "b")} for t in tails}


def by_hand(params, adapters, alpha=ALPHA):
    """Each kernel with its adapter in it, one at a time."""
    flat = {
        jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value"): x
        for keys, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    for module, both in adapters.items():
        a, b = np.asarray(both["a"]), np.asarray(both["b"])
        flat[f"{module}.kernel"] = flat[f"{module}.kernel"] + alpha / a.shape[-1] * (a @ b)
    return jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))


# -- What they compute


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
def test_at_the_start_the_policy_is_the_base(scan):
    base, params, policy, adapters = adapted(scan=scan)
    found = jax.jit(policy.hidden)(adapters, TOKENS)
    np.testing.assert_array_equal(found, base.hidden(params, TOKENS))
    np.testing.assert_array_equal(policy.unembedding(adapters), base.unembedding(params))
    assert policy.bounds == base.bounds


@pytest.mark.parametrize("name", TWO)
def test_a_kernel_with_its_adapter_is_their_sum(name):
    base, params, policy, drawn = adapted(name)
    adapters = moved(drawn)
    found = jax.jit(policy.hidden)(adapters, TOKENS)
    expected = base.hidden(by_hand(params, adapters), TOKENS)
    assert np.abs(found - base.hidden(params, TOKENS)).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
    merged = lora.merge(params, adapters, alpha=ALPHA)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(found, base.hidden(merged, TOKENS), rtol=1e-10, atol=1e-11)


def test_stacked_layers_have_the_same_adapters_and_numbers():
    _, _, policy, drawn = adapted()
    base, params, scanned, drawn_there = adapted(scan=True)
    jax.tree.map(np.testing.assert_array_equal, stacked(drawn), drawn_there)
    adapters = moved(drawn)
    expected = jax.jit(policy.hidden)(adapters, TOKENS)
    found = jax.jit(scanned.hidden)(stacked(adapters), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
    merged = lora.merge(params, stacked(adapters), alpha=ALPHA)
    np.testing.assert_allclose(base.hidden(merged, TOKENS), expected, rtol=1e-10, atol=1e-11)


def test_each_module_may_have_an_alpha_of_its_own():
    _, params, _, drawn = adapted()
    base, _ = build(TWO["llama"])
    adapters = moved(drawn)
    alphas = {module: 1.0 + number for number, module in enumerate(sorted(adapters))}
    policy = lora.attach(base, params, alpha=alphas)
    expected = params
    for module in adapters:
        expected = by_hand(expected, {module: adapters[module]}, alphas[module])
    expected = base.hidden(expected, TOKENS)
    found = jax.jit(policy.hidden)(adapters, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
    scanned, stack, _, _ = adapted(scan=True)
    found = jax.jit(lora.attach(scanned, stack, alpha=alphas).hidden)(stacked(adapters), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


def test_targets_are_patterns_of_paths():
    params = build(SMALL)[1]
    names = lambda *targets: sorted(  # noqa: E731
        lora.draw(params, rank=1, key=jax.random.key(0), targets=targets)
    )
    assert len(names("layers.*.kernel")) == 2 * 7
    assert names("*.attention.query") == [f"layers.{i}.attention.query" for i in (0, 1)]
    assert names("*.1.mlp.down.kernel", "layers.0.*.up") == ["layers.0.mlp.up", "layers.1.mlp.down"]


def test_a_draw_has_the_variance_it_says():
    kernel = jax.ShapeDtypeStruct((400, 8), jnp.float32)
    (both,) = lora.draw({"kernel": {"kernel": kernel}}, rank=50, key=jax.random.key(0),
                        targets=["kernel"]).values()  # fmt: skip
    assert not both["b"].any()
    assert np.abs(both["a"]).max() < 400**-0.5
    # Of 20,000 uniform numbers; the error of their variance is 0.6 % of it.
    np.testing.assert_allclose(np.var(both["a"]), 1 / (3 * 400), rtol=0.03)


# -- Dropout


def test_dropped_inputs_are_those_of_the_key_and_the_frozen_kernel_sees_all():
    config = dataclasses.replace(SMALL, layers=1)
    base, params = build(config)
    policy = lora.attach(base, params, alpha=ALPHA)
    adapters = moved(lora.draw(params, rank=2, key=jax.random.key(1), targets=["*.mlp.down"]))
    hidden = jax.jit(policy.hidden)
    plain = hidden(adapters, TOKENS)
    drop = lambda seed, rate=0.5: hidden(  # noqa: E731
        lora.dropped(adapters, rate=rate, key=jax.random.key(seed)), TOKENS
    )
    np.testing.assert_array_equal(drop(3, 0.0), plain)
    np.testing.assert_array_equal(drop(3), drop(3))
    assert np.abs(drop(3) - drop(4)).max() > 1e-3
    # The final norm's input is linear in the adapter of the last product, so the mean over keys of
    # what it adds is what it adds without dropout; the norm itself is taken out by its scale.
    start = lora.dropped(jax.tree.map(jnp.zeros_like, adapters), rate=0.5, key=jax.random.key(3))
    np.testing.assert_array_equal(hidden(start, TOKENS), base.hidden(params, TOKENS))


def test_the_mean_over_keys_is_the_product_without_dropout():
    random = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(random.standard_normal(s)) for s in ((2, 6), (6, 4), (6, 3), (3, 4)))
    scale = jnp.asarray(0.7)

    def with_key(key):
        return product(x, LowRank(w, a, b, scale, key, jnp.asarray(0.75)), jnp.float64, "highest")

    each = jax.vmap(with_key)(jax.random.split(jax.random.key(0), 4000))
    error = each.std(axis=0) / math.sqrt(len(each))
    expected = x @ w + 0.7 * (x @ a) @ b
    assert (error < 0.1).all()
    assert (np.abs(each.mean(axis=0) - expected) < 4 * error).all()
    assert (np.abs(each.mean(axis=0) - x @ w) > 4 * error).any()


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_stack_drop_as_layers_apart(remat):
    _, _, policy, drawn = adapted()
    adapters, key = moved(drawn), jax.random.key(8)
    expected = jax.jit(policy.hidden)(lora.dropped(adapters, rate=0.3, key=key), TOKENS)
    _, params, _, _ = adapted(scan=True)
    base, _ = build(TWO["llama"], scan=True, remat=remat)
    scanned = lora.attach(base, params, alpha=ALPHA)
    found = jax.jit(scanned.hidden)(lora.dropped(stacked(adapters), rate=0.3, key=key), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


# -- What trains them


def arrays_of(fn, *args):
    """Primitive and shape of every intermediate array of a program."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield from ((equation.primitive.name, v.aval.shape) for v in equation.outvars)
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if isinstance(inner, core.Jaxpr):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(fn)(*args).jaxpr))


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
def test_no_gradient_of_a_kernels_size_is_formed(scan):
    base, params, policy, adapters = adapted(scan=scan)
    shapes = {site.shape[-2:] for site in lora.sites(params).values()}
    shapes |= {shape[::-1] for shape in shapes}
    assert not any(14 in shape for shape in shapes)  # the tokens of the batch, which are no side

    def made(policy, params):
        slope = jax.grad(lambda p: jnp.sin(policy.hidden(p, TOKENS)).sum())
        found = arrays_of(slope, params)
        return [s for name, s in found if name in ("dot_general", "add_any") and s[-2:] in shapes]

    assert len(made(base, params)) >= 7  # the test sees those of full fine-tuning
    assert made(policy, adapters) == []


def test_the_base_is_an_argument_of_a_program_and_no_text_of_it():
    base, params, policy, adapters = adapted()
    values = sum(x.nbytes for x in jax.tree.leaves(params))
    lowered = jax.jit(policy.hidden).lower(adapters, TOKENS)
    kept = sum(x.nbytes for x in jax.tree.leaves(adapters))
    assert lowered.compile().memory_analysis().argument_size_in_bytes > 0.9 * (values + kept)
    closed = jax.jit(lambda tokens: base.hidden(params, tokens)).lower(TOKENS)
    assert len(closed.as_text()) > len(lowered.as_text()) + values  # hexadecimal


def test_one_update_moves_adapters_and_a_checkpoint_holds_nothing_else(tmp_path):
    _, _, policy, adapters = adapted(scan=True)
    pairs = PairSet.of(policy, PAIRS)
    reference = pairs.logps(adapters)
    np.testing.assert_allclose(reference, PairSet.of(adapted()[2], PAIRS).logps(adapted()[3]))

    def loss(scores, batch):
        margin = (scores.logp - batch.reference)[:, 0] - (scores.logp - batch.reference)[:, 1]
        return -jax.nn.log_sigmoid(0.1 * margin)

    optimizer = optax.adam(1e-2)
    step = make_step(pairs.score, loss, optimizer)
    state = init_state(jax.tree.map(jnp.copy, adapters), optimizer, key=jax.random.key(0))
    batch = pairs.with_reference(reference).rows([0, 1])
    for _ in range(3):
        state, metrics, _ = step(state, batch)
    assert metrics["loss"] < math.log(2) - 1e-3
    assert all((x["a"] != adapters[m]["a"]).any() for m, x in state.params.items())
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state)
        back = checkpoints.restore(state)
    jax.tree.map(np.testing.assert_array_equal, back.params, state.params)
    assert {x.size for x in jax.tree.leaves(state.opt_state)} <= {
        1, *(x.size for x in jax.tree.leaves(adapters))
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["data", "fsdp"])
def test_on_two_devices_the_numbers_are_those_of_one(sizes):
    base, params, policy, adapters = adapted()
    mesh, optimizer = parallel.mesh(*sizes), optax.sgd(0.1)
    # The base is put where it is to lie before its refs are made: cut, as a state is.
    cut = parallel.put(params, parallel.shardings(params, mesh))
    there = parallel.spread(lora.attach(base, cut, alpha=ALPHA), mesh)
    loss = lambda scores, _: scores.logp[:, 1] - scores.logp[:, 0]  # noqa: E731
    found = []
    for each, options in ((policy, {}), (there, {"mesh": mesh})):
        pairs = PairSet.of(each, PAIRS)
        state = init_state(jax.tree.map(jnp.copy, adapters), optimizer, key=jax.random.key(0))
        if options:
            options["shardings"] = parallel.shardings(state, mesh)
            state = parallel.put(state, options["shardings"])
        step = make_step(pairs.score, loss, optimizer, **options)
        found.append(step(state, pairs.rows([0, 1]))[0].params)
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)


def test_samples_are_those_of_the_merged_model():
    base, params, policy, drawn = adapted(scan=True)
    adapters = moved(drawn)
    prompts, is_prompt = TOKENS[:, :3], np.ones((2, 3), bool)
    options = {"max_new": 4, "key": jax.random.key(3)}
    found = sampling.sample(policy, adapters, prompts, is_prompt, **options)
    merged = lora.merge(params, adapters, alpha=ALPHA)
    expected = sampling.sample(base, merged, prompts, is_prompt, **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=1e-9)


# -- Grams


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
def test_fast_grams_are_those_of_plain_gradients(scan):
    base, params = build(SMALL, scan=True) if scan else build(dataclasses.replace(SMALL, layers=1))
    policy = lora.attach(base, params, alpha=ALPHA)
    adapters = moved(lora.draw(params, rank=RANK, key=jax.random.key(5)))
    pairs = PairSet.of(policy, PAIRS)
    batch = pairs.rows([0, 1])[:3]
    of_pairs = functools.partial(gradients.pair_grams, pairs.logp, responses="together", chunk=2)
    found = jax.jit(of_pairs)(adapters, batch)
    jacobian = slopes(pairs.logp, adapters, batch)
    flat = np.concatenate([np.reshape(x, (2, 2, -1)) for x in jax.tree.leaves(jacobian)], axis=2)
    np.testing.assert_allclose(found.gram, flat @ flat.swapaxes(1, 2), rtol=1e-9)
    one = jax.tree.map(lambda x: x[:1], batch)
    assert {*gradients.explain(pairs.logp, adapters, one).values()} <= {"tokens", "layer"}


def test_token_grams_sum_to_those_of_responses():
    """The unembedding is none of the parameters, and has no part."""
    base, params = build(dataclasses.replace(SMALL, layers=1))
    policy = lora.attach(base, params, alpha=ALPHA)
    adapters = moved(lora.draw(params, rank=2, key=jax.random.key(5)))
    both, targets = TOKENS[:, :-1], jnp.asarray(TOKENS[:, 1:])

    def hidden(params, tokens):
        return policy.hidden(params, tokens[None])[0]

    def logp(params, example):
        logits = hidden(params, example[0]) @ policy.unembedding(params).T
        return jnp.take_along_axis(jax.nn.log_softmax(logits), example[1][:, None], axis=1).sum()

    found = jax.jit(
        lambda p: gradients.token_gram(hidden, policy.unembedding, p, both, targets).gram
    )(adapters)
    flat = slopes(logp, adapters, (both, targets))
    flat = np.concatenate([np.reshape(x, (2, -1)) for x in jax.tree.leaves(flat)], axis=1)
    np.testing.assert_allclose(found.sum(axis=(1, 3)), flat @ flat.T, rtol=1e-9)


def test_at_the_start_the_mean_gram_is_that_of_the_kernels_made_smaller():
    """``alpha^2 var(A) / rank`` of the full Gram, of each kernel of each layer, over draws of A."""
    base, params, policy, _ = adapted(scan=True)
    pairs, full, draws = PairSet.of(policy, PAIRS), PairSet.of(base, PAIRS), 300
    batch = pairs.rows([0, 1])[:3]

    def parts(pairs, params):
        options = {"responses": "together", "chunk": 2}
        return gradients.pair_grams(pairs.logp, params, batch, **options).by_parameter

    keys = jax.random.split(jax.random.key(1), draws)
    each = jax.jit(
        functools.partial(
            jax.lax.map, lambda key: parts(pairs, lora.draw(params, rank=RANK, key=key))
        )
    )(keys)
    whole = jax.tree.leaves(jax.jit(functools.partial(parts, full))(params))
    scores = []
    for module, site in lora.sites(params).items():
        assert not each[module]["a"].any()  # B is zero
        found = np.asarray(each[module]["b"])  # [draws pairs layers 2 2]
        expected = ALPHA**2 / RANK / (3 * site.shape[-2]) * np.asarray(whole[site.leaf])
        error = found.std(axis=0) / math.sqrt(draws)
        scores.append((found.mean(axis=0) - expected) / error)
        squares = np.eye(2, dtype=bool)
        # A law a quarter off would be seen in every one.
        assert (error[..., squares] < 0.06 * expected[..., squares]).all()
    scores = np.stack(scores)
    assert np.abs(scores).max() < 4  # of 112, which depend on one another
    assert 0.5 < scores.std() < 1.5


# -- What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: got 0, expected at least 1"),
        ({"targets": ["*.q_proj"]}, "targets: '*.q_proj' matches no kernel, expected patterns of"),
        ({"targets": ["embedding"]}, "targets: 'embedding' matches no kernel"),
        ({"targets": ["layers.1.*"]}, "'layers.1.*' matches 1 of the 2 stacked layers of layers."),
    ],
    ids=["rank", "typo", "embedding", "one of a stack"],
)
def test_bad_draws_are_named(options, message):
    params = adapted(scan=True)[1]
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.draw(params, **{"rank": 2, "key": jax.random.key(0)} | options)


def test_a_rank_above_the_kernels_sides_is_allowed():
    base, params = build(SMALL)
    adapters = moved(lora.draw(params, rank=20, key=jax.random.key(0), targets=["*.key"]))
    found = lora.attach(base, params, alpha=ALPHA).hidden(adapters, TOKENS)
    expected = base.hidden(by_hand(params, adapters), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


def test_adapters_of_another_model_are_named():
    _, params, policy, adapters = adapted()
    key = "layers.0.mlp.up"
    other = adapters | {key: {"a": adapters[key]["a"], "b": jnp.zeros((RANK, 11))}}
    with pytest.raises(
        ValueError, match=r"adapters: layers.0.mlp.up has a \(12, 3\) and b \(3, 11"
    ):
        policy.hidden(other, TOKENS)
    deeper = adapters | {"layers.2.mlp.up": adapters[key]}
    with pytest.raises(ValueError, match=r"adapters: layers.2.mlp.up is no kernel of the model"):
        lora.merge(params, deeper, alpha=1.0)
    with pytest.raises(ValueError, match=r"alpha: got none for layers.\d.\w+.\w+, expected one"):
        lora.merge(params, adapters, alpha={"layers.7": 1.0})
    with pytest.raises(ValueError, match="rate: got 1, expected at least 0 and below 1"):
        lora.dropped(adapters, rate=1, key=jax.random.key(0))
