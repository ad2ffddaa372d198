"""The No-vs-Never experiment on a tiny random model: whole, stopped, misused."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import experiments.no_vs_never as lab
from experiments.no_vs_never import __main__ as command
from experiments.no_vs_never import control, measure
from experiments.protocol import running
from jaxpref import losses, runs
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import decoder, pretrained
from jaxpref.training.optimizers import torch_rmsprop

ROOT = Path(__file__).parents[1]
# At beta = 1 and tau = 1/2 a log-ratio of one rounding error of a float32 shows in the loss.
FLAGS = (
    *("--pairs", "No>Never", "--losses", "dpo", "--sft-steps", "1", "--sft-batch", "2"),
    *("--learning-rates", "1e-3", "1e-4", "--prompts", "1", "--updates", "5"),
    *("--beta", "1", "--tau", "0.5"),
)
CONFIG = dataclasses.replace(
    lab.SMOKE,
    learning_rates=(1e-3, 1e-4),
    updates=5,
    beta=1.0,
    tau=0.5,
)
SHAPES = {  # without the leading axis of cells; steps: before each update and after the last
    "row": (),
    "rate": (),
    "loss": (6,),
    "rate_terms": (3,),
    "geometry": (2,),
    "logp": (6, 2),
    "entropy": (6,),
    "top": (6,),
    "watched": None,  # as many as the tokenizer has words of the table
    "mass": (6, 2),
    "share": (2, 1),
    "gained_token": (1, 3),
    "gained": (1, 3),
    "spearman": (3, 2, 2),
    "shown_token": (500,),
    "shown_predicted": (3, 500),
    "shown_change": (2, 500),
}


def call(*flags, model, cwd):
    """The command in this process, as if typed in `cwd`; returns what it prints."""
    arguments = ["no_vs_never", "--model", str(model), *map(str, flags)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", arguments)
        command.main()
    plt.close("all")
    return printed.getvalue()


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run: its settings, folder and record, and what the command printed."""
    cwd = tmp_path_factory.mktemp("made")
    printed = call(*FLAGS, "--name", "small", model=tiny_model, cwd=cwd)
    path = cwd / "runs" / "no_vs_never" / "small"
    return dataclasses.replace(CONFIG, model=str(tiny_model)), path, runs.load(path), printed


LISTS = {"train": "train", "learning_rate": "learning_rates"}


def chosen(config, arrays, **settings):
    """The arrays of those cells that have these settings, and their own settings."""
    at = [
        i
        for i, cell in enumerate(lab.cells(config))
        if all(getattr(cell, name) in allowed for name, allowed in settings.items())
    ]
    return dataclasses.replace(config, **{LISTS[name]: v for name, v in settings.items()}), {
        name: array[at] for name, array in arrays.items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name, strict=True)


def test_the_arrays_have_an_entry_a_cell_and_are_finite(made):
    config, _, record, _ = made
    assert len(lab.cells(config)) == 2 * 3
    assert record.arrays.keys() == SHAPES.keys()
    for name, array in record.arrays.items():
        assert len(array) == 6, name
        assert SHAPES[name] in (None, array.shape[1:]), name
        # A control moves all words but two alike: there is no order to correlate with.
        real = slice(None, None, 3) if name == "spearman" else slice(None)
        assert np.isfinite(array[real]).all(), name
    assert {cell.train for cell in lab.cells(config)[::3]} == {"all"}


def test_the_smoke_settings_run(tiny_model):
    """One prompt and no controls, as the first act of the demo; the last update has its gains."""
    assert (lab.SMOKE.prompts, lab.SMOKE.updates, lab.SMOKE.model) == (1, 2, None)
    config = dataclasses.replace(lab.SMOKE, model=str(tiny_model), train=("all",))
    arrays = lab.run(config)
    assert arrays.keys() == SHAPES.keys()
    assert arrays["logp"].shape == (1, 3, 2)
    assert arrays["gained"].shape == (1, 1, 3)
    assert arrays["spearman"].shape == (1, 3, 1, 2)
    said = lab.report(config, lab.summarise(config, arrays))
    assert "trained: all, 1 prompts" in said
    assert "after   2 updates, of the gained probability" in said
    assert "Control" not in said
    plt.close(lab.draw(config, arrays))


def test_the_first_log_ratios_are_exactly_zero(made):
    config, _, record, _ = made
    assert (record.arrays["loss"][:, 0] == np.float32(np.log(2))).all()
    ipo = dataclasses.replace(config, losses=("ipo",), train=("all", "tabular"))
    found = lab.run(ipo)
    assert found["loss"].shape == (4, 6)
    assert (found["loss"][:, 0] == (1 / (2 * ipo.tau)) ** 2).all()
    assert found["rate"][::2] == pytest.approx([1e-4, 1e-5])  # a tenth of DPO's
    # RMSprop's first step is one of signs: its effect on a table goes with the rate alone.
    _, theirs = chosen(config, record.arrays, train=("tabular",))
    ours = {name: array[1::2] for name, array in found.items()}
    np.testing.assert_array_equal(ours["shown_token"], theirs["shown_token"])
    effects = [x["shown_predicted"][:, 2] / x["rate"][:, None] for x in (ours, theirs)]
    np.testing.assert_allclose(*effects, rtol=1e-4, atol=1e-9)


def test_training_lowers_the_loss(made):
    loss = made[2].arrays["loss"]
    assert (loss[:, -1] < loss[:, 0]).all()


@pytest.mark.parametrize("train", ["unembedding", "tabular"])
def test_controls_gain_the_models_margin_and_never_lower_the_chosen_answer(made, train):
    config, _, record, _ = made
    _, arrays = chosen(config, record.arrays, train=(train,))
    assert len(arrays["logp"]) == 2
    assert (np.diff(arrays["logp"][:, :, 0], axis=1) > 0).all()
    assert (np.diff(arrays["logp"][:, :, 1], axis=1) < 0).all()
    _, whole = chosen(config, record.arrays, train=("all",))
    theirs, ours = (np.diff(x["logp"][:, -1] - x["logp"][:, 0])[:, 0] for x in (whole, arrays))
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    assert not np.isclose(*theirs, rtol=0.1)  # each rate of the model has its own margin
    assert not np.isclose(arrays["rate"], whole["rate"], rtol=0.1).any()
    # What the theorems say: no other token gains on another.
    assert np.ptp(arrays["shown_change"][:, -1], axis=1).max() < 1e-3


def test_both_controls_at_one_margin_are_one_run(made):
    """RMSprop moves a row along the signs of what it reads: only the rate is another one."""
    config, _, record, _ = made
    rows, table = (
        chosen(config, record.arrays, train=(train,))[1] for train in ("unembedding", "tabular")
    )
    np.testing.assert_allclose(rows["logp"], table["logp"], atol=1e-3)
    assert (table["rate"] > 5 * rows["rate"]).all()


LOSSES = {
    "dpo": lambda logp, reference: losses.dpo(logp, reference, beta=0.1),
    "ipo": lambda logp, reference: losses.ipo(logp, reference, tau=0.05),  # asks for 10 nats
}


def gained(loss, updates, rate, hidden):
    """Margin of a control, one update after the other, with all of its rows: slow and plain."""
    import jax
    import jax.numpy as jnp

    rows = jnp.asarray(np.random.default_rng(1).normal(size=(7, len(hidden))), np.float32)
    start = None
    optimizer = torch_rmsprop(rate, decay=0.99)
    state = optimizer.init(rows)

    def answers(rows):
        return jax.nn.log_softmax(rows @ hidden)[jnp.array([2, 5])]

    start = answers(rows)
    slope = jax.grad(lambda rows: loss(answers(rows), start))
    for _ in range(updates):
        change, state = optimizer.update(slope(rows), state)
        rows = rows + change
    end = answers(rows) - start
    return float(end[0] - end[1])


@pytest.mark.parametrize(
    ("loss", "wanted"), [("dpo", 0.3), ("dpo", 40.0), ("ipo", 4.0), ("ipo", 8.0)]
)
def test_the_rate_of_a_control_gives_its_margin(loss, wanted):
    hidden = np.random.default_rng(0).normal(size=3).astype(np.float32)
    rate = control.matched_rate(LOSSES[loss], 9, 0.99, hidden, wanted)
    assert gained(LOSSES[loss], 9, rate, hidden) == pytest.approx(wanted, rel=0.02)
    lower = gained(LOSSES[loss], 9, rate / 1.1, hidden)
    assert lower < 0.98 * wanted  # the lowest such rate, and another one would not do


def test_a_margin_that_no_rate_reaches_gets_the_nearest():
    hidden = np.ones(1, np.float32)
    for wanted in (0.0, -1.0, np.nan):
        assert control.matched_rate(LOSSES["dpo"], 3, 0.99, hidden, wanted) == 0
    # This IPO asks for 10 nats: no rate ends at 10,000.
    rate = control.matched_rate(LOSSES["ipo"], 60, 0.99, hidden, 1e4)
    assert np.isfinite(rate)
    assert gained(LOSSES["ipo"], 60, rate, hidden) < 0.98e4


def test_a_run_that_diverges_is_said_to(made):
    config = dataclasses.replace(made[0], learning_rates=(1e30,), train=("all", "tabular"))
    arrays = lab.run(config)
    rows = lab.summarise(config, arrays)
    assert [row["diverged"] for row in rows] == [1, 0]
    said = lab.report(config, rows)
    assert "diverged in 1" in said
    assert "In 1 no rate reached the margin: they prove nothing." in said
    plt.close(lab.draw(config, arrays))


def test_the_distribution_agrees_with_a_plain_forward_pass(made):
    """Before the first update: the model itself, read at the end of the prompt, unpadded."""
    from jaxpref.data import statements
    from jaxpref.models import pretrained

    config, path, record, _ = made
    policy, _, _, tokenizer, *_ = pretrained.load(config.model)
    params = measure.supervised(config, 1, path)
    row = int(record.arrays["row"][0])
    tokens = np.array([tokenizer.encode(statements.load()[row].question + "\n")])
    logits = np.asarray(policy.hidden(params, tokens)[0, -1], float)
    logits = np.asarray(policy.unembedding(params), float) @ logits
    logp = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    words = [tokenizer.single_token(word) for word in ("No", "Never")]
    # The record is float32, this softmax float64: rounding of numbers near 10.
    np.testing.assert_allclose(record.arrays["logp"][0, 0], logp[words], atol=1e-5)
    entropy = -(np.exp(logp) * logp).sum()
    np.testing.assert_allclose(record.arrays["entropy"][0, 0], entropy, rtol=1e-5)


def test_the_first_update_does_what_was_predicted(made):
    config, path, *_ = made
    # The rate is no part of what is compiled: a cell with another one costs no compilation.
    record = measure.train_cell(config, lab.cells(config)[0]._replace(learning_rate=1e-5), path)
    predicted, happened = record["shown_predicted"][2], record["shown_change"][0]
    # A first-order law: what is left over is of second order in a small step.
    assert np.abs(happened - predicted).max() < 0.05 * np.abs(predicted).max()


def test_the_command_writes_a_whole_run_and_says_so(made):
    config, path, record, printed = made
    names = {each.name for each in path.iterdir() if each.is_file()}
    kept = {"config.json", "provenance.json", "summary.json", "metrics.jsonl", "arrays.npz"}
    assert names == kept | {"figure.png", "figure.svg"}
    assert record.config == json.loads(json.dumps(dataclasses.asdict(config)))
    assert len(record.provenance["model"]) == len(record.provenance["data"]) == 64
    rows = lab.summarise(config, record.arrays)
    np.testing.assert_equal(record.summary["rows"], json.loads(json.dumps(rows)))
    assert lab.report(config, rows) in printed
    assert printed.endswith(f"figure: {Path('runs/no_vs_never/small/figure.png')}\n")
    assert (path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_metrics_are_the_arrays_line_by_line(made):
    config, _, record, _ = made
    assert [line["step"] for line in record.metrics] == list(range(6 * 6))
    columns = runs.columns(record.metrics)
    np.testing.assert_array_equal(columns["loss"].reshape(6, 6), record.arrays["loss"])
    np.testing.assert_array_equal(columns["logp_chosen"], record.arrays["logp"][..., 0].ravel())
    np.testing.assert_array_equal(columns["update"], np.tile(np.arange(6), 6))
    assert record.metrics[-1]["train"] == lab.cells(config)[-1].train


def test_finished_cells_are_read_back_and_a_missing_one_is_made_again(made):
    config, path, record, _ = made
    cell = lab.cells(config)[4]
    file = path / "parts" / f"{cell.part}.npz"
    before = {each: each.stat().st_mtime_ns for each in (path / "parts").iterdir()}
    content = file.read_bytes()
    file.unlink()
    same(lab.run(config, path), record.arrays)
    changed = [each for each, was in before.items() if each.stat().st_mtime_ns != was]
    assert changed == [file]
    assert file.read_bytes() == content


def test_processes_that_share_the_cells_give_the_same_numbers(made, clean, tmp_path, monkeypatch):
    config, path, record, _ = made
    monkeypatch.setattr(multiprocessing, "get_context", {"spawn": clean}.get)
    config, expected = chosen(config, record.arrays, train=("all", "tabular"))
    (tmp_path / "parts").mkdir()
    for part in ("sft-1", *(cell.part for cell in lab.cells(config) if cell.train == "all")):
        shutil.copy(path / "parts" / f"{part}.npz", tmp_path / "parts")
    found = lab.run(config, tmp_path, workers=2)
    assert found.keys() == expected.keys()
    np.testing.assert_array_equal(found["row"], expected["row"])
    # Not the same bits: a process with fewer cores splits its sums at other places.
    for name in ("logp", "loss", "entropy", "mass", "rate_terms", "geometry"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_figures_of_one_setting_and_of_a_grid(made):
    config, _, record, _ = made
    grid = lab.draw(config, record.arrays)
    assert len(grid.axes) == 2 + 1  # a column a learning rate, and the ends of all runs
    one = lab.draw(*chosen(config, record.arrays, learning_rate=(1e-3,)))
    words, masses, theory, ends = one.axes
    start, *_, end = chosen(config, record.arrays, train=("all",))[1]["logp"][0, :, 0]
    np.testing.assert_allclose(ends.collections[0].get_offsets(), [[end - start, 0]])
    assert "below in 0 of 1 runs" in ends.get_title()
    assert "No>Never" in words.get_title()
    assert len(masses.collections) == 4
    assert len(theory.collections[0].get_offsets()) == 500
    for figure in (grid, one):
        figure.canvas.draw()
        plt.close(figure)


# --- the numbers of the table, by hand


@pytest.fixture
def by_hand(tiny_model):
    config = lab.Config(
        model=str(tiny_model),
        prompts=2,
        updates=5,
        train=("all", "tabular"),
        learning_rates=(1e-6,),
    )
    falls, rises = [0.2, 0.5, 0.6, 0.3, 0.25, 0.1], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    ever = [0.2, 0.1, 0.3, 0.3, 0.3, 0.3]
    p = np.array([falls, rises, ever, rises])  # cells: all and tabular of prompt 1, of prompt 2
    down, up = [6.0, 5, 4, 3, 2, 1], [6.0, 5, 7, 3, 4, 4]
    n = len(p)
    arrays = {
        "logp": np.log(np.stack([p, 1 - p], axis=2)),
        "loss": np.array([up, down, down, down]),
        "share": np.array([[[0.1], [0.5]], [[0], [0]], [[0.3], [0.1]], [[0], [0]]]),
        "gained_token": np.tile([[[5, 6, 7]]], (n, 1, 1)),
        "gained": np.tile([[[0.3, 0.02, 0.009]]], (n, 1, 1)),
        "rate_terms": np.tile([3.0, -2.0, 1.0], (n, 1)),
        "geometry": np.tile([0.5, 2.0], (n, 1)),
        "rate": np.array([1e-6, 2e-5, 1e-6, 4e-5]),
        "shown_change": np.tile([[[0.0, 0.0], [0.3, 0.5]]], (n, 1, 1)),
        "spearman": np.full((n, 3, 2, 2), 0.25),
    }
    return config, arrays


def test_the_summary_counts_by_hand(by_hand):
    config, arrays = by_hand
    real, control_ = lab.summarise(config, arrays)
    assert (real["train"], control_["train"], real["prompts"]) == ("all", "tabular", 2)
    assert (real["ended_below_start"], real["ever_below_start"]) == (1, 2)
    assert (control_["ended_below_start"], control_["ever_below_start"]) == (0, 0)
    # Drops of 0.5 and 0.1: the mean, and the standard deviation with one degree of freedom.
    assert real["drop"] == pytest.approx([0.3, 0.4 / np.sqrt(2)])
    assert real["peak"] == pytest.approx([0.4, 0.4 / np.sqrt(2)])  # 0.6 and 0.2
    assert real["trough"] == pytest.approx([0.1, 0.0])
    assert real["start"] == pytest.approx([0.2, 0.0])
    assert real["end"] == pytest.approx([0.2, 0.2 / np.sqrt(2)])
    assert real["change_nats"] == pytest.approx(np.log([0.5, 1.5]))
    assert real["others"] == pytest.approx([0.4, 0.2])
    # The margin is ln p - ln (1 - p): the control of prompt 1 misses the model's, that of 2 too.
    fall, rise, ever = (np.log(p / (1 - p)) - np.log(0.25) for p in (0.1, 0.7, 0.3))
    assert real["margin"][0] == pytest.approx(np.mean([fall, ever]))
    assert control_["margin"][0] == pytest.approx(rise)
    assert (real["matched"], control_["matched"]) == (1, 0)
    assert control_["rates"] == [2e-5, 4e-5]
    assert control_["drop"] == [0.0, 0.0]
    assert (real["loss_rises"], real["runs_without_rise"]) == (2, 1)
    assert (control_["loss_rises"], control_["runs_without_rise"]) == (0, 2)
    assert real["share_same"] == pytest.approx([0.2])
    assert real["share_opposite"] == pytest.approx([0.3])
    gains = real["gains"][0]  # 0.009 is not shown
    assert [(gain, runs_) for _, gain, runs_ in gains] == [(pytest.approx(0.3), 2), (0.02, 2)]


@pytest.mark.usefixtures("any_size")
def test_the_table_and_the_verdict_say_what_was_counted(by_hand):
    config, arrays = by_hand
    rows = lab.summarise(config, arrays)
    said = lab.report(config, rows)
    assert "No>Never, dpo, lr 1e-06, 16 supervised updates, trained: all, 2 prompts" in said
    assert "displaced) in 1 of 2 runs, is below at some step in 2; the loss rose in 1\n" in said
    assert "after   5 updates, of the gained probability  30% to the opposite" in said
    assert said.count("Theorem 4") == 1  # no theory for a control
    assert "at learning rates 2e-05 to 4e-05, the whole model's within 2% in 0 of 2 runs" in said
    assert "ended below its start in 1 of 2 runs of 5 updates; the lowest end is -0.69 nats" in said
    assert "at most 30% of what was gained" in said
    assert said.count("The headline holds.") == 1
    assert "a free table of logits, at rates 2e-05 to 4e-05 with the same margin, ended" in said
    assert "in 0 of 2 runs; the opposite meaning gets at most 0% of what was gained. In 2" in said


@pytest.mark.usefixtures("any_size")
def test_a_claim_that_fails_is_said_to_fail(by_hand):
    config, arrays = by_hand
    arrays["logp"] = arrays["logp"][[1, 1, 1, 1]]
    arrays["share"] = 0.1 * arrays["share"]
    said = lab.report(config, lab.summarise(config, arrays))
    assert "in 0 of 2 runs of 5 updates" in said
    assert "The claim's strong form does not hold here." in said
    assert "the same margin" in said
    assert "prove nothing" not in said  # all have the margin of the model
    assert "The headline does not hold here (under 10 %)." in said


@pytest.mark.parametrize(("off", "matched"), [(0.015, 2), (-0.015, 2), (0.025, 1), (-0.025, 1)])
def test_a_control_is_at_the_margin_within_a_fiftieth(by_hand, off, matched):
    config, arrays = by_hand
    arrays["logp"] = arrays["logp"][[1, 1, 1, 1]]
    logp = arrays["logp"][1]  # of the first prompt's control
    margin = np.subtract(*(logp[-1] - logp[0]))
    logp[-1, 1] -= off * margin
    assert [row["matched"] for row in lab.summarise(config, arrays)] == [2, matched]


def test_one_prompt_has_no_spread(by_hand):
    config, arrays = by_hand
    config = dataclasses.replace(config, prompts=1)
    (row, _) = lab.summarise(config, {name: array[:2] for name, array in arrays.items()})
    assert row["end"] == pytest.approx([0.1, 0.0])


# --- stopped and started again


FLAGS_OF_THE_KILLED = (
    *("--name", "x", "--resume", "--train", "all", "--prompts", "1", "--updates", "2"),
    *("--sft-steps", "1", "--sft-batch", "2"),
    *("--learning-rates", "1e-3", "3e-4"),
)


def killed(model, cwd):
    """The command in a process that dies once the first cell is kept."""
    save = runs.save_arrays

    def once(path, arrays):
        save(path, arrays)
        if "sft" not in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    runs.save_arrays = once
    call(*FLAGS_OF_THE_KILLED, model=model, cwd=cwd)


def here_and_there(model, folders):
    """The command in one folder after the other."""
    for cwd in folders:
        call(*FLAGS_OF_THE_KILLED, model=model, cwd=cwd)
        measure.supervised.cache_clear()  # it knows the folder by its relative name


def typed(*flags, model, cwd):
    """The command as a process of its own, started in `cwd`: its exit code, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.no_vs_never", "--model", str(model), *map(str, flags)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def ended(process):
    """The exit code of a process that is started here."""
    process.start()
    process.join(600)
    return process.exitcode


def test_a_killed_run_ends_with_the_same_bits(tiny_model, clean, tmp_path):
    folders, paths = [], {}
    for folder in ("undisturbed", "killed"):
        folders.append(tmp_path / folder)
        folders[-1].mkdir()
        paths[folder] = folders[-1] / "runs" / "no_vs_never" / "x"
    code = ended(clean.Process(target=killed, args=(tiny_model, folders[1])))
    assert code == -signal.SIGKILL
    first = list((paths["killed"] / "parts").glob("[!.s]*.npz"))
    assert len(first) == 1
    assert not (paths["killed"] / "arrays.npz").exists()
    was = first[0].stat().st_mtime_ns
    assert ended(clean.Process(target=here_and_there, args=(tiny_model, folders))) == 0
    assert first[0].stat().st_mtime_ns == was  # read back, not made again
    for name in ("arrays.npz", "metrics.jsonl", "summary.json"):
        assert (paths["killed"] / name).read_bytes() == (paths["undisturbed"] / name).read_bytes()


def test_an_error_is_one_line_and_an_exit_code(tiny_model, tmp_path):
    code, said = typed("--bta", "3", model=tiny_model, cwd=tmp_path)
    assert code > 0
    assert said.count("\n") == 1
    assert "unknown --bta 3" in said
    assert not (tmp_path / "runs").exists()


def test_workers_are_there_where_the_runs_can_be_shared_out(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        size: int = 3

    def started(run, *flags):
        monkeypatch.setattr(sys, "argv", ["toy", "--name", run.__name__, *flags])
        running.command(
            "toy", Settings, description=None, hashes=lambda _: {}, run=run,
            summarise=lambda *_: [], report=lambda *_: "", draw=lambda *_: plt.figure(),
        )  # fmt: skip

    def shared(config, folder, *, workers=1):
        got.append(workers)
        return {"x": np.ones(config.size)}

    def alone(config, folder):
        return shared(config, folder, workers=0)

    got = []
    monkeypatch.chdir(tmp_path)
    started(shared, "--workers", "2")
    started(alone)
    assert got == [2, 0]
    with pytest.raises(SystemExit, match="toy: unknown --workers 2"):
        started(alone, "--workers", "2")
    plt.close("all")


# --- misused


def refused(*flags, model, cwd):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as error:
        call(*flags, model=model, cwd=cwd)
    said = error.value.code
    assert isinstance(said, str)  # printed to stderr, exit code 1
    assert said.startswith("no_vs_never: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--pairs", "No>Absolutely"), r"word 'Absolutely' is \d+ tokens .*'A.*'\]; expected one"),
        (("--pairs", "No"), "pairs: got 'No', expected two words such as No>Never"),
        (("--pairs", "No>No"), "pairs: 'No>No' prefers a word to itself"),
        (("--beta", "-0.1"), r"beta: got -0\.1, expected above 0"),
        (("--beta", "nan"), "beta: got nan, expected a finite number"),
        (("--tau", "0"), r"tau: got 0\.0, expected above 0"),
        (("--learning-rates", "1e-7", "-1"), r"learning_rates: got -1\.0, expected above 0"),
        (("--learning-rates", "1e-7", "inf"), "learning_rates: got inf, expected a finite number"),
        (("--learning-rates",), "learning_rates: got none, expected one or more"),
        (("--sft-steps", "4", "-1"), "sft_steps: got -1, expected at least 0"),
        (("--decay", "1"), r"decay: got 1\.0, expected a number between 0 and 1"),
        (("--train", "tabular"), "train: got tabular, expected all among them"),
        (("--workers", "0"), "workers: got 0, expected at least 1"),
        (("--updates", "0"), "updates: got 0, expected at least 1"),
        (("--prompts", "67"), "prompts: got 67, expected at most 66"),
        (("--unknown", "1"), "unknown --unknown 1"),
        (("--name", "../x"), r"name is '\.\./x', expected the name of one folder"),
    ],
)
def test_a_bad_setting_is_one_line_before_anything_is_made(tiny_model, tmp_path, flags, said):
    assert re.search(said, refused(*flags, model=tiny_model, cwd=tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_broken_line_of_the_data_has_a_number(tiny_model, tmp_path):
    good = json.dumps({"statement": "I keep my word.", "matches": False})
    (tmp_path / "said.jsonl").write_text(f"{good}\n{good[:-2]}\n{good}\n")
    said = refused("--data", "said.jsonl", model=tiny_model, cwd=tmp_path)
    assert "said.jsonl, line 2: not valid JSON" in said
    assert not (tmp_path / "runs").exists()


def test_a_model_folder_without_weights(tiny_model, tmp_path):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path)
    said = refused(model=tmp_path, cwd=tmp_path)
    assert str(tmp_path) in said
    assert "safetensors" in said


def test_a_question_that_the_model_cannot_read_is_named(tiny_model, tmp_path):
    tokenizer = Tokenizer.from_folder(tiny_model)
    config = decoder.DecoderConfig(
        *(tokenizer.vocab, 4, 1, 1, 1, 4, 16), norm="layer", positions="learned", max_positions=8,
        gated=False, activation="gelu_tanh", qkv_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), decoder.abstract(config)[1])
    pretrained.save(tmp_path / "short", params, config, family="gpt2", tokenizer=tokenizer)
    said = refused(model=tmp_path / "short", cwd=tmp_path)
    assert re.search(r"question 0: a text of \d+ tokens, expected at most 9: this model", said)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_not_overwritten(made, tiny_model):
    _, path, *_ = made
    before = {each: each.stat().st_mtime_ns for each in path.rglob("*")}
    flags = (*FLAGS, "--name", "small")
    assert "small exists; expected resume" in refused(*flags, model=tiny_model, cwd=path.parents[2])
    flags = (*flags, "--updates", "6", "--resume")
    said = refused(*flags, model=tiny_model, cwd=path.parents[2])
    assert said.endswith("was made with another config: updates is 6, was 5")
    assert {each: each.stat().st_mtime_ns for each in path.rglob("*")} == before


def test_a_resumed_finished_run_says_the_same(made, tiny_model):
    _, path, record, printed = made
    flags = (*FLAGS, "--name", "small", "--resume")
    assert call(*flags, model=tiny_model, cwd=path.parents[2]) == printed
    same(runs.load(path).arrays, record.arrays)


def test_the_docstring_is_a_lab_note():
    for heading in ("Claim:", "Run:", "Takes:", "Expect:", "Source:"):
        assert any(line.startswith(heading) for line in lab.__doc__.splitlines()), heading
