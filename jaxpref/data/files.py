"""Reading JSON lines: one line of error names the file, the line and the fault."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """An input that cannot be used; the message names file, place and fault in one line."""


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every JSON object of a JSONL file with its place, ``"FILE, line N"``.

    Blank lines are passed over but counted, so that N is the editor's line number.

    Raises:
      DataError: a missing file, a line that is not UTF-8 or JSON, a line that is not an object,
        or a file without any object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error.reason})") from None
            except json.JSONDecodeError as error:
                fault = f"{error.msg}, column {error.colno}"
                raise DataError(f"{place}: not valid JSON ({fault})") from None
            if not isinstance(row, dict):
                found = type(row).__name__
                raise DataError(f"{place}: expected a JSON object, found a {found}")
            empty = False
            yield place, row
    if empty:
        raise DataError(f"{path}: the file is empty")
