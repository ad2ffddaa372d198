"""Reading pairs from JSON lines: one line of error names the file, the line and the fault."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Messages = Sequence[Mapping[str, Any]]


class DataError(ValueError):
    """An input that cannot be used; the message names file, place and fault in one line."""


class TextPair(NamedTuple):
    """One row of a data set: a prompt, the preferred and the dispreferred response.

    Attributes:
      prompt: text as the model reads it, or messages for the model's chat template.
      chosen: the preferred response.
      rejected: the other one.
      place: where the row stands, for errors: ``"FILE, line N"``.
    """

    prompt: str | Messages
    chosen: str
    rejected: str
    place: str = ""


def read_pairs(path: str | Path) -> list[TextPair]:
    """The pairs of a JSONL file with the columns ``prompt``, ``chosen`` and ``rejected``.

    Each is a text. A prompt may be a list of chat messages (objects with ``role`` and
    ``content``), and a response a list of one message of the assistant. Other columns are
    ignored.

    Raises:
      DataError: broken JSON, a missing column, a wrong type, a response without a visible
        character, two identical responses, an empty file.
    """
    return [_text_pair(row, place) for place, row in json_lines(path)]


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place, ``"FILE, line N"``, and the content of every JSON object of a JSONL file.

    Blank lines are ignored but counted, so that N is the editor's line number.

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
            if not line.isspace():
                place = f"{path}, line {number}"
                yield place, _object(line, place)
                empty = False
    if empty:
        raise DataError(f"{path}: the file is empty")


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error.reason})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, found a {type(row).__name__}")
    return row


def _text_pair(row: Mapping[str, Any], place: str) -> TextPair:
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            raise DataError(f"{place}: no column {name!r}, found {', '.join(map(repr, row))}")
    prompt = row["prompt"]
    if not isinstance(prompt, str) and not _are_messages(prompt):
        found = type(prompt).__name__
        raise DataError(f"{place}: prompt is a {found}, expected a text or chat messages")
    chosen, rejected = (_response(row[name], name, place) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{place}: chosen and rejected are identical, expected two responses")
    return TextPair(prompt, chosen, rejected, place)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


def _response(value: Any, name: str, place: str) -> str:
    if _are_messages(value) and len(value) == 1 and value[0]["role"] == "assistant":
        value = value[0]["content"]
    if not isinstance(value, str):
        found = type(value).__name__
        raise DataError(f"{place}: {name} is a {found}, expected a text or one assistant message")
    if not value.strip():
        raise DataError(f"{place}: {name} is an empty response, expected at least one character")
    return value
