"""Files and rows of docs/formats.md: its tables, row by row."""

import json
import re
from pathlib import Path

import pytest

from jaxpref.data.files import DataError, RowError, read

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")


def table(heading):
    """The rows of the table under a header of this text, their cells without spaces."""
    (lines,) = re.findall(
        rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]


@pytest.mark.parametrize(("layout", "kind", "row"), table("layout"))
def test_layouts_are_read(layout, kind, row):
    kind, *needs = re.findall(r"`(\w+)`", kind)
    (found,) = read([("here", json.loads(row.strip("`")))], kind, needs=needs).rows
    for need in needs:
        assert getattr(found, need) is not None, layout
    texts = getattr(found, "responses", None) or [found[1], *found[2:3]]
    assert texts[0] in ("2", " 2", "3")


@pytest.mark.parametrize(("row", "said"), table("a row"))
def test_rows_are_refused(row, said):
    with pytest.raises(RowError) as caught:
        read([("here", json.loads(row.strip("`")))])
    assert str(caught.value).startswith("here: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "said"), table("a file"))
def test_files_are_refused(text, said, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text.strip("`"))
    for bad in ("error", "drop"):
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            read(path, bad=bad)
        assert not isinstance(caught.value, RowError)


@pytest.mark.parametrize(("ending", "what", "place"), table("name ends in"))
def test_formats_are_read_at_their_places(ending, what, place, tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for name in re.findall(r"`(\.[\w.]+)`", ending):
        path = tmp_path / f"rows{name}"
        _write(path, [row], array="array" in what)
        assert read(path).rows[0][:4] == (*row.values(), f"{path}, {expected(place, name)}")


def expected(place, name):
    """The first place: of a packed file it is the same as of one that is not."""
    is_line = place.startswith("`line") or (place == "the same" and "csv" not in name)
    return "line 1" if is_line else "row 0"


def _write(path, found, *, array):
    import gzip

    import pyarrow
    from pyarrow import parquet

    if path.suffix in (".parquet", ".pq"):
        parquet.write_table(pyarrow.Table.from_pylist(found), path)
        return
    text = json.dumps(found) if array else "".join(json.dumps(row) + "\n" for row in found)
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        if ending in path.suffixes:
            text = "".join(mark.join(cells) + "\n" for cells in [found[0], found[0].values()])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
