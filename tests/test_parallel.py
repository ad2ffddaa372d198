"""Several devices and several processes give the trajectory of one device."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from toy import a_batch, a_state, dpo, score

from jaxpref import gradients, losses, runs
from jaxpref.data.batches import Batch
from jaxpref.logprobs import shared_prompt_scores, token_logprobs_chunked
from jaxpref.models import decoder, sampling
from jaxpref.training import parallel
from jaxpref.training.checkpoints import Checkpoints
from jaxpref.training.loop import fit
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import init_state, make_step

OPTIMIZER = torch_rmsprop(1e-4)
CONFIG = decoder.DecoderConfig(*(32, 16, 2, 4, 2, 4, 24), qkv_bias=True)
MANY = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
address, processes, process, micro_batches, folder, *sizes = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(address, int(processes), int(process))
from test_parallel import train
train(folder, int(micro_batches), [int(size) for size in sizes])
"""


@functools.cache
def model():
    types = {"param_dtype": jnp.float64, "compute_dtype": jnp.float64}
    return decoder.functional(decoder.Decoder(CONFIG, rngs=nnx.Rngs(0), scan=True, **types))


def batch_at(step):
    rng = np.random.default_rng(step % 5)
    tokens = rng.integers(0, CONFIG.vocab, (8, 2, 12)).astype(np.int32)
    tokens[:, 1, :5] = tokens[:, 0, :5]
    scored = np.broadcast_to(np.arange(12) >= 6, tokens.shape)
    return Batch(tokens, np.ones_like(scored), scored, np.full((8, 2), -20.0), np.arange(8))


def start():
    params = jax.tree.map(jnp.copy, model()[1])
    return init_state(params, OPTIMIZER, key=jax.random.key(7))


def train(folder, micro_batches=1, sizes=None):
    """Six updates, a run folder with metrics and a checkpoint; on a mesh of these sizes."""
    mesh = parallel.mesh(*sizes) if sizes else None
    policy = parallel.spread(model()[0], mesh) if mesh else model()[0]
    head = functools.partial(token_logprobs_chunked, vocab_chunk=8)

    def scores(params, batch):
        rooms = {"packed_time": 24, "max_response": 8, "head": head}
        return shared_prompt_scores(policy, params, *batch[:3], **rooms)

    def loss(scores, batch):
        return losses.dpo(scores.logp, batch.reference, beta=0.1)

    state = start()
    where = parallel.shardings(state, mesh) if mesh else None
    step = make_step(
        scores, loss, OPTIMIZER, micro_batches=micro_batches, mesh=mesh, shardings=where
    )
    state = parallel.put(state, where) if mesh else state
    run = runs.create("toy", "run", {}, root=folder)
    state = fit(step, state, batch_at, steps=6, run=run, checkpoint_every=3)
    if mesh and jax.process_count() == 1:
        grams_and_samples_are_those_of_whole_parameters(state.params)
    if mesh:
        stays_where_it_lies(
            step.lower(state, batch_at(0)).compile(), state, where, mesh, micro_batches
        )
        # A checkpoint goes to any other mesh.
        other = parallel.mesh(1, mesh.devices.size)
        elsewhere = parallel.put(start(), parallel.shardings(start(), other))
        with Checkpoints(Path(folder) / "toy" / "run" / "checkpoints") as checkpoints:
            again = checkpoints.restore(elsewhere)
        same = functools.partial(np.testing.assert_array_equal, strict=True)
        jax.tree.map(same, parallel.to_host(again.params), parallel.to_host(state.params))
    return state


def grams_and_samples_are_those_of_whole_parameters(params):
    policy, whole = model()[0], jax.tree.map(jnp.asarray, parallel.to_host(params))

    def logp(params, pair):
        pair = (x[None] for x in pair)
        return shared_prompt_scores(policy, params, *pair, packed_time=24).logp[0]

    grams = functools.partial(gradients.pair_grams, logp, pairs=batch_at(0)[:3])
    grams = jax.jit(functools.partial(grams, responses="together"))
    np.testing.assert_allclose(grams(params).gram, grams(whole).gram, rtol=1e-12, atol=1e-14)
    prompt = batch_at(0).tokens[:, 0, :4]
    draw = functools.partial(sampling.sample, policy, max_new=4, key=jax.random.key(0))
    one, many = (draw(params, prompts=prompt, is_prompt=prompt >= 0) for params in (whole, params))
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.logp, many.logp, rtol=1e-12)


def stays_where_it_lies(compiled, state, where, mesh, micro_batches):
    """The program adds up parts of the gradient, keeps the state in slices, and in place."""
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.params))
    whole = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert held < whole / (mesh.shape["fsdp"] * mesh.shape["tensor"]) * 1.5
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * held  # parameters and moments
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathered
    assert not any("tree_norm" in line for line in gathered)
    # The head's loop over rows of the table is inside that over micro-batches.
    table, deep = f"[{CONFIG.vocab},{CONFIG.width}]", 1 + (micro_batches > 1)
    whole = [line for line in gathered if table in line.split(" all-gather(")[0]]
    assert whole
    assert all(line.count("while/body") < deep for line in whole)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and final parameters of one device."""
    folder = tmp_path_factory.mktemp("alone")
    params = jax.tree.map(np.asarray, train(folder).params)
    return runs.load(folder / "toy" / "run").metrics, params


def in_processes(folder, *, processes, sizes, micro_batches):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={np.prod(sizes) // processes}",
    }
    command = [sys.executable, "-c", MANY, address, str(processes)]
    rest = [str(micro_batches), str(folder), *map(str, sizes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([*command, str(process), *rest], env=environment, **pipes)
        for process in range(processes)
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)


@pytest.mark.parametrize(
    ("processes", "sizes", "micro_batches"),
    [
        pytest.param(1, (2, 2, 2), 2, id="8 devices"),
        pytest.param(2, (2, 2, 1), 1, id="2 processes"),
    ],
)
def test_many_devices_give_the_trajectory_of_one(alone, tmp_path, processes, sizes, micro_batches):
    in_processes(tmp_path, processes=processes, sizes=sizes, micro_batches=micro_batches)
    metrics, params = alone
    record = runs.load(tmp_path / "toy" / "run")
    assert record.provenance["devices"] == np.prod(sizes)
    assert [line["step"] for line in record.metrics] == list(range(6))
    for ours, line in zip(record.metrics, metrics, strict=True):
        # float64: sums are added in another order, no more.
        np.testing.assert_allclose(list(ours.values()), list(line.values()), rtol=1e-12)
    with Checkpoints(tmp_path / "toy" / "run" / "checkpoints") as checkpoints:
        end = checkpoints.restore(start())  # on one device again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), end.params, params)


def test_a_mesh_of_one_device_is_no_other_thing():
    mesh = parallel.mesh(devices=jax.devices()[:1])
    step = make_step(score, dpo, OPTIMIZER, mesh=mesh)
    begun = parallel.put(a_state(OPTIMIZER), parallel.replicated(mesh))
    state, _, _ = step(begun, a_batch())
    plain, _, _ = make_step(score, dpo, OPTIMIZER)(a_state(OPTIMIZER), a_batch())
    assert state.params["kernel"].sharding.is_equivalent_to(parallel.replicated(mesh), 2)
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)


def test_rules_are_those_of_the_optimizer_too():
    _, params = decoder.abstract(CONFIG, scan=True)
    state = jax.eval_shape(lambda p: init_state(p, OPTIMIZER, key=jax.random.key(0)), params)
    found = parallel.shardings(state, AbstractMesh((1, 2, 2), parallel.AXES))
    layers = found.params["layers"]
    assert layers["attention"]["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert layers["mlp"]["down"]["kernel"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert layers["attention"]["query"]["bias"].spec == PartitionSpec(None, "tensor")
    assert layers["mlp_norm"]["scale"].spec == PartitionSpec()
    moments = [x for x in jax.tree.leaves(found.opt_state) if x.spec]
    assert len(moments) == sum(bool(x.spec) for x in jax.tree.leaves(found.params))
    assert found.key.spec == found.step.spec == PartitionSpec()


def test_what_no_rule_names_is_cut_along_its_largest_axis_if_it_can_be():
    mesh = AbstractMesh((1, 4, 1), parallel.AXES)
    tree = {"a": jnp.zeros((8, 12)), "b": jnp.zeros((3, 5)), "c": jnp.zeros(8)}
    found = parallel.shardings({**tree, "embedding": jnp.zeros((7, 8))}, mesh)
    cut = PartitionSpec(None, "fsdp")  # a vocabulary of 7 falls to its width
    assert [x.spec for x in found.values()] == [cut, PartitionSpec(), PartitionSpec(), cut]


def test_what_the_devices_do_not_divide_is_named():
    # Shapes only: a mesh of three devices need not exist for the check.
    mesh = AbstractMesh((3, 1, 1), parallel.AXES)
    with pytest.raises(
        ValueError, match=r"shape \(8,\), expected axis 0 to be .* data=3 \* fsdp=1"
    ):
        parallel.shard({"index": jnp.zeros(8)}, mesh)
    with pytest.raises(ValueError, match=r"shape \(\), expected axis 0 to be"):
        parallel.shard({"scalar": jnp.zeros(())}, mesh)
    with pytest.raises(ValueError, match=r"mesh: got the axes .* expected \('data', 'fsdp'"):
        parallel.check(AbstractMesh((3,), ("model",)))
    _, params = decoder.abstract(CONFIG)
    with pytest.raises(ValueError, match=r"mesh: tensor=3 does not divide the 8 of layers.0.att"):
        parallel.shardings(params, AbstractMesh((1, 1, 3), parallel.AXES))
    with pytest.raises(
        ValueError, match=r"mesh: data=64 . fsdp=1 . tensor=1 devices, expected at mo"
    ):
        parallel.mesh(64)
    with pytest.raises(ValueError, match="mesh: fsdp is 0, expected at least 1"):
        parallel.mesh(fsdp=0)
