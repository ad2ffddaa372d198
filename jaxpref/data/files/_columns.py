"""Columns beside the texts: what belongs to the prompt, and the numbers that losses need."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.data.files._messages import plain
from jaxpref.data.files._rows import RowError

REWARDS = (
    ("chosen_score", "rejected_score"),
    ("score_chosen", "score_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("chosen_rating", "rejected_rating"),
)
WINS = ("chosen_probs_win", "chosen_probs_lose")
SEEN = ("images", "image", "videos", "video", "audio", "audios")  # what no text can stand for
NAMES = (
    "prompt", "chosen", "rejected", "completion", "label", "responses", "completions", "system",
    "tools", "chat_template_kwargs", "rewards", "scores", "ranks", "win_probability", "is_tie",
    "tie", *WINS, *(name for pair in REWARDS for name in pair), *SEEN,
)  # fmt: skip
"""All columns that some reader reads."""


def renamed(
    row: Mapping[str, Any], columns: Mapping[str, str | None], found: set[str]
) -> dict[str, Any]:
    """The row under this package's names; notes which of the file's names were there."""
    given = {name for name in columns.values() if name is not None}
    found |= given & row.keys()
    left = {k: v for k, v in row.items() if k not in given and k not in columns}
    named = {ours: row[name] for ours, name in columns.items() if name is not None and name in row}
    return left | named


def is_absent(row: Mapping[str, Any], name: str) -> bool:
    """Whether there is no such column, or a null in it, or the empty text of a table of texts."""
    return row.get(name) is None or row[name] == ""


def system(row: Mapping[str, Any], prompt: Any) -> Any:
    """The prompt with the text of the column ``system`` as its first message.

    Raises:
      RowError: no text, a prompt of text, or another system message that is there already.
    """
    if is_absent(row, "system"):
        return prompt
    text = row["system"]
    if not isinstance(text, str):
        raise RowError(f"system is a {type(text).__name__}, expected a text")
    _of_conversation("system", prompt)
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": text}, *prompt]
    if prompt[0].get("content") != text:
        raise RowError("system is not the system message that the prompt begins with")
    return prompt


def tools(row: Mapping[str, Any], prompt: Any) -> list[dict[str, Any]] | None:
    """The list of tools, given as such or as JSON text; None where there is none.

    Raises:
      RowError: anything else, or tools beside a prompt of text.
    """
    value = _value(row, "tools")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools: expected a list of objects, or its JSON text")
    if value:
        _of_conversation("tools", prompt)
    return value


def template_kwargs(row: Mapping[str, Any], prompt: Any) -> dict[str, Any] | None:
    """The variables for the chat template, an object or its JSON text; None where there are none.

    Raises:
      RowError: anything else, or variables beside a prompt of text.
    """
    value = _value(row, "chat_template_kwargs")
    if not value and value in (None, {}):
        return None
    if not isinstance(value, dict):
        raise RowError("chat_template_kwargs: expected an object, or its JSON text")
    _of_conversation("chat_template_kwargs", prompt)
    return value


def refuse_seen(row: Mapping[str, Any]) -> None:
    """Refuses a prompt of pictures or sound, which would be scored without them."""
    for name in SEEN:
        if not is_absent(row, name) and row[name] not in ([], {}):
            raise RowError(f"{name}: more than text belongs to this prompt, expected text alone")


def _of_conversation(name: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        expected = f"expected messages, or columns={{{name!r}: None}} to leave it out"
        raise RowError(f"{name} belongs to a conversation, but prompt is a text; {expected}")


def _value(row: Mapping[str, Any], name: str) -> Any:
    """A column of structure, of its JSON text where it is one."""
    if is_absent(row, name):
        return None
    value = row[name]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{name} is a text, but no JSON") from None
    return plain(value, name)


def pair_rewards(row: Mapping[str, Any]) -> tuple[float, float]:
    """Rewards of the chosen and the rejected response.

    Raises:
      RowError: none, or two kinds of scores that say different things.
    """
    found = [pair for pair in REWARDS if not any(is_absent(row, name) for name in pair)]
    if not found:
        names = " or ".join(f"{a!r} and {b!r}" for a, b in REWARDS)
        raise RowError(f"no columns {names} for rewards, {_there(row)}")
    values = [(number(row[a], a), number(row[b], b)) for a, b in found]
    if any(value != values[0] for value in values):
        raise RowError(f"rewards stand in {found[0][0]!r} and in {found[1][0]!r}, expected one")
    return values[0]


def win_probability(row: Mapping[str, Any]) -> tuple[float, float]:
    """Probabilities that the chosen and the rejected response win.

    Raises:
      RowError: none, or a number outside [0, 1].
    """
    if not is_absent(row, "win_probability"):
        first = _probability(row["win_probability"], "win_probability")
        return first, 1.0 - first
    for name in WINS:
        if is_absent(row, name):
            raise RowError(
                f"no column 'win_probability', nor {WINS[0]!r} and {WINS[1]!r}, {_there(row)}"
            )
    win, lose = (_probability(row[name], name) for name in WINS)
    return win, lose


def is_tie(row: Mapping[str, Any]) -> bool | None:
    """Whether the two responses were judged alike; None where no column says."""
    name = "tie" if is_absent(row, "is_tie") else "is_tie"
    return None if is_absent(row, name) else label(row[name], name)


def list_rewards(row: Mapping[str, Any], responses: int) -> tuple[float, ...]:
    """Rewards of a list of responses; a rank, 1 the best, is the reward of minus itself.

    Raises:
      RowError: none, not one for each response, or no numbers.
    """
    for name, sign in (("rewards", 1.0), ("scores", 1.0), ("ranks", -1.0)):
        value = _value(row, name)
        if value is None:
            continue
        if not isinstance(value, list) or len(value) != responses:
            found = len(value) if isinstance(value, list) else f"a {type(value).__name__}"
            raise RowError(f"{name}: got {found}, expected one for each of {responses} responses")
        return tuple(sign * number(x, name) for x in value)
    raise RowError(f"no column 'rewards', 'scores' or 'ranks', {_there(row)}")


def list_responses(row: Mapping[str, Any]) -> list[Any]:
    """The responses of a list, in the column ``responses`` or ``completions``.

    Raises:
      RowError: no such column, or no list in it.
    """
    name = "completions" if is_absent(row, "responses") else "responses"
    value = _value(row, name)
    if value is None:
        raise RowError(f"no column 'responses' or 'completions', {_there(row)}")
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is a {type(value).__name__}, expected a list of responses")
    return value


def number(value: Any, name: str) -> float:
    """A finite number, or the text of one.

    Raises:
      RowError: anything else.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowError(f"{name} is {_short(value)}, expected a finite number")
    return found


def label(value: Any, name: str) -> bool:
    """True or false, 1 or 0, or the text of one of these.

    Raises:
      RowError: anything else.
    """
    known = {"true": True, "1": True, "false": False, "0": False}
    text = str(value).strip().lower()
    if not isinstance(value, str | bool | int) or text not in known:
        raise RowError(f"{name} is {_short(value)}, expected true or false")
    return known[text]


def _probability(value: Any, name: str) -> float:
    found = number(value, name)
    if not 0 <= found <= 1:
        raise RowError(f"{name} is {found}, expected a number from 0 to 1")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _there(row: Mapping[str, Any]) -> str:
    return f"found {', '.join(map(repr, row))}"


def missing(
    row: Mapping[str, Any], names: Sequence[str], columns: Mapping[str, str | None]
) -> None:
    """Refuses a row without these columns, by the file's names of them."""
    for name in names:
        if name not in row:
            theirs = columns.get(name) or name
            meant = f" for {name}" if theirs != name else ""
            raise RowError(f"no column {theirs!r}{meant}, {_there(row)}")
