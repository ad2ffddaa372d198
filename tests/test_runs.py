"""Run folders: what is written comes back, and nothing good is ever lost."""

import ast
import dataclasses
import errno
import importlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import runs


@dataclasses.dataclass(frozen=True)
class Config:
    beta: float = 0.1
    pairs: tuple[str, ...] = ("Yes>No", "No>Never")
    folder: Path = Path("models") / "tiny"
    clip: float = math.inf


@pytest.fixture
def run(tmp_path):
    return runs.create("toy", "run", Config(), root=tmp_path, provenance={"data": "sha256:ab"})


def files(path):
    return {each.name for each in path.iterdir()}


def test_a_run_comes_back(run):
    run.log(0, {"loss": jnp.float32(0.1), "accuracy": np.array([0.5, 1.0])})
    run.log(1, {"loss": float("nan"), "count": 3})
    arrays = {"file": jnp.arange(3), "sft/loss": np.eye(2, dtype=np.float32), "empty": []}
    run.save(arrays=arrays, summary={"rows": [{"drop": 0.25, "peak": -math.inf}]})
    config, provenance, metrics, loaded, summary = runs.load(run.path)
    assert config == {
        "beta": 0.1,
        "pairs": ["Yes>No", "No>Never"],
        "folder": "models/tiny",
        "clip": "inf",
    }
    assert provenance["data"] == "sha256:ab"
    # A float32 is written with all its digits.
    assert metrics[0] == {"step": 0, "loss": float(np.float32(0.1)), "accuracy": [0.5, 1.0]}
    assert metrics[1] == {"step": 1, "loss": pytest.approx(math.nan, nan_ok=True), "count": 3}
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert loaded["sft/loss"].dtype == np.float32
    assert summary == {"rows": [{"drop": 0.25, "peak": -math.inf}]}


def test_every_json_file_is_strict_json(run):
    def refuse(word):
        raise AssertionError(word)

    run.log(0, {"loss": math.nan})
    run.save(summary={"worst": math.inf})
    for file in run.path.glob("*.json*"):
        json.loads(file.read_text(), parse_constant=refuse)


def test_metrics_may_be_saved_at_once(run):
    run.save(metrics=[{"step": 0, "loss": 1.5}, {"step": 1, "loss": jnp.array(0.5)}])
    columns = runs.columns(runs.load(run.path).metrics)
    assert {name: values.tolist() for name, values in columns.items()} == {
        "step": [0, 1],
        "loss": [1.5, 0.5],
    }


def test_what_is_not_there_is_empty(run):
    record = runs.load(run.path)
    assert (record.metrics, record.arrays, record.summary) == ([], {}, {})
    assert runs.columns([]) == {}


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    for name in "ab":
        runs.save_arrays(tmp_path / name, {"x": np.arange(4)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arrays_of_objects_are_refused(tmp_path):
    runs.save_arrays(tmp_path / "a", {"x": np.arange(4)})
    with pytest.raises(ValueError, match="Object arrays"):
        runs.save_arrays(tmp_path / "a", {"x": np.array([{}])})
    assert runs.load_arrays(tmp_path / "a")["x"].tolist() == [0, 1, 2, 3]
    assert files(tmp_path) == {"a"}


# Coming back ------------------------------------------------------------------------------------


def test_a_run_that_exists_is_refused_and_stays_as_it_was(run):
    before = {file: file.read_bytes() for file in run.path.iterdir()}
    with pytest.raises(FileExistsError, match=r"toy/run exists; expected resume, or a name"):
        runs.create("toy", "run", Config(), root=run.path.parents[1])
    assert {file: file.read_bytes() for file in run.path.iterdir()} == before
    assert files(run.path.parent) == {"run"}


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "toy" / "run").mkdir(parents=True)
    (tmp_path / "toy" / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="run exists and is not a run"):
        runs.create("toy", "run", {}, root=tmp_path, resume=True)
    assert files(tmp_path / "toy" / "run") == {"thesis.txt"}


def test_resume_continues_the_same_run_or_makes_it(run):
    run.log(0, {"loss": 1.0})
    root = run.path.parents[1]
    options = {"root": root, "resume": True, "provenance": {"data": "sha256:ab"}}
    again = runs.create("toy", "run", Config(), **options)
    again.log(1, {"loss": 0.5})
    assert [line["loss"] for line in runs.load(run.path).metrics] == [1.0, 0.5]
    assert "resumed" not in runs.load(run.path).provenance
    (run.path / ".arrays.npz.7.part").write_bytes(b"left by a kill")
    runs.create("toy", "run", Config(), **options)
    assert files(run.path) == {"config.json", "provenance.json", "metrics.jsonl"}
    new = runs.create("toy", "new", Config(), **options)
    assert runs.load(new.path).config["beta"] == 0.1


def test_resume_refuses_another_config_naming_what_differs(run):
    root = run.path.parents[1]
    other = {"beta": 0.2, "pairs": ["Yes>No", "No>Never"], "folder": "models/tiny", "seed": 1}
    said = (
        r"toy/run was made with another config: beta is 0\.2, was 0\.1; clip is 'absent', "
        r"was 'inf'; seed is 1, was 'absent'"
    )
    with pytest.raises(ValueError, match=said):
        runs.create("toy", "run", other, root=root, resume=True)
    said = "another data or model: data is 'sha256:cd', was 'sha256:ab'"
    with pytest.raises(ValueError, match=said):
        runs.create(
            "toy", "run", Config(), root=root, resume=True, provenance={"data": "sha256:cd"}
        )


def test_resume_under_other_code_is_written_down(run, monkeypatch):
    here = runs._environment()
    monkeypatch.setattr(runs, "_environment", lambda: {**here, "jax": "99.0"})
    for _ in range(2):
        runs.create("toy", "run", Config(), root=run.path.parents[1], resume=True)
    provenance = runs.load(run.path).provenance
    assert provenance["jax"] == here["jax"]
    assert [other["jax"] for other in provenance["resumed"]] == ["99.0"]


def test_truncate_drops_later_steps_and_half_a_line(run):
    for step in range(4):
        run.log(step, {"loss": 1 / (step + 1)})
    file = run.path / "metrics.jsonl"
    whole = file.read_bytes()
    with open(file, "ab") as out:
        out.write(b'{"step": 4, "lo')
    assert len(runs.load(run.path).metrics) == 4
    run.truncate(4)
    assert file.read_bytes() == whole
    run.truncate(2)
    assert file.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    run.truncate(0)
    assert file.read_bytes() == b""


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_a_name_is_that_of_one_folder(tmp_path, name):
    for argument in ("experiment", "name"):
        names = {"experiment": "toy", "name": "run"} | {argument: name}
        with pytest.raises(ValueError, match=f"{argument} is {name!r}, expected the name of one"):
            runs.create(config={}, root=tmp_path, **names)
    assert files(tmp_path) == set()


def test_broken_files_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run, expected a folder with"):
        runs.load(tmp_path / "nowhere")
    file = run.path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        runs.load(run.path)
    file.unlink()
    run.save(arrays={"x": np.arange(100)})
    content = (run.path / "arrays.npz").read_bytes()
    (run.path / "arrays.npz").write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"arrays\.npz is not a whole npz file"):
        runs.load(run.path)
    (run.path / "arrays.npz").unlink()
    (run.path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        runs.load(run.path)


# A full disk ------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_file(run, monkeypatch):
    saved = {"arrays": {"x": np.arange(3)}, "summary": {"drop": 0.5}, "metrics": [{"step": 0}]}
    run.save(**saved)
    before = {file: file.read_bytes() for file in run.path.iterdir()}
    assert len(before) == 5

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for what, file in (
        ("arrays", "arrays.npz"),
        ("summary", "summary.json"),
        ("metrics", "metrics.jsonl"),
    ):
        with pytest.raises(OSError, match=f"No space left .* last good content .*{file}") as caught:
            run.save(**{what: {}})
        assert caught.value.errno == errno.ENOSPC
    assert {file: file.read_bytes() for file in run.path.iterdir()} == before
    with pytest.raises(OSError, match="No space left"):
        runs.create("toy", "other", {}, root=run.path.parents[1])
    assert files(run.path.parent) == {"run"}


HALF_A_LINE = """
import resource, sys
from pathlib import Path
from jaxpref import runs

run = runs.Run(Path(sys.argv[1]))
run.log(0, {"loss": 1.0})
# The file may grow by ten bytes: the next line is written in part, then refused.
size = (run.path / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    run.log(1, {"loss": 0.5})
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_in_a_line_keeps_the_lines_before(run):
    command = [sys.executable, "-c", HALF_A_LINE, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "not saved, the lines before are kept" in done.stdout
    assert str(run.path / "metrics.jsonl") in done.stdout
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


# Provenance -------------------------------------------------------------------------------------


def test_provenance_says_what_made_the_numbers_and_not_who_or_where(run):
    provenance = runs.load(run.path).provenance
    expected = {"commit", "dirty", "python", "jax", "jaxlib", "jaxpref", "platform", "device"}
    assert provenance.keys() == expected | {"devices", "data"}
    assert (provenance["platform"], provenance["device"]) == ("cpu", "cpu")
    assert re.fullmatch(r"3\.\d+\.\d+", provenance["python"])
    text = (run.path / "provenance.json").read_text()
    assert socket.gethostname() not in text
    assert not re.search(r'"/|[A-Z]:\\', text)
    with pytest.raises(ValueError, match="provenance model is the absolute path '/models/a'"):
        runs.create("toy", "b", {}, root=run.path.parents[1], provenance={"model": "/models/a"})


def test_commit_is_that_of_the_code(tmp_path, monkeypatch):
    def git(*command):
        names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_CONFIG_GLOBAL": "/dev/null"}
        names |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
        options = {"capture_output": True, "text": True, "check": True}
        environment = {**os.environ, **names}
        return subprocess.run(["git", *command], cwd=tmp_path, env=environment, **options).stdout

    code = tmp_path / "runs.py"
    code.write_text("1")
    monkeypatch.setattr(runs, "__file__", str(code))
    (tmp_path / "thesis.txt").write_text("1")
    git("init", "-q")
    git("add", "thesis.txt")
    git("commit", "-q", "-m", "nothing of ours")  # the code lies in it, but is not part of it
    assert runs._commit() == {"commit": None, "dirty": None}
    git("add", "runs.py")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    assert runs._commit() == {"commit": head, "dirty": False}
    code.write_text("2")
    assert runs._commit() == {"commit": head, "dirty": True}


def test_runs_imports_nothing_of_jaxpref():
    tree = ast.parse(Path(runs.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports for alias in node.names]
    names += [node.module for node in imports if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if "jaxpref" in name or "wandb" in name]
    assert all(node.level == 0 for node in imports if isinstance(node, ast.ImportFrom))


# Figure and mirror ------------------------------------------------------------------------------


class Figure:
    """Of matplotlib, only what is called."""

    def savefig(self, file, *, format, **_):
        file.write(format.encode())


def test_a_figure_is_saved_twice(run):
    assert run.save_figure(Figure()) == run.figure_png == run.path / "figure.png"
    assert run.figure_png.read_bytes() == b"png"
    assert run.figure_svg.read_bytes() == b"svg"


class FakeWandb(types.ModuleType):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.lines, self.summary, self.finished = [], [], {}, 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, *, step):
        self.lines.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_mirrors_a_run_on_request(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    runs.create("toy", "unmirrored", {}, root=tmp_path).close()
    assert fake.started == []
    for resume in (False, True):
        options = {"root": tmp_path, "resume": resume, "wandb": "offline"}
        run = runs.create("toy", "run", {"beta": 0.5}, **options)
    run.log(3, {"loss": jnp.array(0.25)})
    run.save(summary={"drop": np.float32(0.5)})
    run.close()
    first, second = fake.started
    assert first == second  # the same identity: one run there, too
    assert (first["project"], first["name"], first["mode"]) == ("toy", "run", "offline")
    assert (first["config"], first["dir"]) == ({"beta": 0.5}, str(run.path))
    assert (fake.lines, fake.summary, fake.finished) == ([(3, {"loss": 0.25})], {"drop": 0.5}, 1)


def test_wandb_that_is_not_there_or_not_a_mode_is_named(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"wandb is 'online', .* pip install 'jaxpref\[wandb\]'"):
        runs.create("toy", "run", {}, root=tmp_path, wandb="online")
    assert files(tmp_path) == set()
