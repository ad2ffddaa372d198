"""Layouts of rows, rows without a preference, packed files, Parquet, and files in part."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxpref.data.files import (
    DataError,
    RowError,
    TextPair,
    filter_file,
    json_lines,
    read,
    read_pairs,
    rows,
)

ASK = "\n\nHuman: Which bird swims?\n\nAssistant:"
ROW = {"chosen": f"{ASK} The penguin.", "rejected": f"{ASK} The heron."}


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def both(same, chosen, rejected):
    return {"chosen": same + chosen, "rejected": same + rejected}


AGAIN = f"{ASK} The penguin.\n\nHuman: And the emu?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, (ASK, " The penguin.", " The heron.")),
        # Only the last shared turn is split off, however alike the answers begin.
        (both(AGAIN, " No, it runs.", " No."), (AGAIN, " No, it runs.", " No.")),
        # Nothing between the turn and the first difference.
        (both(ASK, "A", "B"), (ASK, "A", "B")),
        # They part within an answer: all that follows belongs to the response.
        (
            both(ASK, " No.\n\nHuman: Oh\n\nAssistant: Yes.", " Never."),
            (ASK, " No.\n\nHuman: Oh\n\nAssistant: Yes.", " Never."),
        ),
        # They part in a question, and within the marker of a turn.
        (
            both(f"{ASK} No.\n\nHuman: ", "Why?\n\nAssistant: A", "Who?\n\nAssistant: B"),
            (ASK, " No.\n\nHuman: Why?\n\nAssistant: A", " No.\n\nHuman: Who?\n\nAssistant: B"),
        ),
        (
            both(f"{ASK} No.\n\n", "Assistant: Yes.", "Assistants are busy."),
            (ASK, " No.\n\nAssistant: Yes.", " No.\n\nAssistants are busy."),
        ),
        # One goes on where the other stops.
        (both(f"{ASK} No.", "", " Never."), (ASK, " No.", " No. Never.")),
        # A prompt column makes the others plain responses.
        (ROW | {"prompt": "x"}, ("x", ROW["chosen"], ROW["rejected"])),
    ],
)
def test_transcripts_part_at_their_last_shared_turn(written, row, expected):
    path = written(row)
    (pair,) = read_pairs(path)
    assert pair == TextPair(*expected, f"{path}, line 1", 0)


UNUSABLE = [
    ({"chosen": "yes", "rejected": "no"}, "no column 'prompt', and expected transcripts that"),
    (both("\n\nHuman: ", "A?\n\nAssistant: a", "B?\n\nAssistant: b"), "no column 'prompt', and ex"),
    (both(ASK, " a", " a"), "chosen and rejected are identical, expected two transcripts"),
    (both(ASK, " \n", " a"), "chosen is an empty response"),
    (both(ASK, " a", ""), "rejected is an empty response"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are identical"),
    ({"prompt": "x", "chosen": "a", "rejected": ""}, "rejected is an empty response"),
]


@pytest.mark.parametrize(("row", "fault"), UNUSABLE)
def test_a_row_without_a_preference_is_an_error_or_left_out(written, row, fault):
    path = written(ROW, row, ROW)
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 2: {fault}")
    assert "\n" not in str(caught.value)
    places = [pair.place for pair in read_pairs(path, bad="drop")]
    assert places == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"chosen": ASK}, "no column 'rejected', found 'chosen'"),
        (ROW | {"chosen": 3}, "no column 'prompt', and chosen is a int, expected a transcript"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is a int"),
        (ROW | {"chosen": None}, "no column 'prompt', and chosen is a NoneType"),
    ],
)
def test_what_one_row_lacks_is_left_out_and_named_and_what_all_lack_ends_it(written, row, fault):
    path = written(ROW, row, ROW)
    with pytest.raises(RowError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 2: {fault}")
    found = read(path, bad="drop")
    assert [pair.row for pair in found.rows] == [0, 2]
    assert found.faults == [str(caught.value)]
    path = written(row, row)
    with pytest.raises(DataError, match="no row is left") as caught:
        read_pairs(path, bad="drop")
    assert f"the first: {path}, line 1: {fault}" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'["a"]', "expected a JSON object"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"7" * 5000 + b"}", "a number of more than 4300 digits"),
        (b'{"a": ' + b"[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_drop_hides_no_broken_file(written, line, fault):
    path = written(ROW)
    path.write_bytes(path.read_bytes() + line + b"\n")
    for bad in ("error", "drop"):
        with pytest.raises(DataError) as caught:
            read_pairs(path, bad=bad)
        assert str(caught.value).startswith(f"{path}, line 2: {fault}")
        assert not isinstance(caught.value, RowError)


def test_drop_that_leaves_nothing_is_an_error_with_the_first_reason(written):
    path = written(*(row for row, _ in UNUSABLE))
    with pytest.raises(DataError) as caught:
        read_pairs(path, bad="drop")
    expected = f"no row is left with bad='drop'; the first: {path}, line 1: no column 'prompt'"
    assert str(caught.value).startswith(expected)


def test_an_unknown_way_with_bad_rows_is_refused(written):
    with pytest.raises((ValueError, TypeError), match="bad"):
        read_pairs(written(ROW), bad="skip")


def test_packed_files_read_like_plain_ones(written, tmp_path):
    plain = written(ROW, both(ASK, " Ünder", " über"))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [pair[:3] for pair in read_pairs(packed)] == [pair[:3] for pair in read_pairs(plain)]
    assert [place for place, _ in json_lines(packed)] == [f"{packed}, line {n}" for n in (1, 2)]


def test_broken_archives_are_named(written, tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(written(ROW).read_bytes())
    spoilt = whole[:10] + b"\xff" + whole[11:]  # no such kind of block
    for content in (b"no archive", whole[:-9], spoilt):
        packed.write_bytes(content)
        with pytest.raises(DataError, match=r"rows.jsonl.gz: not a whole gzip file \("):
            read_pairs(packed)


# Conversations, as in UltraFeedback-binarized

USER = {"role": "user", "content": "Which bird swims?"}
SWIMS = {"role": "assistant", "content": "The penguin."}
WADES = {"role": "assistant", "content": "The heron."}
CHAT = {"chosen": [USER, SWIMS], "rejected": [USER, WADES]}


@pytest.mark.parametrize(
    "more", [{}, {"prompt": "another text"}, {"prompt": None}, {"prompt": [USER]}]
)
def test_the_last_message_of_a_conversation_is_the_response(written, more):
    path = written(CHAT | more)
    expected = TextPair([USER], SWIMS["content"], WADES["content"], f"{path}, line 1", 0)
    assert read_pairs(path) == [expected]


def test_all_messages_before_the_last_are_the_prompt(written):
    turns = [{"role": "system", "content": "Be brief."}, USER, WADES, USER]
    (pair,) = read_pairs(written({"chosen": [*turns, SWIMS], "rejected": [*turns, WADES]}))
    assert pair[:3] == (turns, SWIMS["content"], WADES["content"])


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"chosen": [USER]}, "chosen ends with 'user', expected a conversation that ends with"),
        ({"chosen": [SWIMS], "rejected": [WADES]}, "no column 'prompt', expected a conversation"),
        ({"prompt": [SWIMS, USER]}, "prompt is not what chosen and rejected begin with"),
        ({"prompt": 3}, "prompt is not what chosen and rejected begin with"),
        ({"prompt": "x", "rejected": "The heron."}, "chosen is a list, expected a text or one as"),
        ({"rejected": "The heron."}, "no column 'prompt', and chosen is a list, expected a tran"),
    ],
)
def test_faults_of_conversations(written, more, fault):
    path = written(CHAT, CHAT | more)
    with pytest.raises(RowError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 2: {fault}")
    assert [pair.row for pair in read_pairs(path, bad="drop")] == [0]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"chosen": [WADES, USER, SWIMS]}, "chosen and rejected differ before their last message"),
        ({"chosen": [USER, WADES]}, "chosen and rejected are identical"),
        ({"chosen": [USER, SWIMS | {"content": " "}]}, "chosen is an empty response"),
    ],
)
def test_conversations_without_a_preference_are_errors_or_left_out(written, more, fault):
    path = written(CHAT | more, CHAT)
    with pytest.raises(DataError, match=f"line 1: {fault}"):
        read_pairs(path)
    assert [pair.row for pair in read_pairs(path, bad="drop")] == [1]


# Parquet


@pytest.fixture
def stored(tmp_path):
    def store(*found, **options):
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(found), path, **options)
        return path

    return store


@pytest.mark.parametrize("row", [ROW, {"prompt": "x", **ROW}, CHAT, CHAT | {"prompt": "x"}])
def test_parquet_reads_like_json_lines(written, stored, row):
    found = [row] * 1100  # more than are read at a time
    path = stored(*found)
    pairs = read_pairs(path)
    assert [pair[:3] for pair in pairs] == [pair[:3] for pair in read_pairs(written(*found))]
    assert [pair.row for pair in pairs] == list(range(1100))
    assert pairs[-1].place == f"{path}, row 1099"


def test_faults_in_parquet_name_file_and_row(stored):
    path = stored({"prompt": "x", **ROW}, {"prompt": "x", **ROW, "rejected": None})
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, row 1: rejected is a NoneType, expected")
    path = stored({"prompt": "x", "chosen": "a"})
    with pytest.raises(DataError, match="row 0: no column 'rejected', found 'prompt', 'chosen'"):
        read_pairs(path)


def test_broken_parquet_is_named(stored, tmp_path):
    path = stored({"prompt": "x", **ROW})
    whole = path.read_bytes()
    for content in (b"", b"no table", whole[:-9]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"rows.parquet: not a whole Parquet file") as caught:
            read_pairs(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])  # within the first column
    with pytest.raises(DataError, match=r"rows.parquet, after row 0: "):
        read_pairs(path)
    with pytest.raises(DataError, match=r"rows.parquet, after row 0: "):
        filter_file(path, [0], tmp_path / "part.parquet")
    path.write_bytes(whole.replace(b"chosen", b"chose\xff"))
    with pytest.raises(DataError, match=r"rows.parquet: not a whole Parquet file"):
        read_pairs(path)
    parquet.write_table(pyarrow.table({"chosen": pyarrow.array([], "string")}), path)
    with pytest.raises(DataError, match=r"rows.parquet: the file is empty"):
        read_pairs(path)
    with pytest.raises(DataError, match=r"none.parquet: no such file"):
        read_pairs(tmp_path / "none.parquet")


def test_parquet_without_its_package_says_how_to_get_it(stored, monkeypatch):
    path = stored(CHAT)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"rows.parquet: to read Parquet, run: pip install pyarrow"):
        read_pairs(path)


def test_reading_files_loads_neither_arrow_nor_tfds():
    source = (
        "import sys, jaxpref.data.files, jaxpref.data.statements, jaxpref.data.builders\n"
        "assert not {'pyarrow', 'tensorflow_datasets', 'etils'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=300)


# A part of a file


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_kept_lines_are_copied_byte_for_byte(tmp_path, ending):
    lines = [
        b'\xef\xbb\xbf{"chosen":"a",  "rejected":"b", "more":1}\r\n',
        b"  \n",
        b'{"rejected": "\\u00fc",\t"chosen": 1.50}\n',
        b"not JSON, and nobody asked\n",
        b'{"chosen": "no line end"}',
    ]
    path, out = tmp_path / f"rows{ending}", tmp_path / f"part{ending}"
    opened = gzip.open if ending.endswith(".gz") else open
    with opened(path, "wb") as file:
        file.writelines(lines)
    for keep, expected in [([3, 0, 1], [0, 2, 4]), (np.array([2]), [3]), (range(4), [0, 2, 3, 4])]:
        filter_file(path, keep, out)
        with opened(out, "rb") as file:
            assert file.read() == b"".join(lines[i] for i in expected)
    if ending.endswith(".gz"):
        assert out.read_bytes()[3:8] == bytes(5)  # neither a name nor a time


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_kept_rows_of_parquet_keep_columns_schema_and_compression(tmp_path, compression):
    more = {"score": 0.1, "prompt": "x", "none": None}
    found = [{**CHAT, **more, "id": number} for number in range(25)]
    schema = pyarrow.Table.from_pylist(found).schema.with_metadata({"who": "we"})
    path, out = tmp_path / "rows.parquet", tmp_path / "part.parquet"
    table = pyarrow.Table.from_pylist(found, schema=schema)
    parquet.write_table(table, path, compression=compression, row_group_size=10)
    filter_file(path, [21, 3, 4], out)
    with parquet.ParquetFile(out) as file:
        before = parquet.ParquetFile(path).schema_arrow
        assert file.schema_arrow.equals(before, check_metadata=True)
        assert file.schema_arrow.metadata[b"who"] == b"we"
        assert file.read().to_pylist() == [found[row] for row in (3, 4, 21)]
        used = file.metadata.row_group(0).column(0).compression
        assert used == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def test_the_row_of_a_pair_is_the_row_that_is_kept(written, tmp_path):
    path, out = written(ROW, UNUSABLE[-1][0], both(ASK, " A", " B")), tmp_path / "part.jsonl"
    path.write_text("\n" + path.read_text())
    pairs = read_pairs(path, bad="drop")
    filter_file(path, [pairs[1].row], out)
    (kept,) = read_pairs(out)
    assert kept[:3] == pairs[1][:3] == (ASK, " A", " B")


def test_what_cannot_be_filtered_leaves_no_file(written, stored, tmp_path):
    lines, table, out = written(ROW, ROW), stored(ROW, ROW), tmp_path / "part.jsonl"
    link = tmp_path / "link.jsonl"
    link.symlink_to(lines)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, keep, target, error, fault in [
        (lines, [0], lines, DataError, "rows.jsonl: out is the file that is filtered"),
        (lines, [0], link, DataError, "link.jsonl: out is the file that is filtered"),
        (lines, [0], tmp_path / "a.gz", DataError, "expected a name that ends in '.jsonl'"),
        (table, [0], out, DataError, "expected a name that ends in '.parquet', like .*rows.parq"),
        (tmp_path / "no.jsonl", [0], out, DataError, "no.jsonl: no such file"),
        ("tfds:xstest", [0], out, DataError, "path is 'tfds:xstest', a named data set"),
        (lines, [], out, ValueError, "keep names no row"),
        (lines, [0, 2], out, ValueError, "keep names row 2, but .*rows.jsonl has rows 0 to 1"),
        (lines, [-1, 0], out, ValueError, "keep names row -1"),
        (table, [2], tmp_path / "b.parquet", ValueError, "keep names row 2, but .* rows 0 to 1"),
        (lines, [True, False], out, TypeError, "keep contains True, expected numbers of rows"),
        (lines, np.array([True, False]), out, TypeError, None),
        (lines, [0.0], out, TypeError, None),
    ]:
        with pytest.raises(error, match=fault):
            filter_file(path, keep, target)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_breaks_off_replaces_nothing(tmp_path, written):
    path, out = tmp_path / "rows.jsonl.gz", tmp_path / "part.jsonl.gz"
    path.write_bytes(gzip.compress(written(*[ROW] * 100).read_bytes())[:-9])
    out.write_bytes(b"as it was")
    with pytest.raises(DataError, match="not a whole gzip file"):
        filter_file(path, [0], out)
    assert out.read_bytes() == b"as it was"
    assert len(list(tmp_path.iterdir())) == 3


def test_rows_of_any_file_come_with_their_places(written, stored):
    found = [ROW, both(ASK, " A", " B")]
    for path, place in [(written(*found), "line 1"), (stored(*found), "row 0")]:
        assert [row for _, row in rows(path)] == found
        assert next(iter(rows(path)))[0] == f"{path}, {place}"
