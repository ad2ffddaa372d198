"""What rows are read as: pairs, single examples and lists."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxpref.data.files._messages import Messages, Response

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
