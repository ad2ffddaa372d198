"""``--mesh``: an experiment on several devices or in several processes has the numbers of one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxpref import runs

SIZES = {"rates": 1e-3, "starts": 1, "epochs": 1, "pairs": 4, "unseen": 3, "trained": 2,
         "batch": 2, "seeds": 2, "resamples": 20}  # fmt: skip


def start(folder, command, devices, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.getcwd(), **environment},
    )  # fmt: skip


def start_job(folder, command):
    """Two processes of one device each, which know of each other by the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    return [start(folder, command, 1, JAX_PROCESS_ID=str(n), **job) for n in range(2)]


def done(started):
    said = [each.communicate(timeout=600) for each in started]
    assert [each.returncode for each in started] == [0] * len(started), said
    return said


def dose(model, name, mesh=""):
    flags = {**SIZES, "name": name, "model": model, "mesh": mesh}
    return ["experiments.dose", *(f"--{key}={value}" for key, value in flags.items())]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """Runs on one device, on a mesh of two, and by two processes: arrays, and what they printed."""
    folder = tmp_path_factory.mktemp("mesh")
    started = {
        "one": [start(folder, dose(tiny_model, "one"), 1)],
        "two": [start(folder, dose(tiny_model, "two", "fsdp=2"), 2)],
        "job": start_job(folder, dose(tiny_model, "job", "data=2")),
    }
    said = {name: done(some) for name, some in started.items()}
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


def test_scores_of_two_processes_are_those_of_one(tiny_model, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "Yes, " * n, "rejected": "No."} for n in range(1, 4)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "jaxpref.score",
        f"--model={tiny_model}",
        f"--data={data}",
        "--scores=ches",
        "--tokens=40",
    ]
    alone = [start(tmp_path, [*flags, "--out=one.parquet"], 1)]
    both = start_job(tmp_path, [*flags, "--out=two.parquet"])
    done(alone)
    assert ["pairs" in out for out, _ in done(both)] == [True, False]
    one, two = (pq.read_table(tmp_path / f"{name}.parquet").to_pydict() for name in ("one", "two"))
    assert one["row"] == two["row"] == [0, 1, 2]
    np.testing.assert_allclose(one["ches"], two["ches"], rtol=1e-4)
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "one.parquet",
        "pairs.jsonl",
        "two.parquet",
    ]


def test_a_mesh_that_cannot_be_is_one_line(tiny_model, tmp_path):
    for mesh, message in (
        ("data=2,depth=2", "got 'depth=2', expected one of data, fsdp, tensor"),
        ("data=64", "data=64 * fsdp=1 * tensor=1 devices, expected at most the 1 there are"),
    ):
        failed = start(tmp_path, dose(tiny_model, "bad", mesh), 1)
        _, error = failed.communicate(timeout=100)
        assert failed.returncode == 1
        assert error.strip().splitlines()[-1].startswith(f"dose: mesh: {message}"), error
