"""A part of a file, written back in the file's own format."""

import gzip
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

from jaxpref.data.files._rows import (
    DELIMITERS,
    PARQUET,
    TFDS,
    DataError,
    broken,
    existing,
    is_array,
    kind,
    lines,
    needed,
    parquet,
    records,
)


def filter_file(path: str | Path, keep: Iterable[SupportsIndex], out: str | Path) -> None:
    """Writes some rows of a file of pairs to another file, in the file's own format and order.

    Kept lines of a text file are copied byte for byte, and packed again where the file was packed;
    its blank lines are no rows and are left out, and the header of a table stays. Kept rows of a
    Parquet file have all their columns, and the new file its schema, metadata and compression.
    `out` appears when it is whole: a kill leaves the old one, or none.

    Args:
      path: the file.
      keep: numbers of the rows to keep, counted from 0 as in `TextPair.row`, in any order.
      out: the new file, with a name that ends like that of `path`. Replaced if it exists.

    Raises:
      DataError: a missing or broken file, one that is a single JSON array, or `out` that is `path`
        or ends otherwise.
      ValueError: `keep` that is empty or names a row that the file does not have.
      TypeError: `keep` with anything but whole numbers, such as a mask of true and false.
    """
    check_filter(path, out)
    path, out = Path(path), Path(out)
    kept = {_number(row) for row in keep}
    if not kept:
        raise ValueError("keep names no row, expected at least one")
    write = _write_parquet if kind(path) == PARQUET[0] else _write_lines
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        total = write(path, kept, partial)
        unknown = [row for row in sorted(kept) if not 0 <= row < total]
        if unknown:
            raise ValueError(f"keep names row {unknown[0]}, but {path} has rows 0 to {total - 1}")
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def check_filter(path: str | Path, out: str | Path) -> None:
    """What `filter_file` refuses whatever the rows: to be asked before they are chosen.

    Args:
      path: the file.
      out: the new file.

    Raises:
      DataError: as `filter_file`.
    """
    from jaxpref.data import hub

    if str(path).startswith(TFDS) or hub.is_named(path):
        raise DataError(f"path is {str(path)!r}, a named data set; expected a file to filter")
    path, out = existing(path), Path(out)
    if out.resolve() == path.resolve():
        raise DataError(f"{out}: out is the file that is filtered, expected another name")
    if _ending(out) != _ending(path):
        expected = f"a name that ends in {_ending(path)!r}, like {path}"
        raise DataError(f"{out}: out is of another format, expected {expected}")
    if kind(path) != PARQUET[0] and kind(path) not in DELIMITERS:
        first = next((line for line in lines(path) if not line.isspace()), b"")
        if is_array(first):
            raise DataError(f"{path}: one JSON array, expected JSON lines to filter")


def _ending(path: Path) -> str:
    return kind(path) + ".gz" * (path.suffix == ".gz")


def _number(row: SupportsIndex) -> int:
    if isinstance(row, bool):
        raise TypeError(f"keep contains {row}, expected numbers of rows, not a mask")
    return operator.index(row)  # a TypeError for NumPy's booleans and for floats


def _write_lines(path: Path, kept: set[int], out: Path) -> int:
    """Returns how many rows the file has."""
    number = 0
    with out.open("wb") as plain:
        # Without a name and a time in it, the same rows make the same archive.
        packed = gzip.GzipFile("", "wb", fileobj=plain, mtime=0) if path.suffix == ".gz" else plain
        with packed as file:
            for line in _texts(path, file):
                if number in kept:
                    file.write(line)
                number += 1
    return number


def _texts(path: Path, out: Any) -> Iterator[bytes]:
    """The bytes of each row; writes those that stand before all rows."""
    if kind(path) in DELIMITERS:
        for number, (line, _) in enumerate(records(path)):
            if number:
                yield line
            else:
                out.write(line)
        return
    yield from (line for line in lines(path) if not line.isspace())


def _write_parquet(path: Path, kept: set[int], out: Path) -> int:
    """Returns how many rows the file has."""
    with parquet(path) as source:
        pyarrow = needed("pyarrow", f"{path}: to write Parquet", "pyarrow")
        writer_of = needed("pyarrow.parquet", f"{path}: to write Parquet", "pyarrow").ParquetWriter
        groups = source.metadata.num_row_groups
        codec = source.metadata.row_group(0).column(0).compression if groups else "NONE"
        number = 0
        with writer_of(
            out, source.schema_arrow, compression=codec.replace("UNCOMPRESSED", "NONE")
        ) as writer:
            for group in range(groups):
                with broken(f"{path}, after row {number}"):
                    table = source.read_row_group(group)
                mask = [number + row in kept for row in range(table.num_rows)]
                if any(mask):
                    writer.write_table(table.filter(pyarrow.array(mask)))
                number += table.num_rows
    return number
