"""Published data sets by name, on small files of our own in a manual folder; no network."""

import csv
import functools
import gzip
import hashlib
import http.server
import json
import subprocess
import sys
import threading

import pyarrow
import pytest
from pyarrow import parquet

from jaxpref.data import builders, statements
from jaxpref.data.builders import catalogue
from jaxpref.data.builders.sources import SOURCES
from jaxpref.data.files import DataError, pairs_of, read_pairs

PERSONA = [
    {
        "question": f'Is the following statement something you would say?\n"{said}"',
        "statement": said,
        "label_confidence": 0.75,
        "answer_matching_behavior": " No",
        "answer_not_matching_behavior": " Yes",
    }
    for said in ("I keep my wörd.", "I pay my debts.")
]
ASK = "\n\nHuman: Which bird swims?\n\nAssistant:"
TRANSCRIPTS = [
    {"chosen": f"{ASK} The penguin, {number}.", "rejected": f"{ASK} The heron, {number}."}
    for number in range(30)
]
PROMPTS = [
    {
        "id": str(number),
        "prompt": f'How do I "kill" a process,\nand {number}?',
        "type": "homonyms",
        "label": label,
        "focus": "",
        "note": "",
    }
    for number, label in enumerate(["safe", "unsafe", "safe"])
]
USER = {"role": "user", "content": "Which bird swims?"}
ANSWERS = [{"role": "assistant", "content": said} for said in ("The penguin.", "The heron.")]
CONVERSATIONS = [
    {
        "prompt": USER["content"],
        "prompt_id": f"{number:x}",
        "chosen": [*[USER] * (2 * number + 1), ANSWERS[0]],
        "rejected": [*[USER] * (2 * number + 1), ANSWERS[1]],
        "score_chosen": 7.5,
        "score_rejected": 4.0 - number,
    }
    for number in range(3)
]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows, path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(rows, path):
    messages = [{"messages": row["chosen"]} | row for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(messages), path)


SETS = {
    "persona/ends-justify-means": (
        PERSONA,
        lambda rows, path: path.write_bytes(as_lines(rows)),
    ),
    "hh_rlhf_harmless/test": (
        TRANSCRIPTS,
        lambda rows, path: path.write_bytes(gzip.compress(as_lines(rows))),
    ),
    "xstest": (PROMPTS, as_csv),
    "ultrafeedback_binarized/train_prefs": (CONVERSATIONS, as_parquet),
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes the file of a data set to a manual folder, and expects its checksum."""

    def save(name, rows=None):
        found, write = SETS[name]
        folder = tmp_path / "manual"
        folder.mkdir(exist_ok=True)
        path = folder / SOURCES[name].file
        write(rows or found, path)
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(sha256=checksum))
        return {"data_dir": tmp_path / "data", "manual_dir": folder}

    return save


@pytest.mark.parametrize("name", SETS)
def test_rows_are_those_of_the_file_in_its_order(saved, name):
    places = saved(name)
    found = list(builders.rows(name, **places))
    assert [row for _, row in found] == SETS[name][0]
    assert [place for place, _ in found] == [f"tfds:{name}, row {n}" for n in range(len(found))]
    assert "tensorflow" not in sys.modules


def test_prepared_rows_need_no_file_any_more(saved, tmp_path):
    places = saved("xstest")
    first = list(builders.rows("xstest", **places))
    (places["manual_dir"] / SOURCES["xstest"].file).unlink()
    assert list(builders.rows("xstest", **places)) == first
    assert list(builders.rows("xstest", data_dir=str(tmp_path / "data"))) == first


def test_named_sets_are_read_like_files(saved, tmp_path, monkeypatch):
    everywhere = functools.partial(builders.rows, data_dir=tmp_path / "data")
    monkeypatch.setattr(builders, "rows", everywhere)
    for name in SETS:
        places = saved(name)
        default = tmp_path / "data" / "downloads" / "manual"
        default.parent.mkdir(parents=True, exist_ok=True)
        if not default.exists():
            default.symlink_to(places["manual_dir"])
    pairs = read_pairs("tfds:hh_rlhf_harmless/test")
    assert pairs[7][:3] == (ASK, " The penguin, 7.", " The heron, 7.")
    assert pairs[7][3:5] == ("tfds:hh_rlhf_harmless/test, row 7", 7)
    pairs = read_pairs("tfds:ultrafeedback_binarized/train_prefs")
    assert pairs[1][:3] == ([USER] * 3, "The penguin.", "The heron.")
    said = statements.load("tfds:persona/ends-justify-means")
    assert [row.statement for row in said] == [row["statement"] for row in PERSONA]
    with pytest.raises(DataError, match="tfds:xstest, row 0: no column 'chosen', found 'foc"):
        read_pairs("tfds:xstest")


def test_tfds_knows_source_licence_and_citation(tmp_path):
    for name, source in SOURCES.items():
        builder, _, config = name.partition("/")
        info = catalogue.BUILDERS[builder](config=config or None, data_dir=tmp_path).info
        assert source.url in info.description
        assert info.redistribution_info.license == source.licence
        assert info.citation.startswith("@misc{")
        assert info.homepage == source.homepage
        assert info.file_format.value == "array_record"


def test_sources_are_pinned_and_name_their_files():
    for source in SOURCES.values():
        assert sum(len(part) == 40 for part in source.url.split("/")) == 1
        assert source.sha256 is None or len(source.sha256) == 64
    files = [source.file for source in SOURCES.values()]
    assert len({*files}) == len(files)


def test_unknown_names_are_refused_with_the_known_ones():
    for name in ("imdb", "persona", "xstest/test", ""):
        expected = f"tfds:{name}: no such data set, expected one of persona/ends-justify-means, hh_"
        with pytest.raises(DataError) as caught:
            read_pairs(f"tfds:{name}")
        assert str(caught.value).startswith(expected)


def test_a_missing_file_is_named_with_its_address(saved):
    places = saved("xstest")
    for folder in (places["manual_dir"], places["manual_dir"] / "none"):
        with pytest.raises(DataError) as caught:
            list(builders.rows("hh_rlhf_harmless/train", **places | {"manual_dir": folder}))
        message = str(caught.value)
        assert f"no harmless-base_train.jsonl.gz in {folder}, expected https://raw." in message
        assert message.endswith("/harmless-base/train.jsonl.gz saved under this name")


def test_another_file_is_refused_and_kept(saved):
    places = saved("xstest")
    path = places["manual_dir"] / SOURCES["xstest"].file
    expected = SOURCES["xstest"].sha256
    path.write_bytes(path.read_bytes() + b"9,x,x,x,x,x\n")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    for _ in range(2):  # nothing is left half prepared
        with pytest.raises(DataError) as caught:
            list(builders.rows("xstest", **places))
        message = str(caught.value)
        assert message.startswith(f"tfds:xstest: {path} has SHA-256 {found}, expected {expected}")
    assert path.exists()


def test_a_file_without_a_known_checksum_is_used_unchecked(saved, monkeypatch):
    name = "hh_rlhf_harmless/test"
    places = saved(name)
    monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(sha256=None))
    assert len(pairs_of(builders.rows(name, **places))) == 30


def test_a_file_without_a_column_is_named(saved):
    places = saved("hh_rlhf_harmless/test", rows=[{"chosen": "a", "refused": "b"}])
    with pytest.raises(DataError, match="line 1: no column 'rejected', found 'chosen', 'refused'"):
        list(builders.rows("hh_rlhf_harmless/test", **places))


@pytest.fixture
def server(tmp_path):
    """Serves the manual folder on this machine, and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path / "manual")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_downloads_are_checked_and_kept(saved, server, monkeypatch, tmp_path):
    name, (address, asked) = "hh_rlhf_harmless/test", server
    saved(name)
    source = SOURCES[name]._replace(url=f"{address}/{SOURCES[name].file}")
    served = tmp_path / "manual" / source.file

    monkeypatch.setitem(SOURCES, name, source._replace(url=f"{address}/none.jsonl.gz"))
    with pytest.raises(DataError, match=r"no download \(.*404.*\), expected http.*saved under"):
        list(builders.rows(name, data_dir=tmp_path / "data"))

    monkeypatch.setitem(SOURCES, name, source)
    whole = served.read_bytes()
    served.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected"):
        list(builders.rows(name, data_dir=tmp_path / "data"))
    served.write_bytes(whole)  # the broken copy is not taken again
    for _ in range(2):
        rows = [row for _, row in builders.rows(name, data_dir=tmp_path / "data")]
        assert rows == TRANSCRIPTS
    assert asked.count(f"/{source.file}") == 2


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "importlib_resources"])
def test_what_is_not_installed_is_named_with_the_remedy(saved, monkeypatch, package):
    places = saved("xstest")
    monkeypatch.setitem(sys.modules, package, None)
    expected = "tfds:xstest: to read it, run: pip install tensorflow-datasets array-record impor"
    with pytest.raises(DataError, match=expected):
        list(builders.rows("xstest", **places))


def test_names_and_sources_load_no_tfds():
    source = (
        "import sys, jaxpref.data.builders.sources\n"
        "assert not {'pyarrow', 'tensorflow_datasets', 'etils'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=300)
