"""The benchmark runs at smoke size and says what it promises to say."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pytest

from benchmarks import device, frameworks, losses, pair_gram, sampling, score_pairs, train_step


@pytest.fixture(autouse=True)
def soon_there(clean, monkeypatch):
    """The contenders' processes need not import the library again."""
    monkeypatch.setattr(multiprocessing, "get_context", {"spawn": clean}.get)


def test_smoke_size_prints_a_row_and_the_ratios(capsys):
    result = train_step.main(train_step.SMOKE)
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["2x8", "jaxpref"]
    assert json.loads(last) == result
    assert result["2x8"].keys() == {"step", "first_step", "memory", "of_gemm_peak", "gemm_peak"}
    assert result["2x8"]["memory"] > 0 < result["2x8"]["of_gemm_peak"]


def test_ratios_are_ours_over_theirs(capsys):
    config = dataclasses.replace(train_step.SMOKE, frameworks=("jaxpref", "torch"))
    logp = np.zeros((2, 2, 4))
    ours = frameworks.Measured(logp, 1.0, [0.5], [1.0, 2.0, 9.0], [1.0], 3)
    theirs = frameworks.Measured(logp, 1.0, [0.4], [2.0, 4.0, 4.0], [2.0], 4)
    size = frameworks.Size(2, 8, 4)
    result = train_step.report(config, size, {"jaxpref": ours, "torch": theirs})
    # Of the neighbouring steps' ratios 0.5, 0.5 and 2.25 the median.
    assert result["vs_torch_time"] == 0.5
    assert result["vs_torch_memory"] == 0.75
    assert result["vs_torch_loss"] == pytest.approx(0.1)
    # The peak is that of the faster product, 64 rows in one second.
    assert result["gemm_peak"] == 2 * 64**3
    assert result["of_gemm_peak"] == train_step.work("tiny", size, "jaxpref") / 2 / 2**19


def test_work_of_a_layer_counted_by_hand():
    # 2 tokens a sequence, 1 of them prompt: ours encodes the prompt alone, 1 token a pair, and
    # makes 2 rows of logits; the plain layout encodes 4 tokens and makes 4 rows.
    size = frameworks.Size(pairs=1, time=2, prompt=1)
    weights = 32 * (3 * 48 + 2 * 8 * (4 + 2))
    ours, plain = (train_step.work("tiny", size, name) for name in ("jaxpref", "torch"))
    head = 64 * 32
    assert plain == 6 * (2 * (weights * 4 + 2 * 32 * 4) + 4 * head)
    assert ours == 6 * (2 * (weights * 1 + 2 * 32 * 0.5) + 2 * head)


def test_log_probabilities_that_differ_void_the_comparison():
    size = frameworks.Size(2, 8, 4)
    near, rounded = np.zeros(1000), np.full(1000, 1e-5)
    rounded[7] = 2e-4  # one of many is far out
    train_step.agree(size, {"jaxpref": near, "torch": rounded})
    for bad in (near + 3e-5, np.where(np.arange(1000) == 7, 4e-4, 0), near + np.nan):
        with pytest.raises(SystemExit, match="void: jaxpref and torch differ"):
            train_step.agree(size, {"jaxpref": near, "torch": bad})


def test_batch_shares_the_prompt_and_nothing_after_it():
    ids = frameworks.tokens(frameworks.Size(pairs=3, time=8, prompt=5), vocab=64)
    assert ids.shape == (3, 2, 8)
    assert 0 <= ids.min() <= ids.max() < 64
    assert (ids[:, 0, :5] == ids[:, 1, :5]).all()
    assert (ids[:, 0, 5] != ids[:, 1, 5]).all()


def test_a_framework_that_is_absent_is_named(capsys):
    assert frameworks.installed(("jaxpref", "no_such_framework")) == ("jaxpref",)
    assert "no_such_framework: not installed" in capsys.readouterr().out


def test_pair_grams_at_smoke_size(capsys):
    result = pair_gram.main(pair_gram.SMOKE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["fast", "reference"]
    assert json.loads(lines[-1]) == result
    assert result["2x8"].keys() == {"fast", "vs_reference_time", "vs_reference_memory"}
    assert result["token_gram_vs_backward_per_token"] > 0


def test_grams_that_differ_void_the_comparison():
    size, grams = frameworks.Size(1, 8, 4), np.array([100.0, 1.0])
    pair_gram.agree(size, {"fast": grams, "torch": grams + 0.05})
    with pytest.raises(SystemExit, match="void: fast and torch differ by"):
        pair_gram.agree(size, {"fast": grams, "torch": grams + 0.2})


def test_sampling_at_smoke_size(capsys):
    result = sampling.main(sampling.SMOKE)
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["2x3", "jaxpref"]
    assert json.loads(last) == result
    assert result["2x3"].keys() == {"jaxpref_tokens_per_second"}


def test_sampling_ratios_are_ours_over_theirs():
    tokens, size = np.zeros((2, 4), int), sampling.Size(2, 3, 4, 0.0, 1.0)
    ours = frameworks.Measured(tokens, 1.0, [0], [1.0, 2.0, 9.0], [], 3)
    theirs = frameworks.Measured(tokens, 1.0, [0], [2.0, 4.0, 4.0], [], 4)
    result = sampling.report(size, {"jaxpref": ours, "transformers": theirs})
    assert result["vs_transformers_time"] == 0.5
    assert result["vs_transformers_memory"] == 0.75
    assert result["jaxpref_tokens_per_second"] == 2 * 4 / 2.0


def test_continuations_that_differ_void_the_comparison():
    size, tokens = sampling.Size(2, 3, 5, 0.0, 1.0), np.zeros((2, 5), int)
    late, early = tokens.copy(), tokens.copy()
    late[0, 4:], early[0, 2:] = 1, 1  # one token of ten, and three
    sampling.agree(size, {"jaxpref": tokens, "transformers": late})
    with pytest.raises(SystemExit, match="void: of jaxpref and transformers only 70% of tokens"):
        sampling.agree(size, {"jaxpref": tokens, "transformers": early})


def test_scores_at_smoke_size(capsys):
    result = score_pairs.main(score_pairs.SMOKE)
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["3", "jaxpref"]
    assert json.loads(last) == result
    assert result["3"].keys() == {"pairs_a_second", "of_gemm_peak"}
    assert result["of_gemm_peak"] > 0


def test_score_ratios_are_ours_over_theirs(capsys):
    ours = frameworks.Measured(np.zeros((3, 3)), 1.0, [0], [1.0, 2.0, 9.0], [1.0], 3)
    theirs = frameworks.Measured(np.zeros((3, 3)), 1.0, [0], [2.0, 4.0, 4.0], [2.0], 4)
    result = score_pairs.report(score_pairs.SMOKE, 3, {"jaxpref": ours, "torch": theirs})
    assert result["vs_obvious_torch_time"] == 0.5
    assert result["vs_obvious_torch_memory"] == 0.75
    assert result["pairs_a_second"] == 1.5
    needed = score_pairs.work(score_pairs.SMOKE, 3, "jaxpref")
    assert result["of_gemm_peak"] == pytest.approx(needed / 2 / (2 * 64**3))


def test_work_of_scores_counted_by_hand(monkeypatch):
    """A prompt of one token, responses of one and two, each with its end: 1 + 1 and 1 + 2 encoded
    apart, the prompt once together."""
    ids = np.array([4, 5, 0]), np.array([4, 6, 7, 0])
    pair = score_pairs.TokenPair(ids, (1, 1), (False, False))
    monkeypatch.setattr(score_pairs, "draw", lambda config, number: [pair])
    weights, head = 32 * (3 * 48 + 2 * 8 * (4 + 2)), 64 * 32
    ours, plain = (score_pairs.work(score_pairs.SMOKE, 1, way) for way in score_pairs.WAYS)
    assert ours == 2 * 2 * (weights * 4 + 2 * 32 * 6)
    assert plain == 2 * (2 * (weights * 5 + 2 * 32 * 6.5) + head * 5)


def test_scores_that_differ_void_the_comparison():
    near = np.ones((3, 2))
    score_pairs.agree({"jaxpref": near, "torch": near + 5e-4})
    with pytest.raises(SystemExit, match="void: jaxpref and torch differ by 2"):
        score_pairs.agree({"jaxpref": near * 1.002, "torch": near})


def test_losses_at_smoke_size(capsys):
    result = losses.main(losses.SMOKE)
    *rows, imported, last = capsys.readouterr().out.splitlines()[1:]
    assert sorted(row.split()[0] for row in rows) == sorted(losses.SMOKE.losses)
    assert imported.startswith("import: jax ")
    assert json.loads(last) == result
    ratios = {f"{x}_vs_dpo_time" for x in losses.SMOKE.losses}
    seconds = {"import_jax_s", "import_more_s"}
    assert result.keys() == {*ratios, *seconds, "pairs", "worst", "unexplained"}
    assert result["import_jax_s"] > 0


def test_loss_ratios_are_of_neighbouring_turns(capsys):
    measured = {
        "a": losses.Measured(0.1, turns=[1.0, 2.0, 9.0], dpo=[2.0, 4.0, 4.0]),
        "b": losses.Measured(0.1, turns=[4.0], dpo=[1.0]),
    }
    measured["b"].more = {"bytes": 1.5, "exp and log": 1.0}
    result = losses.report(losses.SMOKE, measured, {"import_jax_s": 1.0, "import_more_s": 0.1})
    ratios = {"b_vs_dpo_time": 4.0, "a_vs_dpo_time": 0.5, "pairs": 8, "worst": 4.0}
    assert result == ratios | {"unexplained": 1, "import_jax_s": 1.0, "import_more_s": 0.1}


@pytest.mark.parametrize(
    ("more", "orders", "why"),
    [
        ({"bytes": 8.2, "exp and log": 4.0}, "", "8.2 times the bytes"),
        ({"bytes": 1.0, "exp and log": 3.0}, "", "3.0 times the exp and log"),
        ({"bytes": 1.0}, "sorts", "sorts"),
        ({"bytes": 2.9}, "", losses.UNEXPLAINED),
    ],
)
def test_a_slow_loss_has_a_reason(more, orders, why):
    assert losses.Measured(0.1, more, orders, turns=[6.0], dpo=[1.0]).why == why
    assert losses.Measured(0.1, more, orders, turns=[3.0], dpo=[1.0]).why == ""


def test_a_loss_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="losses: got no_such, expected names of the catalogue"):
        losses.main(dataclasses.replace(losses.SMOKE, losses=("dpo", "no_such")))


def test_a_device_is_measured_at_smoke_size(monkeypatch, capsys, tmp_path):
    parts = ("environment", "ceilings", "attentions")
    monkeypatch.setattr("sys.argv", ["device", "--tiny", "--only", *parts])
    monkeypatch.setenv("OUT", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        device.main()
    assert not end.value.code
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "device.json").read_text())
    assert tuple(last) == parts
    assert last["ceilings"][0]["relative_error"] < 1e-5 < last["ceilings"][3]["relative_error"]
    assert last["attentions"][0]["within_twice"]
    found = device.step("8B", 4, 1024, tiny=True, optimizer="sgd", remat=True)
    assert found["ms"] > 0 < found["memory_GB"]
