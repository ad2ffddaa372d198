"""Rows as prompts and responses, in each of the layouts that files have."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxpref.data.files import _columns
from jaxpref.data.files._kinds import TextExample, TextList, TextPair
from jaxpref.data.files._messages import (
    Messages,
    Response,
    are_messages,
    checked,
    decoded,
    joined,
    plain,
)
from jaxpref.data.files._rows import RowError

_ASSISTANT = "\n\nAssistant:"

_Columns = Mapping[str, str | None]


def pair(row: Mapping[str, Any], needs: Sequence[str], columns: _Columns) -> TextPair:
    """A row as a `TextPair`, without its place; see `read_pairs`."""
    _columns.missing(row, ("chosen", "rejected"), columns)
    row = {**row, **{n: decoded(row.get(n), n) for n in ("prompt", "chosen", "rejected")}}
    row |= {n: plain(row[n], n) for n in ("prompt", "chosen", "rejected")}
    fewest = 1 if row["prompt"] is None else 2
    if all(are_messages(row[n]) and len(row[n]) >= fewest for n in ("chosen", "rejected")):
        row = row | _last_messages(row)
    elif fewest == 1:
        row = row | _split(row)
    prompt = _prompt(row)
    chosen, rejected = (_response(row[name], name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError("chosen and rejected are identical, expected two responses")
    tie = _columns.is_tie(row)
    if tie is None and "is_tie" in needs:
        raise RowError(f"no column 'is_tie' or 'tie', found {', '.join(map(repr, row))}")
    if tie and "is_tie" not in needs:
        raise RowError("the two responses are tied, expected a preference")
    return TextPair(
        *_with_columns(row, prompt, chosen, rejected),
        rewards=_columns.pair_rewards(row) if "rewards" in needs else None,
        win_probability=_columns.win_probability(row) if "win_probability" in needs else None,
        is_tie=tie if "is_tie" in needs else None,
    )


def example(row: Mapping[str, Any], needs: Sequence[str], columns: _Columns) -> TextExample:
    """A row as a `TextExample`, without its place."""
    _columns.missing(row, ("prompt", "completion"), columns)
    row = {**row, **{n: plain(decoded(row[n], n), n) for n in ("prompt", "completion")}}
    desirable = None
    if "desirable" in needs:
        _columns.missing(row, ("label",), columns)
        desirable = _columns.label(row["label"], "label")
    response = _response(row["completion"], "completion")
    return TextExample(*_with_columns(row, _prompt(row), response), desirable=desirable)


def listed(row: Mapping[str, Any], needs: Sequence[str], columns: _Columns) -> TextList:
    """A row as a `TextList`, without its place."""
    _columns.missing(row, ("prompt",), columns)
    row = {**row, "prompt": plain(decoded(row["prompt"], "prompt"), "prompt")}
    given = _columns.list_responses(row)
    responses = tuple(_response(x, f"response {i}") for i, x in enumerate(given, start=1))
    rewards = _columns.list_rewards(row, len(given)) if "rewards" in needs else None
    return TextList(*_with_columns(row, _prompt(row), responses), rewards=rewards)


def _with_columns(row: Mapping[str, Any], prompt: str | Messages, *responses: Any) -> tuple:
    """The first fields of a row, with what else belongs to the prompt."""
    _columns.refuse_seen(row)
    tools, more = _columns.tools(row, prompt), _columns.template_kwargs(row, prompt)
    return _columns.system(row, prompt), *responses, "", None, tools, more


def _prompt(row: Mapping[str, Any]) -> str | Messages:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    if not are_messages(prompt):
        found = type(prompt).__name__
        raise RowError(f"prompt is a {found}, expected a text or chat messages")
    return checked(prompt, "prompt")


def _split(row: Mapping[str, Any]) -> dict[str, str]:
    """Prompt and responses of two transcripts."""
    chosen, rejected = row["chosen"], row["rejected"]
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            found = f"{name} is a {type(text).__name__}"
            raise RowError(f"no column 'prompt', and {found}, expected a transcript")
    if chosen == rejected:
        raise RowError("chosen and rejected are identical, expected two transcripts")
    places = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in places if a != b), min(len(chosen), len(rejected)))
    turn = chosen.rfind(_ASSISTANT, 0, shared)
    if turn < 0:
        expected = f"expected transcripts that share a {_ASSISTANT!r} before they differ"
        raise RowError(f"no column 'prompt', and {expected}")
    end = turn + len(_ASSISTANT)
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _last_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt and responses of two conversations."""
    expected = "expected a conversation that ends with the assistant"
    for name in ("chosen", "rejected"):
        if row[name][-1]["role"] != "assistant":
            raise RowError(f"{name} ends with {row[name][-1]['role']!r}, {expected}")
    *prompt, chosen = row["chosen"]
    *other, rejected = row["rejected"]
    if prompt != other:
        raise RowError("chosen and rejected differ before their last message, expected one prompt")
    if not prompt:
        raise RowError(f"no column 'prompt', {expected} and begins with its prompt")
    given = row["prompt"]
    if given is not None and not isinstance(given, str) and given != prompt:
        raise RowError("prompt is not what chosen and rejected begin with")
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def _response(value: Any, name: str) -> Response:
    """A text, or the assistant's message where it holds more than one."""
    value = plain(decoded(value, name), name)
    if are_messages(value) and len(value) == 1 and value[0]["role"] == "assistant":
        (message,) = checked(value, name)
        if message.keys() - {"role", "content"}:
            return cast("Response", message)
        value = joined(message.get("content", ""))
    if not isinstance(value, str):
        expected = "expected a text or one assistant message, or conversations in both columns"
        raise RowError(f"{name} is a {type(value).__name__}, {expected}")
    if not value.strip():
        raise RowError(f"{name} is an empty response, expected at least one character")
    return value
