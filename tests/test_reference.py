import errno
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import logprobs
from jaxpref.data.batches import Batch
from jaxpref.logprobs import reference
from jaxpref.models import tabular

ROWS, TIME, VOCAB = 5, 4, 3


@pytest.fixture(scope="module")
def model():
    return tabular.language_model(
        jax.random.key(0), vocab=VOCAB, length=TIME - 1, dtype=jnp.float64
    )


def batch(rows, time=TIME):
    """Some rows of one data set, padded on the right to `time`."""
    draw = np.random.default_rng(3)
    tokens = draw.integers(0, VOCAB, (ROWS, 2, TIME))
    tokens[..., 0] = 0  # the prompt
    length = draw.integers(2, TIME + 1, (ROWS, 2, 1))
    tokens = np.pad(tokens, ((0, 0), (0, 0), (0, time - TIME)))[rows]
    column, length = np.arange(time), length[rows]
    is_response = (column >= 1) & (column < length)
    return Batch(tokens.astype(np.int32), column < length, is_response, None, np.array(rows))


BATCHES = [batch([3, 0]), batch([2, 4]), batch([1])]


@pytest.fixture(scope="module")
def score(model):
    policy, _ = model

    @jax.jit
    def score(params, batch):
        return logprobs.pair_scores(
            policy, params, batch.tokens, batch.is_token, batch.is_response, max_response=TIME
        )

    return score


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_come_back_in_the_order_of_the_data_set(model, score):
    _, params = model
    found = logprobs.reference_logprobs(score, params, BATCHES)
    expected = score(params, batch([0, 1, 2, 3, 4])).logp
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    longer = [batch([3, 0], TIME), batch([1, 2, 4], TIME)]
    np.testing.assert_allclose(
        logprobs.reference_logprobs(score, params, longer), expected, rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_first_log_ratios_are_exactly_zero(model, score, dtype):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), model[1])
    found = logprobs.reference_logprobs(score, params, BATCHES)
    assert found.dtype == dtype
    for part in BATCHES:
        ratio = score(params, part._replace(reference=found[part.index])).logp - found[part.index]
        assert not ratio.any()


def test_a_second_call_reads_the_file(model, score, tmp_path, monkeypatch):
    _, params = model
    first = logprobs.reference_logprobs(score, params, BATCHES, cache=tmp_path / "new")
    assert len(files(tmp_path / "new")) == 1
    monkeypatch.setattr(reference, "_compute", None)  # calling it would raise
    again = logprobs.reference_logprobs(score, params, BATCHES, cache=tmp_path / "new")
    np.testing.assert_array_equal(first, again)
    assert first.dtype == again.dtype


def test_whatever_decides_the_bits_names_another_file(model, score, tmp_path):
    policy, params = model

    def closed_over(params, batch, *, shift):
        scores = score(params, batch)
        return scores._replace(logp=scores.logp + jnp.asarray(shift)[None])

    empty = np.zeros(BATCHES[0].tokens.shape, bool)
    shifts = [functools.partial(closed_over, shift=np.array([1.0, s])) for s in (1.0, 2.0)]
    calls = {
        "first": (score, params, BATCHES),
        "parameters": (score, jax.tree.map(lambda leaf: leaf + 1e-9, params), BATCHES),
        "dtype": (score, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), BATCHES),
        "data": (score, params, [BATCHES[0]._replace(index=np.array([0, 3])), *BATCHES[1:]]),
        "mask": (score, params, [BATCHES[0]._replace(is_response=empty), *BATCHES[1:]]),
        "constants": (shifts[0], params, BATCHES),
        "other constants": (shifts[1], params, BATCHES),
        "options": (
            lambda params, batch: logprobs.pair_scores(policy, params, *batch[:3], max_response=3),
            params,
            BATCHES,
        ),
    }
    for count, call in enumerate(calls.values(), start=1):
        logprobs.reference_logprobs(*call, cache=tmp_path)
        assert len(files(tmp_path)) == count
    logprobs.reference_logprobs(*calls["first"], cache=tmp_path)
    assert len(files(tmp_path)) == len(calls)


def test_a_fresh_trace_finds_the_same_file(model, tmp_path):
    policy, params = model
    for _ in range(2):

        def score(params, batch):
            return logprobs.pair_scores(policy, params, *batch[:3])

        logprobs.reference_logprobs(score, params, [batch([0])], cache=tmp_path)
    assert len(files(tmp_path)) == 1


def flip_a_number(data):
    """One bit of the stored log-probabilities."""
    place = data.index(np.load(io.BytesIO(data))["logp"].tobytes())
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda _: b"", flip_a_number]
)
def test_a_damaged_file_is_refused_and_kept(model, score, tmp_path, damage):
    _, params = model
    logprobs.reference_logprobs(score, params, BATCHES, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(logprobs.ReferenceCacheError, match=f"{path.name}: damaged .*; delete it"):
        logprobs.reference_logprobs(score, params, BATCHES, cache=tmp_path)
    assert path.read_bytes() == damaged


def test_a_file_of_other_parameters_under_this_name_is_refused(model, score, tmp_path):
    _, params = model
    other = jax.tree.map(lambda leaf: leaf + 1.0, params)
    logprobs.reference_logprobs(score, params, BATCHES, cache=tmp_path / "mine")
    logprobs.reference_logprobs(score, other, BATCHES, cache=tmp_path / "other")
    (mine,), (strange,) = (list((tmp_path / name).iterdir()) for name in ("mine", "other"))
    mine.write_bytes(strange.read_bytes())
    with pytest.raises(logprobs.ReferenceCacheError, match="holds other parameters than its name"):
        logprobs.reference_logprobs(score, params, BATCHES, cache=tmp_path / "mine")


def test_a_full_disk_leaves_nothing_behind(model, score, tmp_path, monkeypatch):
    def savez(file, **arrays):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="No space left"):
        logprobs.reference_logprobs(score, model[1], BATCHES, cache=tmp_path)
    assert files(tmp_path) == []


def test_a_response_without_a_finite_number_is_named_and_nothing_kept(model, score, tmp_path):
    _, params = model
    bad = BATCHES[1].is_response.copy()
    bad[1, 1, 0] = True  # row 4 of the data set scores its first token
    batches = [BATCHES[0], BATCHES[1]._replace(is_response=bad), BATCHES[2]]
    with pytest.raises(ValueError, match="row 4, rejected: log-probability is nan"):
        logprobs.reference_logprobs(score, params, batches, cache=tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        pytest.param(BATCHES[:2], "row 1 is missing", id="missing"),
        pytest.param([*BATCHES, BATCHES[2]], "row 1 comes 2 times", id="twice"),
    ],
)
def test_a_data_set_that_is_not_whole_is_refused(model, score, batches, message):
    with pytest.raises(ValueError, match=message):
        logprobs.reference_logprobs(score, model[1], batches)


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.zeros(4, np.float32), "b": 1},
        {"a": np.zeros((2, 2)), "b": 1},
        {"a": np.zeros(4), "c": 1},
        {"a": np.zeros(4), "b": 2},
        {"a": np.full(4, -0.0), "b": 1},
        {"a": np.zeros(4), "b": jnp.bfloat16(1)},
    ],
)
def test_a_fingerprint_sees_path_dtype_shape_and_bytes(other):
    tree = {"a": np.zeros(4), "b": 1}
    assert logprobs.fingerprint(tree) == logprobs.fingerprint({"b": 1, "a": jnp.zeros(4)})
    assert logprobs.fingerprint(tree) != logprobs.fingerprint(other)
