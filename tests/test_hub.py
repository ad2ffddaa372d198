"""Names of the Hugging Face hub against a cache that the test writes; never the network."""

import json
import shutil
import types

import numpy as np
import pytest
from test_pretrained import CONFIG, make_params, same, write_folder

from experiments.protocol import inputs
from jaxpref.data import hub
from jaxpref.data.files import DataError, filter_file, read_pairs
from jaxpref.models import pretrained
from jaxpref.models.pretrained import PretrainedError

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No network; the hub's cache in a folder of the test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def keep(cache, kind, name, commit, files, *refs):
    """A snapshot as the hub's library lays it out: blobs, links to them, and names of commits."""
    place = cache / f"{kind}s--{name.replace('/', '--')}"
    for number, (path, content) in enumerate(files.items()):
        blob = place / "blobs" / f"{commit[:3]}{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = place / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    for ref in refs:
        file = place / "refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)


@pytest.fixture
def model(cache, tmp_path):
    folder = write_folder(tmp_path / "model")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    keep(cache, "model", "org/tiny", FIRST, files, "main")
    changed = json.loads(files["config.json"]) | {"rope_theta": 5.0}
    files["config.json"] = json.dumps(changed).encode()
    keep(cache, "model", "org/tiny", SECOND, files, "v2", "refs/pr/1")
    return folder


def test_a_name_is_a_model_pinned_to_its_commit(model):
    found = pretrained.load("org/tiny")
    same(found.params, make_params(CONFIG))
    assert (found.revision, found.source.name, found.config) == (FIRST, FIRST, CONFIG)
    for name in ("org/tiny@v2", f"org/tiny@{SECOND}", "org/tiny@refs/pr/1"):
        other = pretrained.load(name)
        assert (other.revision, other.config.rope_base) == (SECOND, 5.0)
    assert pretrained.load(model).revision is None


def test_a_path_of_that_name_wins(model, tmp_path):
    shutil.copytree(model, tmp_path / "org" / "tiny")
    found = pretrained.load("org/tiny")
    assert (found.revision, str(found.source)) == (None, "org/tiny")


@pytest.mark.parametrize("name", ["org/absent", "org/tiny@v3", f"org/tiny@{'3' * 40}"])
def test_offline_says_what_to_do(model, name):
    with pytest.raises(PretrainedError) as error:
        pretrained.load(name)
    repository, _, revision = name.partition("@")
    assert str(error.value) == (
        f"model {repository}{f' at {revision}' * bool(revision)}: no such path here, no whole copy "
        "in the hub's cache, and the hub is out of reach: download it where there is a network "
        f"(`hf download {repository}`)"
    )


@pytest.mark.parametrize("name", ["./org/tiny", "/org/tiny", "tiny", "a/b.gguf", "a/b/c"])
def test_what_is_no_name_is_a_path(model, name):
    with pytest.raises(
        PretrainedError, match=f"^{name.removeprefix('./')}: no such file, expected"
    ):
        pretrained.load(name)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            "GatedRepoError",
            "owners ask for consent: agree on https://huggingface.co/org/tiny, then",
        ),
        ("RepositoryNotFoundError", "the hub has none of this name .or `hf auth login` first"),
        ("RevisionNotFoundError", "the hub has no such revision"),
        ("HfHubHTTPError", "the hub is out of reach"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(monkeypatch, raised, message):
    import huggingface_hub
    from huggingface_hub import errors

    class Answer(getattr(errors, raised)):
        def __init__(self):  # the library's own wants a response
            Exception.__init__(self, "two\nlines")

    def answer(*_, **__):
        raise Answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    with pytest.raises(PretrainedError, match=message) as error:
        pretrained.load("org/tiny")
    assert "\n" not in str(error.value)


def test_only_what_a_model_needs_is_asked_for(monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.update(k) or f"/{FIRST}"
    )
    assert hub.model("org/tiny@main").revision == FIRST
    patterns = asked["allow_patterns"]
    assert not [p for p in patterns if p.endswith((".bin", ".py", ".pt", ".gguf", "*"))]
    assert {"config.json", "tokenizer.json", "model*.safetensors"} <= set(patterns)
    assert (asked["revision"], asked["repo_type"]) == ("main", "model")


def test_a_data_set_is_the_parquet_files_of_a_split(cache):
    files = {f"data/train-0000{i}-of-00002.parquet": b"PAR1" for i in (1, 0)}
    keep(cache, "dataset", "org/one", FIRST, {**files, "README.md": b""}, "main")
    found, commit = hub.parquet("org/one")
    assert [f.name for f in found] == sorted(f.rpartition("/")[2] for f in files)
    assert commit == FIRST
    assert hub.parquet("org/one:train")[0] == found
    files |= {"data/test-00000-of-00001.parquet": b"PAR1"}
    keep(cache, "dataset", "org/two", SECOND, files, "main")
    assert len(hub.parquet(f"org/two:train@{SECOND}")[0]) == 2
    for name in ("org/two", "org/two:validation"):
        with pytest.raises(DataError) as error:
            hub.parquet(name)
        assert str(error.value) == (
            f"{name}: expected one split of this data set: org/two:test, org/two:train"
        )


def test_a_data_set_without_parquet_files_is_read_from_the_hubs_conversion(cache):
    keep(cache, "dataset", "org/lines", FIRST, {"rows.jsonl": b"{}"}, "main")
    with pytest.raises(DataError, match="out of reach"):
        hub.parquet("org/lines")
    converted = {"default/train/0000.parquet": b"PAR1"}
    keep(cache, "dataset", "org/lines", SECOND, converted, "refs/convert/parquet")
    found, commit = hub.parquet("org/lines")
    assert (found[0].name, commit) == ("0000.parquet", SECOND)


def test_the_commit_is_part_of_a_runs_provenance():
    params, problem = {"w": np.zeros(2, np.float32)}, types.SimpleNamespace(digest="d", skipped=())
    local = inputs.hashes(inputs.Subject(None, params, None), problem)
    named = inputs.hashes(inputs.Subject(None, params, None, FIRST), problem)
    assert set(local) == {"model", "data", "dtype", "precision", "skipped"}
    assert named == {**local, "model_revision": FIRST}


def test_rows_are_read_by_name_and_the_commit_is_kept(cache):
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    rows = [{"prompt": "q", "chosen": "a", "rejected": r} for r in "bc"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    content = sink.getvalue().to_pybytes()
    files = {f"data/train-0000{i}-of-00002.parquet": content for i in range(2)}
    keep(cache, "dataset", "org/pairs", FIRST, files, "main")
    pairs = read_pairs("org/pairs")
    assert [(pair.rejected, pair.row) for pair in pairs] == [("b", 0), ("c", 1), ("b", 2), ("c", 3)]
    assert pairs[3].place.endswith("train-00001-of-00002.parquet, row 1")
    assert hub.data_revision("org/pairs:train") == {"data_revision": FIRST}
    keep(cache, "dataset", "org/pairs", SECOND, files, "main")  # the branch moves on
    assert hub.data_revision("org/pairs") == {"data_revision": FIRST}
    assert hub.data_revision("org/pairs.jsonl") == hub.data_revision(None) == {}
    with pytest.raises(DataError, match=r"org/pairs.jsonl: no such file"):
        read_pairs("org/pairs.jsonl")
    with pytest.raises(DataError, match="dataset org/others: no such path here"):
        read_pairs("org/others")
    with pytest.raises(DataError, match="expected a file to filter"):
        filter_file("org/pairs", [0], cache / "out.parquet")
