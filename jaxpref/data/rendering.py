"""Where rows become texts: what a model reads before a response, and what it would write."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxpref.data import chat
from jaxpref.data.files import (
    DataError,
    Response,
    RowError,
    TextExample,
    TextList,
    TextRow,
    check_text,
    joined,
)
from jaxpref.data.tokenizer import Tokenizer

# What `Tokenizer.chat` and transformers' `apply_chat_template` take for themselves.
_RESERVED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "date",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "tools",
    "truncation",
}  # fmt: skip


class Texts(NamedTuple):
    """The texts of one row.

    Attributes:
      prompt: what stands before the responses.
      wholes: the prompt with each response.
      closed: whether each whole ends with an end token of its own.
      is_chat: whether a chat template made them: then it has also written the BOS, if there is one.
    """

    prompt: str
    wholes: tuple[str, ...]
    closed: tuple[bool, ...]
    is_chat: bool


class Ends(NamedTuple):
    """Texts of the tokens that may close a response.

    Attributes:
      of_chats: those that count where a template rendered the response.
      of_texts: those that count at the end of a response of text, which gets no second one.
    """

    of_chats: tuple[str, ...]
    of_texts: tuple[str, ...]


def ends_of(tokenizer: Tokenizer, end: int | None, *, is_eos: bool, date: datetime.date) -> Ends:
    """What counts as the end of a response.

    A template may close its turn with any special token. A response of text is closed by `end`
    and, where that is the tokenizer's EOS, also by the token that closes the template's turns.

    Args:
      tokenizer: the model's.
      end: id of the end token, or None.
      is_eos: whether that is the tokenizer's EOS because the caller asked for it.
      date: the day that a template is told.

    Returns:
      The texts of the tokens.
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    own = [added[end].content] if end in added else []
    turn = _turn_end(tokenizer, [token.content for token in added.values()], date)
    special = [token.content for token in added.values() if token.special]
    known = {*special, *own, *turn}
    return Ends(_texts(known), _texts([*own, *turn] if is_eos else own))


def _texts(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token.strip())


def _turn_end(tokenizer: Tokenizer, added: Sequence[str], date: datetime.date) -> list[str]:
    """The token that the template writes behind an assistant's answer, if it writes one."""
    if tokenizer.template is None:
        return []
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    try:
        text = tokenizer.chat(messages, add_generation_prompt=False, date=date).rstrip()
    except DataError:
        return []
    return [max(found, key=len)] if (found := [x for x in added if text.endswith(x)]) else []


def texts_of(row: TextRow, tokenizer: Tokenizer, ends: Ends, date: datetime.date) -> Texts:
    """The texts of a row.

    A prompt of text is followed by the response as it stands. A prompt of messages is rendered by
    the template, and so is the conversation with the response as its last message, or as the rest
    of the last one where that is the assistant's already; what follows the prompt is the response.
    White space behind the token that closes a response is left out: no model is asked for it.

    Args:
      row: prompt and responses.
      tokenizer: the model's.
      ends: of `ends_of`.
      date: the day that a template is told.

    Returns:
      The prompt, and the prompt with each response.

    Raises:
      RowError: the template refuses the row, or its rendering of the prompt is no beginning of
        that of the conversation; half a surrogate pair; a response of text that begins with a BOS;
        a message as the response to a prompt of text.
    """
    responses = _responses(row)
    if isinstance(row.prompt, str):
        _check_texts(row, responses, tokenizer)
        found = [_closed(row.prompt, row.prompt + str(x), ends.of_texts) for x in responses]
        prompt = row.prompt
    else:
        prompt = _rendered(row, None, tokenizer, date)
        found = [_whole(row, x, prompt, tokenizer, ends, date) for x in responses]
    wholes, closed = zip(*found, strict=True)
    for text in (prompt, *wholes):
        check_text(text)
    return Texts(prompt, wholes, closed, not isinstance(row.prompt, str))


def _responses(row: TextRow) -> tuple[Response, ...]:
    if isinstance(row, TextExample):
        return (row.response,)
    return row.responses if isinstance(row, TextList) else (row.chosen, row.rejected)


def _check_texts(row: TextRow, responses: Sequence[Response], tokenizer: Tokenizer) -> None:
    bos, eos = (tokenizer.special.get(name) for name in ("bos_token", "eos_token"))
    for response in responses:
        if not isinstance(response, str):
            more = ", ".join(sorted(response.keys() - {"role", "content"}))
            raise RowError(f"response: a message with {more}, expected messages as its prompt")
        if bos and bos != eos and row.prompt and response.startswith(bos):
            raise RowError(f"response: begins with {bos!r}, expected that before the prompt alone")
    if row.tools or row.template_kwargs:
        raise RowError("prompt: a text with tools or template_kwargs, expected messages")


def _closed(prompt: str, whole: str, ends: tuple[str, ...]) -> tuple[str, bool]:
    """Whether an end token closes the response, and the text without white space behind it."""
    stripped = whole.rstrip()
    closed = stripped.endswith(ends) and len(stripped) > len(prompt)
    return (stripped, True) if closed else (whole, False)


def _whole(
    row: TextRow,
    response: Response,
    prompt: str,
    tokenizer: Tokenizer,
    ends: Ends,
    date: datetime.date,
) -> tuple[str, bool]:
    """A conversation's text, and whether an end token closes it."""
    rendered = _rendered(row, response, tokenizer, date)
    if not rendered.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b),
                  len(rendered))  # fmt: skip
        ours, theirs = prompt[at : at + 24], rendered[at : at + 24]
        differ = f"at character {at}, {ours!r} and then {theirs!r}"
        raise RowError(f"chat template: with the response the prompt is another, {differ}")
    whole, closed = _closed(prompt, rendered, ends.of_chats)
    content = response if isinstance(response, str) else joined(response.get("content") or "")
    again = next((x for x in ends.of_chats if closed and content.rstrip().endswith(x)), None)
    if again and whole.endswith(again) and whole.removesuffix(again).rstrip().endswith(again):
        cut = content.rstrip().removesuffix(again)
        response = cut if isinstance(response, str) else {**response, "content": cut}
        return _whole(row, response, prompt, tokenizer, ends, date)
    return whole, closed


def _rendered(
    row: TextRow, response: Response | None, tokenizer: Tokenizer, date: datetime.date
) -> str:
    """The template's text of the prompt, ready for a response, or of the whole conversation."""
    given: dict[str, Any] = dict(row.template_kwargs or {})
    taken = sorted(_RESERVED & given.keys())
    if taken:
        raise RowError(f"chat_template_kwargs: {taken[0]!r} is not the template's to be given")
    messages = list(row.prompt) if not isinstance(row.prompt, str) else []
    goes_on = bool(messages) and messages[-1].get("role") == "assistant"
    if response is not None:
        messages = _with_response(messages, response) if goes_on else [*messages, _said(response)]
    return tokenizer.chat(
        messages,
        add_generation_prompt=response is None and not goes_on,
        continue_final_message=response is None and goes_on,
        tools=row.tools,
        date=date,
        **given,
    )


def _said(response: Response) -> dict[str, Any]:
    return {"role": "assistant", "content": response} if isinstance(response, str) else {**response}


def _with_response(messages: list[Any], response: Response) -> list[Any]:
    if not isinstance(response, str):
        raise RowError("response: a message, but the prompt ends within one of the assistant")
    return [*messages[:-1], chat.extended(messages[-1], response)]
