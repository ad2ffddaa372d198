"""`jaxpref.score` against single pairs, its resume and its errors."""

import functools
import gzip
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pyarrow import parquet

from jaxpref import embeddings, logprobs, score
from jaxpref.data import batches, pairs
from jaxpref.data.files import DataError
from jaxpref.models import decoder
from jaxpref.score import __main__ as score_command
from jaxpref.score import pairs as scoring
from jaxpref.training import parallel

SIZES = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32}
VOCAB, END, SPOILT = 23, 1, 22  # no pair of the data holds the last


@pytest.fixture(scope="module")
def model():
    config = decoder.DecoderConfig(vocab=VOCAB, **SIZES)
    return decoder.functional(
        decoder.Decoder(
            config, rngs=nnx.Rngs(0), param_dtype=jnp.float64, compute_dtype=jnp.float64
        )
    )


@pytest.fixture(scope="module")
def data():
    """Pairs of many lengths; the fourth has two identical responses."""
    random = np.random.default_rng(5)

    def answer(longest):
        return [*random.integers(2, SPOILT, random.integers(longest - 2, longest)), END]

    found = []
    for row in range(5):
        prompt = random.integers(2, SPOILT, (3, 20)[row % 2]).tolist()
        chosen = answer(6)
        rejected = chosen if row == 3 else answer(9)
        tokens = np.array(prompt + chosen, np.int32), np.array(prompt + rejected, np.int32)
        found.append(pairs.TokenPair(tokens, (len(prompt),) * 2, (False, False), (1, 1)))
    return found


@pytest.fixture(scope="module")
def scored(model, data):
    return score.score_pairs(model[0], model[1], data, columns=score.COLUMNS, tokens=64)


def alone(model, pair):
    """Every score of one pair, both responses encoded apart and without padding."""
    policy, params = model

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, has_aux=True)
    def slope(params, ids, start):
        hidden = policy.hidden(params, ids[None, :-1])[0, start - 1 :]
        each = logprobs.token_logprobs(hidden, policy.unembedding(params), ids[start:])
        return each.sum(), hidden

    states, grams = [], []
    table = np.asarray(policy.unembedding(params))
    for ids, start in zip(pair.tokens, pair.starts, strict=True):
        slopes, hidden = slope(params, ids, start)
        states.append(np.asarray(hidden))
        weights = np.exp(hidden @ table.T)
        residuals = np.eye(VOCAB)[ids[start:]] - weights / weights.sum(1, keepdims=True)
        whole = np.concatenate([np.ravel(x) for x in jax.tree.leaves(slopes)])
        grams.append((whole, (residuals.T @ hidden).reshape(-1)))
    (w, l), (first, second) = (x.sum(0) for x in states), grams
    words = [x[s:-1].tolist() for x, s in zip(pair.tokens, pair.starts, strict=True)]
    n, m = (len(x) for x in states)
    return {
        "ches": w @ l - w @ w,
        "ches_length_normalised": w @ l / n / m - w @ w / n**2,
        "last_hidden_similarity": states[0][-1] @ states[1][-1],
        "alpha_weighted_ches": first[1] @ second[1] - first[1] @ first[1],
        "displacement_rate": first[0] @ second[0] - first[0] @ first[0],
        "edit_similarity": embeddings.edit_similarity(*words),
        "length_difference": len(words[1]) - len(words[0]),
        "length_ratio": len(words[1]) / len(words[0]),
        "chosen_tokens": len(words[0]),
        "rejected_tokens": len(words[1]),
        "identical": words[0] == words[1],
    }


def test_scores_are_those_of_single_pairs(model, data, scored):
    assert set(scored) == {*score.COLUMNS, "chosen_tokens", "rejected_tokens", "identical"}
    for row, pair in enumerate(data):
        for name, expected in alone(model, pair).items():
            np.testing.assert_allclose(
                scored[name][row], expected, rtol=1e-9, atol=1e-11, err_msg=f"{name}, row {row}"
            )
    assert scored["identical"].tolist() == [False, False, False, True, False]
    assert scored["ches"][3] == scored["ches_length_normalised"][3] == 0


@pytest.mark.parametrize("tokens", [1, 300])
def test_the_size_of_batches_changes_nothing(model, data, scored, tokens):
    again = score.score_pairs(model[0], model[1], data, tokens=tokens)
    assert set(again) == {*score.DEFAULT, "chosen_tokens", "rejected_tokens", "identical"}
    for name, values in again.items():
        np.testing.assert_allclose(values, scored[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_devices_share_the_pairs(model, data, scored):
    mesh = parallel.mesh()
    assert mesh.devices.size == 2
    again = score.score_pairs(model[0], model[1], data, tokens=64, mesh=mesh)
    np.testing.assert_allclose(again["ches"], scored["ches"], rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_the_vocabulary(data):
    batch = batches.collate(data, [0, 1], pad_id=0)[:3]
    length = int(logprobs.packed_lengths(*batch[:2]).max())

    def room(vocab):
        config = decoder.DecoderConfig(vocab=vocab, **SIZES)
        policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0)))
        arguments = policy, ("alpha_weighted_ches",), None, length, params, batch
        program = scoring._scores.lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert room(2**17) < room(2**14) + 1000  # counters of loops; logits would be megabytes


def test_a_killed_run_goes_on(model, data, scored, tmp_path, monkeypatch):
    """Killed after two batches: the next call computes the others only, to the same bits."""
    whole = score.score_pairs(model[0], model[1], data, tokens=1)
    compute, calls = scoring._batch_scores, []

    def until(limit):
        def batch(*arguments):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(arguments)
            return compute(*arguments)

        return batch

    monkeypatch.setattr(scoring, "_batch_scores", until(2))
    with pytest.raises(KeyboardInterrupt):
        score.score_pairs(model[0], model[1], data, tokens=1, folder=tmp_path)
    (tmp_path / "half.part").write_bytes(b"PK")  # a write that was cut off
    calls.clear()
    monkeypatch.setattr(scoring, "_batch_scores", until(99))
    found = score.score_pairs(model[0], model[1], data, tokens=1, folder=tmp_path)
    kept = len(list(tmp_path.glob("*.npz")))
    assert len(calls) == kept - 2 > 0
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_the_folder_of_another_run_is_refused(model, data, tmp_path):
    policy, params = model
    score.score_pairs(policy, params, data[:1], columns=["ches"], folder=tmp_path)
    for changed, match in (
        ({"pairs": data[1:2]}, "other data"),
        ({"params": jax.tree.map(lambda x: 2 * x, params)}, "other parameters"),
        ({"columns": ["edit_similarity"]}, "other columns"),
        ({"tokens": 7}, "other tokens"),
        ({"made_with": {"end": "none"}}, "other end"),
    ):
        arguments = {"params": params, "pairs": data[:1], "columns": ["ches"], **changed}
        with pytest.raises(DataError, match=match):
            score.score_pairs(policy, folder=tmp_path, **arguments)
    (part,) = tmp_path.glob("*.npz")
    for file, match in ((part, "0.npz: damaged"), (tmp_path / "key.json", "key.json: damaged")):
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(DataError, match=match):
            score.score_pairs(policy, params, data[:1], columns=["ches"], folder=tmp_path)


def test_states_that_are_not_finite_are_named(model, data):
    policy, params = model
    spoilt = jax.tree.map(jnp.copy, params)
    spoilt["embedding"] = jax.tree.map(lambda x: x.at[SPOILT].set(jnp.nan), params["embedding"])
    ids = np.array([2, SPOILT, 3], np.int32), np.array([2, 4, 3], np.int32)
    bad = pairs.TokenPair(ids, (1, 1), (False, False))
    with pytest.raises(DataError, match="row 1: ches is not finite"):
        score.score_pairs(policy, spoilt, [data[0], bad], columns=["ches"])
    with pytest.raises(DataError, match=r"^x.jsonl, line 8: ches is not finite"):
        score.score_pairs(policy, spoilt, [bad], columns=["ches"], places=["x.jsonl, line 8"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["chess"]}, "columns: got 'chess', expected some of ches, "),
        ({"tokens": 0}, "tokens=0"),
        ({"pairs": []}, "0 pairs"),
    ],
)
def test_bad_settings_are_named(model, data, settings, message):
    with pytest.raises(ValueError, match=message):
        score.score_pairs(model[0], model[1], **{"pairs": data, **settings})


# The command.

ROWS = [
    {"prompt": f"Question {n}:", "chosen": chosen, "rejected": rejected}
    for n, (chosen, rejected) in enumerate(
        [(" Yes, do.", " No, never do that."), (" Maybe.", " Of course."), (" No.", " "),
         (" It is late today.", " It is late."), (" Maybe.", " Of course.")]
    )
]  # fmt: skip


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch):
    """Runs the command on five rows, the third of them without a second response."""
    data = tmp_path / "pairs.jsonl.gz"
    with gzip.open(data, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)

    def run(*flags):
        arguments = ["--data", data, "--out", tmp_path / "scores.parquet", "--model", tiny_model]
        monkeypatch.setattr(sys, "argv", ["score", *map(str, [*arguments, *flags])])
        score_command.run()

    return run


def test_the_command_scores_and_filters(command, tmp_path, capsys):
    columns = ["ches_length_normalised", "length_difference"]
    out = tmp_path / "kept.jsonl.gz"
    flags = ["--scores", *columns, "--bad", "skip", "--filter", out, "--by", "length_difference"]
    command(*flags, "--keep", "0.5")
    table = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert table["row"] == [0, 1, 3, 4]
    assert set(columns) <= set(table)
    assert table["length_difference"] == [
        b - a for a, b in zip(table["chosen_tokens"], table["rejected_tokens"], strict=True)
    ]
    lowest = sorted(sorted(range(4), key=lambda i: (table["length_difference"][i], i))[:2])
    with gzip.open(out, "rt") as file:
        assert [json.loads(line) for line in file] == [ROWS[table["row"][i]] for i in lowest]
    said = capsys.readouterr()
    (skipped,) = [line for line in said.err.splitlines() if " skipped: " in line]
    assert skipped.startswith("1 rows skipped: ")
    assert "pairs.jsonl.gz, line 3: rejected is an empty response" in skipped
    assert "4 pairs, 1 rows skipped" in said.out
    about = json.loads(parquet.read_schema(tmp_path / "scores.parquet").metadata[b"jaxpref"])
    assert (about["end"], about["date"], len(about["skipped"])) == ("eos", "2024-07-26", 1)
    (line,) = [line for line in said.out.splitlines() if line.startswith("length_difference")]
    longer = table["length_difference"]
    three = [min(longer), float(np.median(longer)), max(longer)]
    assert [float(x) for x in line.split()[1:]] == [*three, 1.0]
    assert not list(tmp_path.glob("*.parts"))


def test_the_command_names_faults(command, capsys):
    for flags, message in (
        ((), r"pairs.jsonl.gz, line 3: rejected is an empty response"),
        (("--bad", "skip", "--limit", "3"), "tokens too long for"),
        (("--keep", "0"), "keep: got 0.0, expected more than 0 and at most 1"),
        (("--limit", "0"), "limit: got 0, expected at least 2"),
        (("--scores",), "scores: got none, expected one or more"),
        (("--filter", "nowhere/x.gz"), "filter: nowhere/x.gz is in no folder that exists"),
        (("--filter", "x.parquet"), "x.parquet: out is of another format"),
        (("--out", "."), r"out: \. is a folder, expected the name of a file"),
        (("--date", "today"), "date: got 'today', expected a day as YYYY-MM-DD"),
        (("--columns", "good"), "columns: got 'good', expected NAME=COLUMN"),
        (("--columns", "chosen=good"), "line 1: no column 'good' for chosen"),
        (("--bad", "skip", "--end", "<nothing>"), "end is '<nothing>', expected"),
        (("--bad", "skip", "--model", "."), "config.json: no such file"),
    ):
        with pytest.raises(SystemExit, match=message) as ended:
            command(*flags)
        assert "\n" not in str(ended.value)


def test_the_filter_reads_the_score_that_was_measured_to_tell(command, tmp_path, monkeypatch):
    """By default alpha-weighted CHES, which is computed though no flag asks for it."""
    asked = []

    def scores(policy, params, encoded, *, columns, **_):
        asked.append(columns)
        (tmp_path / "scores.parquet.parts").mkdir()
        found = {name: np.zeros(len(encoded)) for name in columns}
        found["alpha_weighted_ches"] = np.array([3.0, 1.0, 2.0, 4.0])
        return found | dict.fromkeys(("chosen_tokens", "rejected_tokens"), np.arange(4))

    monkeypatch.setattr(score_command, "score_pairs", scores)
    out = tmp_path / "kept.jsonl.gz"
    command("--bad", "skip", "--filter", out)
    assert asked == [(*score.DEFAULT, "alpha_weighted_ches")]
    with gzip.open(out, "rt") as file:
        assert [json.loads(line) for line in file] == [ROWS[1], ROWS[3]]


def test_an_interrupt_is_no_traceback(command, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(score_command.files, "read", interrupted)
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "score: interrupted; the same command goes on\n"


def test_the_lowest_scores_are_kept_in_their_order():
    scores = np.array([3.0, 1.0, 2.0, 1.0, 5.0])
    assert score_command.lowest(scores, 0.5).tolist() == [1, 2, 3]
    assert score_command.lowest(scores, 0.2).tolist() == [1]
    assert score_command.lowest(scores, 1.0).tolist() == [0, 1, 2, 3, 4]
