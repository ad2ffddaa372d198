"""``--mesh``: an experiment on several devices or in several processes has the numbers of one."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxpref import runs

SIZES = {"rates": 1e-3, "starts": 1, "epochs": 1, "pairs": 4, "unseen": 3, "trained": 2,
         "batch": 2, "seeds": 2, "resamples": 20}  # fmt: skip


def start(folder, model, name, mesh, devices, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    more = [f"--{key}={value}" for key, value in {**SIZES, "mesh": mesh}.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.dose", "--name", name, "--model", model, *more],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.getcwd(), **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """Runs on one device, on a mesh of two, and by two processes: arrays, and what they printed."""
    folder, model = tmp_path_factory.mktemp("mesh"), str(tiny_model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    job |= {"JAX_PLATFORMS": "cpu"}
    started = {
        "one": [start(folder, model, "one", "", 1)],
        "two": [start(folder, model, "two", "fsdp=2", 2)],
        "job": [start(folder, model, "job", "data=2", 1, JAX_PROCESS_ID=str(n), **job)
                for n in range(2)],
    }  # fmt: skip
    said = {
        name: [each.communicate(timeout=600) for each in some] for name, some in started.items()
    }
    for name, some in started.items():
        assert [each.returncode for each in some] == [0] * len(some), said[name]
    return {name: (runs.load(folder / "runs" / "dose" / name), said[name]) for name in started}


@pytest.mark.parametrize("name", ["two", "job"])
def test_the_numbers_are_those_of_one_device(made, name):
    (one, _), (many, said) = made["one"], made[name]
    assert one.arrays.keys() == many.arrays.keys()
    for key, x in one.arrays.items():
        if np.issubdtype(x.dtype, np.floating):  # float32: sums are added in another order
            np.testing.assert_allclose(many.arrays[key], x, rtol=1e-3, atol=2e-3, err_msg=key)
        else:
            np.testing.assert_array_equal(many.arrays[key], x, err_msg=key)
    assert many.provenance["devices"] == 2
    assert many.config["mesh"] == {"two": "fsdp=2", "job": "data=2"}[name]
    spoke = ["beyond coin" in out for out, _ in said]
    assert spoke == [True, False][: len(said)]  # one of them


def test_a_mesh_that_cannot_be_is_one_line(tiny_model, tmp_path):
    for mesh, message in (
        ("data=2,depth=2", "got 'depth=2', expected one of data, fsdp, tensor"),
        ("data=64", "data=64 * fsdp=1 * tensor=1 devices, expected at most the 1 there are"),
    ):
        failed = start(tmp_path, str(tiny_model), "bad", mesh, 1)
        _, error = failed.communicate(timeout=100)
        assert failed.returncode == 1
        assert error.strip().splitlines()[-1].startswith(f"dose: mesh: {message}"), error
