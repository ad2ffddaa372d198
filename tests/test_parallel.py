"""Several devices and several processes give the trajectory of one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import a_batch, a_state, dpo, score

from jaxpref import runs
from jaxpref.training import parallel
from jaxpref.training.checkpoints import Checkpoints
from jaxpref.training.loop import fit
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import make_step

OPTIMIZER = torch_rmsprop(0.01)
MANY = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
address, processes, process, devices, micro_batches, folder = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(address, int(processes), int(process))
assert jax.device_count() == int(devices)
from test_parallel import train
train(folder, int(micro_batches), many=True)
"""


def batch_at(step):
    return jax.tree.map(np.asarray, a_batch(pairs=16, seed=step % 5 + 1))


def train(folder, micro_batches=1, *, many=False):
    """Six updates, a run folder with metrics and a checkpoint; on all devices if `many`."""
    mesh = parallel.data_mesh() if many else None
    step = make_step(score, dpo, OPTIMIZER, micro_batches=micro_batches, mesh=mesh)
    state = a_state(OPTIMIZER)
    if mesh is not None:
        state = parallel.replicate(state, mesh)
    run = runs.create("toy", "run", {}, root=folder)
    state = fit(step, state, batch_at, steps=6, run=run, checkpoint_every=3)
    # Work is shared: the devices add up their parts of the gradient.
    compiled = step.lower(state, batch_at(0)).compile().as_text()
    assert ("all-reduce" in compiled) == many
    return state


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and final parameters of one device."""
    folder = tmp_path_factory.mktemp("alone")
    params = jax.tree.map(np.asarray, train(folder).params)
    return runs.load(folder / "toy" / "run").metrics, params


def in_processes(folder, *, processes, devices, micro_batches):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
    }
    command = [sys.executable, "-c", MANY, address, str(processes)]
    rest = [str(devices), str(micro_batches), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([*command, str(process), *rest], env=environment, **pipes)
        for process in range(processes)
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)


@pytest.mark.parametrize(
    ("processes", "devices", "micro_batches"),
    [pytest.param(1, 8, 2, id="8 devices"), pytest.param(2, 4, 1, id="2 processes")],
)
def test_many_devices_give_the_trajectory_of_one(
    alone, tmp_path, processes, devices, micro_batches
):
    in_processes(tmp_path, processes=processes, devices=devices, micro_batches=micro_batches)
    metrics, params = alone
    record = runs.load(tmp_path / "toy" / "run")
    assert record.provenance["devices"] == devices
    assert [line["step"] for line in record.metrics] == list(range(6))
    for ours, line in zip(record.metrics, metrics, strict=True):
        # float64: the devices' sums over pairs are added in another order, no more.
        np.testing.assert_allclose(list(ours.values()), list(line.values()), rtol=1e-12)
    with Checkpoints(tmp_path / "toy" / "run" / "checkpoints") as checkpoints:
        end = checkpoints.restore(a_state(OPTIMIZER))  # on one device again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), end.params, params)


def test_a_mesh_of_one_device_is_no_other_thing():
    mesh = parallel.data_mesh(jax.devices()[:1])
    step = make_step(score, dpo, OPTIMIZER, mesh=mesh)
    state, _, _ = step(parallel.replicate(a_state(OPTIMIZER), mesh), a_batch())
    plain, _, _ = make_step(score, dpo, OPTIMIZER)(a_state(OPTIMIZER), a_batch())
    assert state.params["kernel"].sharding.is_equivalent_to(parallel.replicated(mesh), 2)
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)


def test_what_the_devices_do_not_divide_is_named():
    # Shapes only: a mesh of three devices need not exist for the check.
    mesh = jax.sharding.AbstractMesh((3,), ("data",))
    with pytest.raises(ValueError, match=r"shape \(8,\), expected axis 0 to be .* 3 devices"):
        parallel.shard({"index": jnp.zeros(8)}, mesh)
    with pytest.raises(ValueError, match=r"shape \(\), expected axis 0 to be"):
        parallel.shard({"scalar": jnp.zeros(())}, mesh)
    with pytest.raises(ValueError, match=r"mesh has the axes .* expected an axis 'data'"):
        parallel.check(jax.sharding.AbstractMesh((3,), ("model",)))
