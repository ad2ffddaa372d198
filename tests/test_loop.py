"""The loop: a run that is killed, fills the disk or meets a NaN loses nothing that was good."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import a_batch, a_state, dpo, score

from jaxpref import runs
from jaxpref.data import batches
from jaxpref.training import parallel
from jaxpref.training.checkpoints import Checkpoints
from jaxpref.training.loop import NotFiniteError, fit
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import make_step

OPTIMIZER = torch_rmsprop(0.01)
STEP = make_step(score, dpo, OPTIMIZER)


def batch_at(step):
    return a_batch(seed=step % 5 + 1)


def a_run(tmp_path, **options):
    return runs.create("toy", "run", {"beta": 0.5}, root=tmp_path, **options)


def train(run, **options):
    arguments = {"steps": 7, "run": run, "checkpoint_every": 3, "data": {"seed": 1}} | options
    return fit(STEP, a_state(OPTIMIZER), arguments.pop("batch_at", batch_at), **arguments)


def checkpointed(path):
    """Steps of the checkpoints that are whole."""
    names = (each.name for each in (path / "checkpoints").iterdir())
    return {int(name) for name in names if name.isdigit()}


def test_a_run_is_the_step_repeated(tmp_path):
    run = a_run(tmp_path)
    fitted = train(run)
    state, losses = a_state(OPTIMIZER), []
    for step in range(7):
        state, metrics, _ = STEP(state, batch_at(step))
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, fitted[:3], state[:3])
    logged = runs.columns(runs.load(run.path).metrics)
    assert logged["step"].tolist() == list(range(7))
    assert logged["loss"].tolist() == losses
    assert checkpointed(run.path) == {6, 7}


def test_a_longer_run_continues_a_shorter_one(tmp_path):
    once, twice = a_run(tmp_path / "once"), a_run(tmp_path / "twice")
    whole = train(once)
    train(twice, steps=4)
    continued = train(a_run(tmp_path / "twice", resume=True), steps=7)
    jax.tree.map(np.testing.assert_array_equal, continued[:3], whole[:3])
    assert (once.path / "metrics.jsonl").read_bytes() == (twice.path / "metrics.jsonl").read_bytes()
    again = train(twice)  # nothing is left to do
    assert int(again.step) == 7


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_there(folder, where):
    """A run that dies; in a process of its own, with the numbers of this one."""
    jax.config.update("jax_enable_x64", True)
    if where == "in a batch":
        train(a_run(folder), batch_at=lambda step: batch_at(step) if step < 5 else kill())
    if where == "in a line":  # half a line is written, steps 3 and 4 are there a second time

        def half(path, line):
            with open(path, "ab") as file:
                file.write(line[: len(line) // 2] if b'"step": 5' in line else line)
            if b'"step": 5' in line:
                kill()

        runs._append = half
    if where == "in a checkpoint":  # its files are written, but it is not yet in its place
        rename = os.rename
        os.rename = lambda old, new: kill() if "orbax" in str(old) else rename(old, new)
    train(a_run(folder, resume=True))


def test_a_run_killed_three_times_has_the_same_bits(tmp_path, clean):
    killed = tmp_path / "killed"
    for where, checkpoint, lines in (
        ("in a batch", 3, 5),
        ("in a line", 3, 5),
        ("in a checkpoint", 3, 6),
    ):
        process = clean.Process(target=killed_there, args=(killed, where))
        process.start()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
        path = killed / "toy" / "run"
        assert checkpointed(path) == {checkpoint}
        assert len(runs.load(path).metrics) == lines
    run, other = a_run(killed, resume=True), a_run(tmp_path / "whole")
    resumed, whole = train(run), train(other)
    assert (run.path / "metrics.jsonl").read_bytes() == (other.path / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, resumed[:3], whole[:3])


@pytest.mark.parametrize("first_bad", [0, 4])
def test_a_bad_batch_stops_the_run_and_keeps_the_state_before(tmp_path, first_bad):
    def poisoned(step):
        batch = batch_at(step)
        bad = batch.features.at[2, 0].set(jnp.nan)
        return batch._replace(features=bad) if step >= first_bad else batch

    run = a_run(tmp_path)
    said = (
        rf"step {first_bad}: loss is nan, in the batch of rows \[100, 101, .* 107\], scores not "
        rf"finite in \[102\]; the state before is .*checkpoints/{first_bad}$"
    )
    with pytest.raises(NotFiniteError, match=said):
        train(run, batch_at=poisoned)
    good = a_state(OPTIMIZER)
    for step in range(first_bad):
        good, _, _ = STEP(good, batch_at(step))
    with Checkpoints(run.path / "checkpoints") as checkpoints:
        assert checkpoints.latest == first_bad
        kept = checkpoints.restore(a_state(OPTIMIZER), data={"seed": 1})
    jax.tree.map(np.testing.assert_array_equal, kept[:3], good[:3])
    assert len(runs.load(run.path).metrics) == first_bad
    repaired = train(a_run(tmp_path, resume=True))
    jax.tree.map(np.testing.assert_array_equal, repaired[:3], train(a_run(tmp_path / "w"))[:3])


def test_a_gradient_that_overflows_is_named(tmp_path):
    def poisoned(step):
        batch = batch_at(step)._replace(index=None)
        return batch._replace(features=batch.features.at[2].set(jnp.array([1e250, -1e250, 1e250])))

    with pytest.raises(NotFiniteError, match="step 0: gradient_norm is inf, in a batch without"):
        train(a_run(tmp_path), batch_at=poisoned)


def test_the_best_checkpoint_stays(tmp_path):
    run = a_run(tmp_path)
    train(run, checkpoint_every=1, keep=1, metric=lambda state: abs(int(state.step) - 3))
    assert checkpointed(run.path) == {3, 7}
    with Checkpoints(run.path / "checkpoints") as checkpoints:
        assert checkpoints.best == (3, 0.0)


def test_a_full_disk_stops_the_run_and_a_later_start_repairs_it(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    with monkeypatch.context() as patch:
        write = runs._append

        def full(path, line):
            if json.loads(line)["step"] == 5:
                raise OSError(28, "No space left on device", str(path))
            write(path, line)

        patch.setattr(runs, "_append", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(run)
    assert len(runs.load(run.path).metrics) == 5
    repaired = train(a_run(tmp_path, resume=True))
    jax.tree.map(np.testing.assert_array_equal, repaired[:3], train(a_run(tmp_path / "w"))[:3])


def test_another_model_and_other_data_are_refused(tmp_path):
    run = a_run(tmp_path)
    train(run, steps=1)
    with pytest.raises(ValueError, match=r"another model or optimizer: params\.kernel is"):
        fit(STEP, a_state(OPTIMIZER, width=4), batch_at, steps=2, run=run, checkpoint_every=1)
    with pytest.raises(ValueError, match="other data: seed is 1, expected 2"):
        train(run, data={"seed": 2})


@pytest.mark.parametrize(
    ("rows", "batch", "options", "said"),
    [
        (
            10,
            8,
            {"micro_batches": 4},
            r"step 1: .* shape \(2, 3\), expected .* micro_batches=4 divi",
        ),
        (7, 6, {"mesh": True}, r"step 1: .* shape \(1, 3\), expected axis 0 .* data=2 . fsdp=1"),
        (9, 9, {"micro_batches": 2}, r"step 0: .* micro_batches=2 divides"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_before_the_first_update(
    tmp_path, rows, batch, options, said
):
    everything = a_batch(pairs=rows)
    mesh = parallel.mesh() if options.pop("mesh", False) else None
    step, shown = make_step(score, dpo, OPTIMIZER, mesh=mesh, **options), []

    def at(number):
        shown.append(number)
        index = batches.order(rows, batch, 0, number, last="short")
        return jax.tree.map(lambda x: x[index], everything)

    run = a_run(tmp_path)
    with pytest.raises(ValueError, match=said):
        fit(step, a_state(OPTIMIZER), at, steps=50, run=run, checkpoint_every=1)
    assert shown in ([0], [0, 1])  # an epoch and no more
    assert not (run.path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["steps", "checkpoint_every"])
def test_wrong_arguments_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        train(a_run(tmp_path), **{name: 0})


def test_progress_is_shown_on_request(tmp_path, capfd):
    train(a_run(tmp_path))
    assert capfd.readouterr().err == ""
    train(a_run(tmp_path / "shown"), progress=True)
    assert "7/7" in capfd.readouterr().err


def test_processes_that_do_not_write_leave_the_run_alone(tmp_path):
    run = a_run(tmp_path)
    quiet = dataclasses.replace(run, writes=False)
    quiet.log(0, {"loss": 1.0})
    quiet.save(arrays={"a": 1}, summary={"b": 2}, metrics=[])
    assert {p.name for p in run.path.iterdir()} == {"config.json", "provenance.json"}
