"""`jaxpref.gradients`: the rules of the fast Gram matrix on odd functions, and its errors.

More functions, in every order and inside one another: `test_programs`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grams import check, slopes

from jaxpref import gradients
from jaxpref.gradients import contractions

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(3, 5, 4)))
IDS = jnp.asarray(RANDOM.integers(0, 4, (3, 5)), jnp.int32)
W = jnp.asarray(RANDOM.normal(size=(4, 4)))
LAYERS = jnp.asarray(RANDOM.normal(size=(3, 4, 4)))


def same_way_twice(W, x):
    return jnp.tanh(jnp.tanh(x @ W) @ W).sum()


def both_ways(W, x):
    return jnp.tanh(jnp.tanh(x @ W) @ W.T).sum()


def both_ways_turned(W, x):
    return jnp.tanh(jnp.tanh(x @ W.T) @ W).sum()


def scan_over(W, x):
    return jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0].sum()


def scan_twice(W, x):
    return scan_over(W, jnp.sin(jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0]))


def scan_over_two_copies(W, x):
    def step(x, both):
        return jnp.tanh(jnp.tanh(x @ both[0]) @ both[1].T), None

    return jax.lax.scan(step, x, (W, W))[0].sum()


def scan_over_it_beside(W, x):
    return scan_over(W, x) + jnp.sin(x @ W[0]).sum()


def scan_of_scans(W, x):
    def step(x, W):
        return jax.lax.scan(lambda x, W: (jnp.tanh(x @ W + W[:1]), None), x, W)[0], None

    return jax.lax.scan(step, x, W.reshape(3, 1, 4, 4))[0].sum()


def scan_of_scans_reshaped(W, x):
    def step(x, W):
        return jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0], None

    return jax.lax.scan(step, x, W.reshape(3, 1, 4, 4))[0].sum()


def scan_over_a_transpose(W, x):
    return jax.lax.scan(lambda x, W: (jnp.tanh(x[:, :3] @ W), None), x, W.transpose(1, 0, 2))[
        0
    ].sum()


def scan_inside_a_layer(W, x):
    def row(x, w):
        return jnp.tanh(x + x @ jnp.outer(w, w)), None

    return jax.lax.scan(lambda x, W: (jax.lax.scan(row, x, W)[0], None), x, W)[0].sum()


def checkpoint_of_two(W, x):
    return jax.checkpoint(lambda a, b: jnp.tanh(jnp.tanh(x @ a) @ b).sum())(W, W)


def jit_called_twice(W, x):
    layer = jax.jit(lambda x: jnp.tanh(x @ W))
    return layer(layer(x)).sum()


def weight_norm(W, x):
    return jnp.tanh(x @ (W / jnp.linalg.norm(W, axis=0)[None])).sum()


ODD = [
    same_way_twice,
    both_ways,
    both_ways_turned,
    checkpoint_of_two,
    jit_called_twice,
    weight_norm,
]
STACKED = [
    scan_over,
    scan_twice,
    scan_over_two_copies,
    scan_over_it_beside,
    scan_of_scans,
    scan_of_scans_reshaped,
    scan_over_a_transpose,
    scan_inside_a_layer,
]


@pytest.mark.parametrize("fn", [*ODD, *STACKED], ids=lambda fn: fn.__name__)
def test_odd_functions_equal_plain_gradients(fn):
    check_with_metric(fn, LAYERS if fn in STACKED else W, X)


def check_with_metric(fn, params, examples):
    """With one and without, and every gradient once."""
    weights = 1 + np.cos(np.arange(params.size)).reshape(params.shape)

    @jax.jit
    def run(params):
        plain = gradients.gram(fn, params, examples)
        weighted = gradients.gram(fn, params, examples, metric=weights)
        return plain, weighted, jax.vmap(jax.grad(fn), (None, 0))(params, examples)

    plain, weighted, jacobian = run(params)
    for found, metric in ((plain, None), (weighted, weights)):
        check(fn, params, examples, metric, jacobian, fast=lambda *_, x=found, **__: x)


def read_fill(W, ids):
    return jnp.sin(jnp.take(W, ids, axis=0, mode="fill", fill_value=0)).sum()


def read_clip(W, ids):
    return jnp.sin(jnp.take(W, ids, axis=0, mode="clip")).sum()


def read_turned(W, ids):
    return jnp.sin(W.T[ids]).sum()


def read_and_multiply(W, ids):
    return jnp.sin(jnp.tanh(W[ids]) @ W.T + W[ids[::-1]]).sum() + jnp.cos(W[ids] @ W).sum()


READS = [read_fill, read_clip, read_turned, read_and_multiply]


@pytest.mark.parametrize("fn", READS, ids=lambda fn: fn.__name__)
def test_tables_equal_plain_gradients(fn):
    beyond = np.array(IDS)
    beyond[0, 1], beyond[1, 2] = 7, -9
    check_with_metric(fn, W, beyond if fn in (read_fill, read_clip) else IDS)


@pytest.mark.parametrize("examples", [X, IDS], ids=["inputs", "ids"])
def test_several_outputs_of_an_example(examples):
    def three(W, x):
        x = W[x] if x.ndim == 1 else x
        return jnp.tanh(jnp.tanh(x @ W) @ W.T + x).sum(axis=0)[:3]

    assert check(three, W, examples).gram.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("rule", ["tokens", "rows"])
def test_several_outputs_of_a_parameter_that_is_used_once(rule):
    wide = np.random.default_rng(3).normal(size=(9, 9))
    inputs = np.asarray(X)[:, :2] @ wide[:4] / 9

    def three(W, x):  # blocks between two examples are not symmetric
        y = W[x] if rule == "rows" else x @ W
        return jnp.tanh(jnp.cumsum(y, axis=0) @ wide[:, :3] / 9).sum(axis=0)

    examples = np.asarray(IDS) if rule == "rows" else inputs
    examples = np.concatenate([examples, examples[::-1] * 2 % 3])  # more than are unrolled
    assert len(examples) > contractions.UNROLLED
    assert gradients.explain(three, wide, examples) == {"": rule}
    gram = check(three, wide, examples).gram
    assert abs(gram - gram.transpose(0, 3, 2, 1)).max() > 1e-3


def test_an_unused_parameter_has_a_part_of_zero():
    params = {"used": W, "not": jnp.ones((2, 2))}
    found = check(lambda p, x: jnp.tanh(x @ p["used"]).sum(), params, X)
    assert not found.by_parameter["not"].any()
    rules = gradients.explain(lambda p, x: jnp.tanh(x @ p["used"]).sum(), params, X)
    assert rules["['not']"] == "unused"


def test_low_rank_adapters():
    params = {"down": W[:, :2], "up": W[:2]}

    def logp_fn(params, x):
        return jnp.tanh(x @ W + (x @ params["down"]) @ params["up"]).sum()

    check(logp_fn, params, X)


def test_bfloat16_products_are_summed_in_float32():
    params = W.astype(jnp.float32)

    def logp_fn(params, x):
        y = jnp.tanh(x.astype(jnp.bfloat16) @ params.astype(jnp.bfloat16))
        return y.astype(jnp.float32).sum()

    @jax.jit
    def run(params):
        slope = jax.grad(lambda y: jnp.tanh(y).astype(jnp.float32).sum())
        slopes = slope(X.astype(jnp.bfloat16) @ params.astype(jnp.bfloat16))
        return gradients.gram(logp_fn, params, X), slopes

    found, each = run(params)
    assert found.gram.dtype == jnp.float32
    x = np.asarray(X, jnp.bfloat16).astype(np.float64)
    flat = np.einsum("nti,nto->nio", x, np.asarray(each, np.float64)).reshape(3, -1)
    np.testing.assert_allclose(found.gram, flat @ flat.T, rtol=1e-5)


def test_a_table_read_in_two_dtypes():
    """The embedding as it is, the unembedding rounded: factors of several dtypes."""
    params, ids = W.astype(jnp.float32), IDS[:, :3]

    def logp_fn(params, ids):
        half = params.astype(jnp.bfloat16)
        y = jnp.sin(params[ids]).astype(jnp.bfloat16) @ half.T
        return jnp.tanh(y.astype(jnp.float32)).sum() + params[ids[::-1]].sum()

    assert gradients.explain(logp_fn, params, ids) == {"": "shared"}
    found = jax.jit(lambda p: gradients.gram(logp_fn, p, ids).gram)(params)
    each = np.reshape(slopes(logp_fn, params, ids, jax.grad), (3, -1))
    # Plain autodiff rounds the part of the product to bfloat16, 2^-9 of each entry.
    expected = each @ each.T
    np.testing.assert_allclose(found, expected, atol=2**-7 * abs(expected).max())


@pytest.mark.parametrize("rule", ["tokens", "rows"])
def test_several_outputs_of_bfloat16_are_mixed_in_float32(rule):
    """Products between tokens and weights of entries are sums: rounded they would be 2^-9 off."""
    mixing = np.array([[1, 2, 3, 4], [5, -6, 7, 8]])
    random = np.random.default_rng(0)
    if rule == "rows":
        examples = jnp.array([[0, 1, 1, 2], [1, 2, 3, 3]])
        read = np.eye(4)[np.asarray(examples)]
    else:
        examples = read = jnp.asarray(random.integers(-15, 16, (2, 4, 9)), jnp.bfloat16)
    table = jnp.ones((read.shape[-1], 9), jnp.bfloat16)
    weights = 1 + jnp.asarray(random.random(table.shape), jnp.float32) if rule == "rows" else None

    def logp_fn(table, x):  # its slopes are whole numbers, which bfloat16 holds
        y = table[x] if rule == "rows" else x @ table
        return (jnp.asarray(mixing, jnp.bfloat16) @ y).astype(jnp.float32).sum(axis=1)

    assert gradients.explain(logp_fn, table, examples) == {"": rule}
    found = jax.jit(lambda p: gradients.gram(logp_fn, p, examples, metric=weights).gram)(table)
    each = np.einsum("at,ith->iah", mixing, np.asarray(read, np.float64))
    scale = np.full(table.shape, 1.0) if weights is None else np.asarray(weights, np.float64)
    expected = np.einsum("iah,jbh,hw->iajb", each, each, scale)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def test_of_nothing_there_is_a_gram_of_nothing():
    params = {"W": LAYERS, "none": jnp.zeros((0, 4))}

    def logp_fn(params, x):
        return scan_over(params["W"], x) + params["none"].sum()

    def outputs(params, x):
        return x @ params["W"][0][0]

    @jax.jit
    def run(params):
        pairs = gradients.pair_grams(logp_fn, params, X[None][:0, :2])
        of = functools.partial(gradients.gram, outputs, params)
        some = gradients.gram(logp_fn, params, X)
        return gradients.gram(logp_fn, params, X[:0]), of(X[:0]), of(X[:, :0]), pairs, some

    empty, no_example, no_output, pairs, found = run(params)
    assert (empty.gram.shape, empty.logp.shape) == ((0, 0), (0,))
    assert empty.by_parameter["W"].shape == (3, 0, 0)  # a layer each
    assert no_example.gram.shape == (0, 5, 0, 5)
    assert no_output.gram.shape == (3, 0, 3, 0)
    assert (pairs.gram.shape, pairs.logp.shape) == ((0, 2, 2), (0, 2))
    assert not found.by_parameter["none"].any()
    np.testing.assert_array_equal(found.gram, found.by_parameter["W"].sum(axis=0))
    assert gradients.explain(logp_fn, params, X[:0])["['none']"] == "unused"


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"params\['ids'\]: got int32, expected floating"):
        gradients.gram(lambda p, x: (x @ p["W"]).sum(), {"W": W, "ids": jnp.zeros(2, jnp.int32)}, X)
    with pytest.raises(ValueError, match=r"metric: got \(2,\), expected \(4, 4\)"):
        gradients.gram(same_way_twice, W, X, metric=jnp.ones(2))
    two = {"W": W, "bias": W[0]}
    with pytest.raises(ValueError, match=r"metric: got \(\), expected \(4, 4\)"):
        gradients.gram(same_way_twice, W, X, metric=2.0)
    with pytest.raises(ValueError, match="metric: got a float of 1 arrays, expected the param"):
        gradients.gram(lambda p, x: (x @ p["W"]).sum(), two, X, metric=2.0)
    for function in (gradients.gram, gradients.explain, gradients.pair_gram, gradients.directional):
        with pytest.raises(ValueError, match=r"params\['act'\]: got \w+, expected an array \(of a"):
            function(lambda p, x: p["act"](x @ p["W"]).sum(), {"W": W, "act": jnp.tanh}, X)
    with pytest.raises(ValueError, match="logp_fn: got int64, expected floating numbers"):
        gradients.gram(lambda W, x: (x @ W).sum().astype(int), W, X)
    with pytest.raises(ValueError, match="logp_fn: got a tuple of 2 arrays, expected one array"):
        gradients.gram(lambda W, x: ((x @ W).sum(), x), W, X)
    with pytest.raises(ValueError, match=r"examples: got arrays of shapes \[\(2, 5, 4\), \(3, 5"):
        gradients.gram(lambda W, x: (x[0] @ W).sum(), W, (X, X[:2]))
    with pytest.raises(ValueError, match=r"logp_fn: got shape \(5, 4\)"):
        gradients.gram(lambda W, x: x @ W, W, X)
    with pytest.raises(ValueError, match="logp of pair 1: got"):
        gradients.pair_grams(
            lambda W, x: jnp.log(x @ W[:, 0]).sum(),
            jnp.eye(4),
            jnp.array([[[1.0] * 4] * 2, [[1.0] * 4, [-1.0] * 4]]),
        )
    with pytest.raises(ValueError, match="chunk: got 0"):
        gradients.pair_grams(same_way_twice, W, X[None, :2], chunk=0)
    with pytest.raises(ValueError, match="expected two a pair"):
        gradients.pair_grams(same_way_twice, W, X[None])


def test_long_inner_products_keep_their_small_terms():
    """One running sum in float32 would leave out a part in a hundred."""
    tenth = np.float32(0.1)
    x = np.full((2**20 + 3,), tenth)
    exact = x.size * float(tenth) ** 2

    def logp_fn(w, x):
        return (w * x).sum()

    @jax.jit
    def run(x):
        both, zero = jnp.stack([x, -x]), jnp.zeros_like(x)
        pair = gradients.pair_gram(logp_fn, zero, both)
        return contractions.inner(x, x), pair, gradients.gram(logp_fn, zero, both).gram

    number, *grams = run(x)
    assert float(number) == pytest.approx(exact, rel=1e-6)
    for gram in grams:
        np.testing.assert_allclose(gram, exact * np.array([[1, -1], [-1, 1]]), rtol=1e-6)
