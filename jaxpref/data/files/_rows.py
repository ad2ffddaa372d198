"""The rows of a file, whatever its format."""

import contextlib
import csv
import gzip
import importlib
import io
import itertools
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARQUET = (".parquet", ".pq")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TFDS = "tfds:"
_MARK = b"\xef\xbb\xbf"  # the byte order mark

Row = tuple[str, dict[str, Any]]


class DataError(ValueError):
    """An input that cannot be used; the message names file, place and fault in one line."""


class RowError(DataError):
    """What one row alone causes: it can be left out, counted and named, and the rest is read."""


def check_text(text: str, name: str = "text") -> None:
    r"""Refuses half of a surrogate pair, which JSON can write and no text holds.

    >>> check_text("\N{GRINNING FACE}")

    Args:
      text: any.
      name: what errors call it.

    Raises:
      RowError: the text has no UTF-8; the message says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!a} at character {error.start}"
        raise RowError(f"{name}: half a surrogate pair, {half}, expected whole signs") from None


def kind(path: str | Path) -> str:
    """The format that a file's name says: ``".parquet"``, ``".csv"``, ``".tsv"`` or ``".jsonl"``.

    >>> [kind(name) for name in ("a.pq", "a.csv.gz", "a.json", "a")]
    ['.parquet', '.csv', '.jsonl', '.jsonl']
    """
    path = Path(path)
    if path.suffix in PARQUET:
        return PARQUET[0]
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return ending if ending in DELIMITERS else ".jsonl"


def rows(path: str | Path) -> Iterator[Row]:
    """Yields the place and the content of every row of a file or of a named data set.

    A name that ends in ``.parquet`` or ``.pq`` is Parquet, one in ``.csv`` or ``.tsv`` a table of
    texts (see `csv_rows`), and their places are ``"FILE, row N"``, counted from 0. ``"tfds:NAME"``
    is a data set of `jaxpref.data.builders`; where there is no such file, ``"org/name"`` is one of
    the Hugging Face hub, see `jaxpref.data.hub.parquet`. Any other file is one of JSON lines, see
    `json_lines`. ``.gz`` at the end of a name of texts is unpacked.

    Raises:
      DataError: a missing, broken or empty file, an unknown data set, or a package that is needed
        for the format and not installed.
    """
    if str(path).startswith(TFDS):
        from jaxpref.data import builders

        return builders.rows(str(path).removeprefix(TFDS))
    from jaxpref.data import hub

    if hub.is_named(path):
        files, _ = hub.parquet(str(path))
        return itertools.chain.from_iterable(map(_parquet_rows, files))
    if kind(path) == PARQUET[0]:
        return _parquet_rows(Path(path))
    return csv_rows(path) if kind(path) in DELIMITERS else json_lines(path)


def json_lines(path: str | Path) -> Iterator[Row]:
    """Yields the place, ``"FILE, line N"``, and the content of every JSON object of a JSONL file.

    Blank lines are ignored but counted, so that N is the editor's line number. A file that ends
    in ``.gz`` is unpacked. A file whose first sign is ``[`` is one array of objects, and its
    places are ``"FILE, row N"`` from 0.

    Raises:
      DataError: a missing file, a broken archive, a line that is not UTF-8 or JSON, a line that
        is not an object, or a file without any object.
    """
    path = existing(path)
    empty = True
    found = enumerate(lines(path), start=1)
    for number, line in found:
        place = f"{path}, line {number}"
        if empty and is_array(line):
            yield from _array(line + b"".join(rest for _, rest in found), path)
            return
        if not line.isspace():
            yield place, _object(_json(line, place), place)
            empty = False
    if empty:
        raise DataError(f"{path}: the file is empty")


def is_array(first: bytes) -> bool:
    """Whether a file of JSON that begins with this line is one array, not lines of objects."""
    return first.removeprefix(_MARK).lstrip()[:1] == b"["


def csv_rows(path: str | Path) -> Iterator[Row]:
    r"""Yields the place, ``"FILE, row N"`` from 0, and the texts of every row of a CSV or TSV file.

    UTF-8, a header of names, and ``"`` around a text that holds a comma, a quote (doubled) or the
    end of a line. Blank lines are ignored.

    Raises:
      DataError: a missing or empty file, bytes that are not UTF-8, a quote that is not closed, a
        name that stands twice in the header, or a row of another number of texts.
    """
    path = existing(path)
    header: list[str] | None = None
    for number, (_, texts) in enumerate(records(path), start=-1):
        if header is None:
            header = texts
            twice(header, path)
            continue
        if len(texts) != len(header):
            expected = f"expected the {len(header)} of the header"
            raise DataError(f"{path}, row {number}: {len(texts)} texts, {expected}")
        yield f"{path}, row {number}", dict(zip(header, texts, strict=True))
    if header is None or number < 0:
        raise DataError(f"{path}: the file is empty")


def records(path: Path) -> Iterator[tuple[bytes, list[str]]]:
    """Yields the bytes and the texts of each record of a CSV or TSV file, the header's first."""
    taken: list[bytes] = []

    def texts() -> Iterator[str]:
        for number, line in enumerate(lines(path), start=1):
            taken.append(line)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None

    if csv.field_size_limit() < sys.maxsize:
        csv.field_size_limit(sys.maxsize)  # of the process: no text is too long to be read
    delimiter = DELIMITERS.get(kind(path), ",")
    found = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        for record in found:
            if record:
                yield b"".join(taken), record
            taken.clear()
    except csv.Error as error:
        raise DataError(f"{path}, line {found.line_num}: not a table of texts ({error})") from None


def twice(names: Iterable[str], path: Path) -> None:
    """Refuses a table with two columns of one name: either could be meant."""
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise DataError(f"{path}: {count} columns are named {name!r}, expected one")


def existing(path: str | Path) -> Path:
    """The path, if a file is there."""
    path = Path(path)
    try:
        found = path.is_file()
    except OSError as error:  # such as a name that is too long
        raise DataError(f"{path}: {error.strerror}") from None
    if not found:
        raise DataError(f"{path}: no such file")
    return path


def lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a text file with their ends, unpacked if it ends in ``.gz``."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield from io.BufferedReader(file) if packed else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def parquet(path: Path) -> Any:
    """An open ``pyarrow.parquet.ParquetFile``."""
    pyarrow = needed("pyarrow", f"{path}: to read Parquet", "pyarrow")
    reader = importlib.import_module("pyarrow.parquet")
    try:
        file = reader.ParquetFile(existing(path))
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({_one_line(error)})") from None
    twice(names, path)
    return file


def needed(module: str, purpose: str, packages: str) -> Any:
    """An optional module, or one line that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{purpose}, run: pip install {packages} ({_one_line(error)})") from None


@contextlib.contextmanager
def broken(place: str) -> Iterator[None]:
    """Names what a broken page or name of Parquet raises, and a date that Python has not."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, OverflowError, RuntimeError) as error:  # Arrow's are ValueErrors
        raise DataError(f"{place}: {_one_line(error)}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    with parquet(path) as file:
        batches = file.iter_batches(batch_size=1024)
        while True:
            with broken(f"{path}, after row {number}"):
                batch = next(batches, None)
                found = [] if batch is None else batch.to_pylist()
            if batch is None:
                break
            for row in found:
                yield f"{path}, row {number}", row
                number += 1
    if number == 0:
        raise DataError(f"{path}: the file is empty")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _json(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error})") from None
    except ValueError:  # what is left to it: more digits than Python turns into a number
        most = sys.get_int_max_str_digits()
        raise DataError(f"{place}: a number of more than {most} digits") from None
    except RecursionError:
        raise DataError(f"{place}: JSON nested too deeply") from None


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, found a {type(row).__name__}")
    return row


def _array(text: bytes, path: Path) -> Iterator[Row]:
    """The rows of a file that is one JSON array."""
    found = _json(text, str(path))
    if not found:
        raise DataError(f"{path}: the file is empty")
    for number, row in enumerate(found):
        yield f"{path}, row {number}", _object(row, f"{path}, row {number}")
