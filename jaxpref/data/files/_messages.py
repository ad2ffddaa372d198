"""Chat messages as files hold them: plain values, checked before any template sees them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.files._rows import RowError

Messages = Sequence[Mapping[str, Any]]
Response = str | Mapping[str, Any]


def plain(value: Any, name: str) -> Any:
    """A JSON value without the nulls of its objects: a null is an absent entry.

    Parquet stores an entry that only other rows have as null, so the two must mean the same.

    Raises:
      RowError: bytes, dates and all else that JSON has not, or lists nested without measure.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    try:
        if isinstance(value, Mapping):
            return {str(k): plain(v, name) for k, v in value.items() if v is not None}
        if isinstance(value, list | tuple):
            return [plain(v, name) for v in value]
    except RecursionError:
        raise RowError(f"{name} is nested too deeply") from None
    raise RowError(f"{name} holds a {type(value).__name__}, expected what JSON can hold")


def are_messages(value: Any) -> bool:
    """Whether a value is a list of objects with roles."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def decoded(value: Any, name: str) -> Any:
    """Messages of a text that is a JSON list of them, as tables of texts hold them; else itself.

    Raises:
      RowError: the text is Python's way to write such a list.
    """
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        if value.lstrip().startswith("[{'") and "'role'" in value:
            raise RowError(f"{name} is a list as Python prints it, expected JSON") from None
        return value
    return found if are_messages(found) else value


def checked(messages: Messages, name: str = "messages") -> list[dict[str, Any]]:
    """Messages whose roles are texts, and whose contents are texts or lists of text parts.

    A content of null is absent, as where an assistant only calls tools.

    Args:
      messages: objects with ``role`` and ``content``.
      name: what errors call them.

    Returns:
      The messages without their nulls.

    Raises:
      RowError: any other role or content, by the message's number from 1.
    """
    if not are_messages(messages):
        found = "no message" if messages in ([], ()) else f"a {type(messages).__name__}"
        raise RowError(f"{name}: {found}, expected a list of objects with 'role' and 'content'")
    found = []
    for number, message in enumerate(messages, start=1):
        place = f"{name}: message {number}"
        if not isinstance(message["role"], str):
            role = type(message["role"]).__name__
            raise RowError(f"{place}: role is a {role}, expected a text")
        _check_content(message.get("content"), place)
        found.append({key: value for key, value in message.items() if value is not None})
    return found


def _check_content(content: Any, place: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        expected = "expected a text, null or a list of text parts"
        raise RowError(f"{place}: content is a {type(content).__name__}, {expected}")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise RowError(f"{place}: content holds a part of type {kind!r}, expected text parts")


def joined(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a content: its parts one after another, with nothing between.

    >>> joined([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])
    'a b'
    """
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
