"""Rows as preferences: a prompt and its responses, in each of the layouts that files have."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from jaxpref.data.files import _columns
from jaxpref.data.files._messages import (
    Messages,
    Response,
    are_messages,
    checked,
    decoded,
    joined,
    plain,
)
from jaxpref.data.files._rows import DataError, Row, RowError, rows

_ASSISTANT = "\n\nAssistant:"

Kind = Literal["pairs", "examples", "lists"]
Bad = Literal["error", "drop"]
NEEDS = {
    "pairs": ("rewards", "win_probability", "is_tie"),
    "examples": ("desirable",),
    "lists": ("rewards",),
}
"""What losses need beside the texts, by the kind of row that holds it."""


class TextPair(NamedTuple):
    """One row of a data set: a prompt, the preferred and the dispreferred response.

    Attributes:
      prompt: text as the model reads it, or messages for the model's chat template.
      chosen: the preferred response: a text, or the assistant's message where it holds more, such
        as tool calls.
      rejected: the other one.
      place: where the row stands, for errors: ``"FILE, line N"``.
      row: the row's number in its file, counted from 0 without blank lines, as `filter_file`
        takes it; None for a pair that no file holds.
      tools: what the chat template shows as tools, or None.
      template_kwargs: further variables of the chat template, or None.
      rewards: of the chosen and the rejected response, where they were asked for.
      win_probability: of each response, from 0 to 1, where it was asked for.
      is_tie: whether the two were judged alike, where that was asked for.
    """

    prompt: str | Messages
    chosen: Response
    rejected: Response
    place: str = ""
    row: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    rewards: tuple[float, float] | None = None
    win_probability: tuple[float, float] | None = None
    is_tie: bool | None = None


class TextExample(NamedTuple):
    """One row of a data set: a prompt and one response, with a label or without.

    Attributes:
      prompt: as in `TextPair`, like `place`, `row`, `tools` and `template_kwargs`.
      response: as a response of `TextPair`.
      desirable: the label, where it was asked for.
    """

    prompt: str | Messages
    response: Response
    place: str = ""
    row: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    desirable: bool | None = None


class TextList(NamedTuple):
    """One row of a data set: a prompt and any number of responses.

    Attributes:
      prompt: as in `TextPair`, like `place`, `row`, `tools` and `template_kwargs`.
      responses: each as a response of `TextPair`, in the file's order.
      rewards: one for each response, larger for a better one, where they were asked for.
    """

    prompt: str | Messages
    responses: tuple[Response, ...]
    place: str = ""
    row: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    rewards: tuple[float, ...] | None = None


TextRow = TextPair | TextExample | TextList


class Found(NamedTuple):
    """What `read` made of a file.

    Attributes:
      rows: those that can be used, in the file's order.
      faults: a line for each row that was left out, with its place.
    """

    rows: list[Any]
    faults: list[str]


def read(
    source: str | Path | Iterable[Row],
    kind: Kind = "pairs",
    *,
    bad: Bad = "error",
    columns: Mapping[str, str | None] | None = None,
    needs: Sequence[str] = (),
) -> Found:
    """The rows of a file as pairs, single examples or lists; `read_pairs` tells the layouts.

    Args:
      source: a file or ``"tfds:NAME"``, see `rows`; or the place and the content of each row.
      kind: ``"pairs"`` gives `TextPair`, ``"examples"`` `TextExample` of the columns ``prompt``,
        ``completion`` and ``label``, ``"lists"`` `TextList` of ``prompt`` and ``responses``.
      bad: what happens to a row that cannot be used, whatever is wrong with it alone: ``"error"``
        raises, ``"drop"`` leaves it out and keeps the reason. A file that cannot be read raises.
      columns: names in the file by this package's: ``{"chosen": "good"}`` reads ``good`` as
        ``chosen``. None as a name leaves a column unread.
      needs: what each row must give beside texts, of `NEEDS`. Columns are: of pairs, for
        ``rewards`` ``chosen_score`` and ``rejected_score`` (or ``score_chosen``, or ``_reward``, or
        ``_rating``), ``win_probability`` of the chosen (or ``chosen_probs_win`` and
        ``chosen_probs_lose``), ``is_tie`` or ``tie``; of examples, ``label`` for ``desirable``; of
        lists, for ``rewards`` ``rewards``, ``scores`` or ``ranks``.

    Returns:
      The rows and the faults of those that were left out.

    Raises:
      RowError: a row that cannot be used, under ``"error"``.
      DataError: a file that cannot be read, a name of `columns` that no row has, or no row that
        can be used.
      ValueError: another `kind`, `bad`, name of a column or need.

    >>> kto = {"prompt": "1+1=", "completion": "2", "label": True}
    >>> read([("here", kto)], "examples", needs=["desirable"]).rows[0].desirable
    True
    """
    columns = {} if columns is None else columns
    if kind not in NEEDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, NEEDS))}")
    if bad not in ("error", "drop"):
        raise ValueError(f"bad is {bad!r}, expected 'error' or 'drop'")
    for name, known in [
        *((n, _columns.NAMES) for n in columns),
        *((n, NEEDS[kind]) for n in needs),
    ]:
        if name not in known:
            what = "needs" if known is NEEDS[kind] else "columns"
            raise ValueError(f"{what} names {name!r}, expected some of {', '.join(known)}")
    make = {"pairs": _pair, "examples": _example, "lists": _list}[kind]
    found, faults, seen = [], [], set()
    content = rows(source) if isinstance(source, str | Path) else source
    for number, (place, row) in enumerate(content):
        try:
            known = _columns.renamed(row, columns, seen)
            found.append(make(known, needs, columns)._replace(place=place, row=number))
        except RowError as fault:
            if bad == "error":
                raise RowError(f"{place}: {fault}") from None
            faults.append(f"{place}: {fault}")
    for ours, name in columns.items():
        if name is not None and name not in seen:
            where = f"{source}: " if isinstance(source, str | Path) else ""
            raise DataError(f"{where}no row has the column {name!r}, given for {ours!r}")
    if not found:
        first = f"; the first: {faults[0]}" if faults else ""
        raise DataError(f"no row is left with bad='drop'{first}")
    return Found(found, faults)


def read_pairs(
    path: str | Path,
    *,
    bad: Bad = "error",
    columns: Mapping[str, str | None] | None = None,
    needs: Sequence[str] = (),
) -> list[TextPair]:
    r"""The pairs of a file with the columns ``chosen`` and ``rejected``.

    The rows have one of these layouts.

    - ``prompt`` and two responses. Each is a text; a prompt may also be a list of chat messages
      (objects with ``role`` and ``content``), and a response a list of one message of the
      assistant.
    - Two conversations, lists of chat messages as in UltraFeedback-binarized. The last message,
      the assistant's, is the response; those before it are the prompt, and the same in both. A
      text in the column ``prompt`` is then not read, messages in it must be those.
    - Two transcripts as in HH-RLHF, without ``prompt``, of turns that begin with
      ``"\n\nHuman:"`` and ``"\n\nAssistant:"``. The prompt ends with the last assistant's
      ``"\n\nAssistant:"`` before the first character in which the two differ. A response is all
      that follows, with its leading space, and with further turns where transcripts part early.

    To a prompt of messages belong the columns ``system``, ``tools`` and ``chat_template_kwargs``;
    with a prompt of text, or with pictures or sound, a row is refused. Other columns are not read.

    Args:
      path: the file. One that ends in ``.gz`` is unpacked, ``.parquet`` or ``.pq`` is Parquet,
        ``.csv`` or ``.tsv`` a table; ``"tfds:NAME"`` is a data set of `jaxpref.data.builders`.
      bad: what happens to a row that cannot be used: ``"error"`` raises, ``"drop"`` leaves it out.
      columns: names in the file by this package's, see `read`.
      needs: what each row must give beside texts, see `read`.

    Returns:
      The pairs in the file's order, each with its place and its row.

    Raises:
      RowError: under ``"error"`` a row without two different responses, with a missing column, or
        with another type in one that is read.
      DataError: a file that cannot be read or is empty, or no row that can be used.

    References:
      Bai et al. 2022, https://arxiv.org/abs/2204.05862 (HH-RLHF, its files' format)
      Tunstall et al. 2023, https://arxiv.org/abs/2310.16944 (UltraFeedback-binarized)
    """
    return read(path, bad=bad, columns=columns, needs=needs).rows


def pairs_of(found: Iterable[Row], *, bad: Bad = "error") -> list[TextPair]:
    """The pairs of rows that were read already, see `read_pairs`.

    Args:
      found: the place and the content of each row, all of them and in order.
      bad: what happens to a row that cannot be used.

    Returns:
      The pairs in the same order.

    Raises:
      DataError: as `read_pairs`.

    >>> pairs_of([("here", {"prompt": "1+1=", "chosen": "2", "rejected": "3"})])[0][:5]
    ('1+1=', '2', '3', 'here', 0)
    """
    return read(found, bad=bad).rows


_Columns = Mapping[str, str | None]


def _pair(row: Mapping[str, Any], needs: Sequence[str], columns: _Columns) -> TextPair:
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


def _example(row: Mapping[str, Any], needs: Sequence[str], columns: _Columns) -> TextExample:
    _columns.missing(row, ("prompt", "completion"), columns)
    row = {**row, **{n: plain(decoded(row[n], n), n) for n in ("prompt", "completion")}}
    desirable = None
    if "desirable" in needs:
        _columns.missing(row, ("label",), columns)
        desirable = _columns.label(row["label"], "label")
    response = _response(row["completion"], "completion")
    return TextExample(*_with_columns(row, _prompt(row), response), desirable=desirable)


def _list(row: Mapping[str, Any], needs: Sequence[str], columns: _Columns) -> TextList:
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
