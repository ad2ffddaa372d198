"""float32 means float32: no product of a result is left to a device's faster default."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import gradients, losses
from jaxpref.data.batches import Batch
from jaxpref.logprobs import shared_prompt_scores, token_logprobs
from jaxpref.models import decoder, lora, sampling
from jaxpref.training.step import init_state, make_step

CONFIG = decoder.DecoderConfig(
    *(29, 16, 2, 4, 2, 4, 24), gated=True, query_key_norm=True, qkv_bias=True
)
pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


def pairs(seed=0):
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab, (3, 2, 12)).astype(np.int32)
    tokens[:, 1, :5] = tokens[:, 0, :5]
    scored = np.broadcast_to(np.arange(12) >= 6, tokens.shape)
    return Batch(tokens, np.ones_like(scored), scored, np.full((3, 2), -20.0), np.arange(3))


def score(policy, params, batch, **options):
    return shared_prompt_scores(
        policy, params, *batch[:3], packed_time=24, max_response=8, **options
    )


def programs(precision):
    """Everything whose result may be a finding, as programs that can be lowered."""
    policy, params = decoder.abstract(CONFIG, precision=precision)
    batch, optimizer = pairs(), optax.adam(1e-3)

    def loss(scores, batch):
        return losses.dpo(scores.logp, batch.reference.astype(scores.logp.dtype), beta=0.1)

    def logp(params, pair):
        tokens, real, scored = (x[None] for x in pair)
        return score(policy, params, Batch(tokens, real, scored, None, None)).logp[0]

    state = jax.eval_shape(lambda p: init_state(p, optimizer, key=jax.random.key(0)), params)
    step = make_step(partial(score, policy), loss, optimizer)
    yield "step", step.lower(state, batch)
    grams = partial(gradients.pair_grams, logp, pairs=batch[:3], responses="together")
    yield "grams", jax.jit(grams).lower(params)
    moved = jax.jit(partial(gradients.directional, lambda p: score(policy, p, batch).logp))
    yield "derivative", moved.lower(params, params)
    prompt, key = np.ones((2, 3), np.int32), jax.random.key(0)
    draw = jax.jit(lambda p: sampling.sample(policy, p, prompt, prompt > 0, max_new=2, key=key))
    yield "sampler", draw.lower(params)


def precisions(lowered):
    """Of all matrix products, both operands' alike."""
    found = re.findall(r"stablehlo\.dot_general.*", lowered.as_text())
    assert found
    return [re.findall(r"precision = \[(\w+), (\w+)\]", line) for line in found]


def test_no_program_leaves_a_product_to_the_device():
    for name, lowered in programs("highest"):
        assert {tuple(x) for x in precisions(lowered)} == {(("HIGHEST", "HIGHEST"),)}, name


def test_a_faster_precision_is_a_choice_and_leaves_the_head_alone():
    _, lowered = next(programs("default"))
    found = [pair for (pair,) in precisions(lowered)]
    faster = found.count(("DEFAULT", "DEFAULT"))
    assert faster + found.count(("HIGHEST", "HIGHEST")) == len(found)
    assert 0 < faster < len(found)


def test_products_of_adapters_name_their_precision_too():
    policy, shapes = decoder.abstract(CONFIG)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    adapters = lora.draw(params, rank=2, key=jax.random.key(0))
    adapted, batch = lora.attach(policy, params, alpha=2), pairs()
    slope = jax.jit(jax.grad(lambda p: score(adapted, p, batch).logp.sum()))
    found = [pair for (pair,) in precisions(slope.lower(adapters))]
    assert set(found) == {("HIGHEST", "HIGHEST")}
    assert len(found) > 3 * len(adapters)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="precision: got 'tf32', expected one of"):
        decoder.abstract(CONFIG, precision="tf32")


def rounded(closed, args, products):
    """A program as an accelerator runs it: inputs of some products in TF32.

    `products` is an iterator: for each matrix product in order, whether it is one of them.
    """
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        if "jaxpr" in equation.params:
            assert equation.primitive.name == "jit"
            outputs = rounded(equation.params["jaxpr"], inputs, products)
        else:
            if equation.primitive.name == "dot_general":
                tf32 = next(products)
                inputs = [jnp.where(tf32, jax.lax.reduce_precision(x, 8, 10), x) for x in inputs]
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in closed.jaxpr.outvars]


def unlike_highest(closed):
    """For each matrix product, in order, whether a device may round its inputs."""
    for equation in closed.jaxpr.eqns:
        if "jaxpr" in equation.params:
            yield from unlike_highest(equation.params["jaxpr"])
        elif equation.primitive.name == "dot_general":
            precision = equation.params["precision"]
            yield precision is None or set(precision) != {jax.lax.Precision.HIGHEST}


@pytest.fixture(scope="module")
def first_update():
    """``products in TF32 -> error`` of theory on an update of Adam at rate 1e-7, and of whom.

    Parameters are a checkpoint's, in bfloat16's values. Numbers are of float64, so that what is
    off is the rounding of products and nothing else.
    """
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    policy, shapes = decoder.abstract(CONFIG, **types)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: 0.2 * draw(size=x.shape), shapes)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(float), params)
    batch = pairs()

    def logp(params):
        return score(policy, params, batch, head=token_logprobs).logp

    def loss(logp):
        return losses.dpo(logp, jax.lax.stop_gradient(logp), beta=0.1).mean()

    @jax.jit
    def theory(params):
        slope = jax.grad(lambda p: loss(logp(p)))(params)
        update = jax.tree.map(lambda x: -x / (jnp.abs(x) + 1e-8), slope)
        return update, jax.jvp(logp, (params,), (update,))[1]

    update, told = theory(params)
    program = jax.make_jaxpr(
        lambda rate: logp(jax.tree.map(lambda p, u: p + rate * u, params, update))
    )(jnp.zeros(()))
    run = jax.jit(lambda rate, products: rounded(program, [rate], iter(products))[0])

    def error(products):
        moved = run(RATE, np.array(products)) - run(0.0, np.array(products))
        return float(jnp.linalg.norm(moved / RATE - told) / jnp.linalg.norm(told))

    return list(unlike_highest(program)), error


RATE = 1e-7


def test_small_updates_do_what_theory_says(first_update):
    asked, error = first_update
    assert len(asked) == 9 * CONFIG.layers + 1
    assert error(asked) < 0.02


def test_products_in_the_device_default_swallow_or_invent_them(first_update):
    asked, error = first_update
    body = [True] * (len(asked) - 1)
    assert error([*body, False]) > 0.5  # all that the blocks do
    assert error([False] * len(body) + [True]) > 0.5  # the head
    exact = error([False] * len(asked))
    for number in range(len(asked)):  # each leaves its mark
        assert error([n == number for n in range(len(asked))]) > 100 * exact, number
