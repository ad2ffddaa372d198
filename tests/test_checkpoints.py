"""Checkpoints: bit for bit, another model refused, a kill or a full disk survived."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import a_batch, a_state, dpo, score

from jaxpref.training.checkpoints import Best, Checkpoints
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import init_state, make_step

OPTIMIZER = torch_rmsprop(0.01)


@pytest.fixture(scope="module")
def states():
    """The toy's states before and after three updates, as copies."""
    step, state = make_step(score, dpo, OPTIMIZER), a_state(OPTIMIZER)
    out = [jax.tree.map(jnp.copy, state)]
    for seed in (1, 2, 3):
        state, _, _ = step(state, a_batch(seed=seed))
        out.append(jax.tree.map(jnp.copy, state))
    return out


def assert_same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in leaves:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_state_comes_back_bit_for_bit(states, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (None, None)
        checkpoints.save(states[2], data={"seed": 3})
        assert (checkpoints.latest, checkpoints.best) == (2, None)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(states[0], data={"seed": 3}), states[2])


def test_every_kind_of_leaf_comes_back(tmp_path):
    params = [{"a": jnp.arange(3, dtype=jnp.bfloat16)}, (jnp.ones((2, 1)), jnp.array(True))]
    optimizer = optax.inject_hyperparams(torch_rmsprop, hyperparam_dtype=jnp.float32)(0.1)
    state = init_state(params, optimizer, key=jax.random.key(3, impl="rbg"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        like = jax.tree.map(jnp.copy, state)._replace(key=jax.random.key(0, impl="rbg"))
        assert_same_bits(checkpoints.restore(like), state)


def test_the_last_ones_and_the_best_are_kept(states, tmp_path):
    numbered = [states[0]._replace(step=jnp.array(n, jnp.int32)) for n in range(6)]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for state, metric in zip(numbered, (0.5, 0.3, 0.7, 0.3, 0.9, 0.8), strict=True):
            checkpoints.save(state, metric=metric)
        assert checkpoints.best == Best(step=1, metric=0.3)
        found = {int(p.name) for p in tmp_path.iterdir()}
        assert {4, 5} < found
        assert len(found) == 3
        assert found & {1, 3}
    with Checkpoints(tmp_path) as checkpoints:  # the best outlives the process
        assert checkpoints.best == Best(step=1, metric=0.3)


@pytest.mark.parametrize(
    ("like", "data", "said"),
    [
        (
            a_state(OPTIMIZER, width=4),
            {},
            r"2 is a checkpoint of another model or optimizer: params\.kernel is float64\[3, 5\], "
            r"expected float64\[4, 5\] \(and 1 more\)",
        ),
        (
            a_state(optax.sgd(0.1)),
            {},
            r"opt_state\.mean_square\.bias is float64\[5\], expected none",
        ),
        (a_state(optax.adam(0.1)), {}, r"opt_state\.0\.count is absent, expected int32\[\]"),
        (
            a_state(OPTIMIZER, dtype=jnp.float32),
            {},
            r"params\.bias is float64\[5\], expected float32\[5\]",
        ),
        (a_state(OPTIMIZER), {"seed": 4}, "checkpoint of other data: seed is absent, expected 4"),
    ],
    ids=["shape", "unexpected", "absent", "dtype", "data"],
)
def test_a_checkpoint_of_another_model_is_refused(states, tmp_path, like, data, said):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(states[2])
        with pytest.raises(ValueError, match=said):
            checkpoints.restore(like, data=data)


def test_wrong_arguments_are_named(states, tmp_path):
    with pytest.raises(ValueError, match="keep is 0, expected at least 1"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"None is not a checkpoint, expected .* \[\]"):
            checkpoints.restore(states[0])
        with pytest.raises(ValueError, match="metric is nan at step 1, expected a finite number"):
            checkpoints.save(states[1], metric=float("nan"))
        checkpoints.save(states[1])
        with pytest.raises(ValueError, match="1 exists; expected a later step"):
            checkpoints.save(states[1])
        with pytest.raises(FileNotFoundError, match=r"7 is not a checkpoint, .* steps \[1\]"):
            checkpoints.restore(states[0], step=7)


def test_a_disk_too_small_is_refused_before_writing(states, tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(states[1])
        small = shutil.disk_usage(tmp_path)._replace(free=100)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: small)
            with pytest.raises(OSError, match=r"2 is not saved, .* No space left on device"):
                checkpoints.save(states[2])
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        assert_same_bits(checkpoints.restore(states[0]), states[1])
        checkpoints.save(states[2])  # with space again
        assert checkpoints.latest == 2


def test_an_error_of_the_storage_is_one_line_that_names_the_checkpoint(
    states, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\nSource locations: ...")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(OSError, match=r"1 is not saved, .*: RESOURCE_EXHAUSTED: .* writing$"):
            checkpoints.save(states[1])


FULL_DISK = """
import resource, sys
import jax
from toy import a_state
from jaxpref.training.checkpoints import Checkpoints
from jaxpref.training.optimizers import torch_rmsprop

state = a_state(torch_rmsprop(0.01))
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(state)
    # Each file may grow to 200 bytes and no further: writes fail in the middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    try:
        checkpoints.save(state._replace(step=state.step + 1))
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def test_a_disk_that_fills_while_saving_keeps_the_last_good_state(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / '1'} is not saved, earlier checkpoints are kept" in done.stdout
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 0
        assert_same_bits(checkpoints.restore(a_state(OPTIMIZER)), a_state(OPTIMIZER))
