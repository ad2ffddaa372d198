"""Chat templates: a conversation as the one text that the model was trained to read.

A template is a stranger's program. It runs in a sandbox, without a clock and without chance, and
whatever it raises becomes one line. One that never ends, or that fills the memory, is not stopped.
"""

import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxpref.data.files import DataError, Messages, RowError, checked, joined

DATE = datetime.date(2024, 7, 26)
"""The day on which templates run that ask for one; the day that Llama 3.1's own template names."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_OPEN = "<<jaxpref: the message goes on here>> "


def render(template: str, variables: Mapping[str, Any], *, date: datetime.date = DATE) -> str:
    """Renders a chat template as Hugging Face does, in a sandbox.

    Args:
      template: in Jinja.
      variables: what it may read, ``messages`` among them.
      date: what ``strftime_now`` tells; midnight, where it is asked for the time.

    Returns:
      The conversation as one text.

    >>> render("{% for m in messages %}[{{ m.content }}]{% endfor %}",
    ...        {"messages": [{"content": "hi"}]})
    '[hi]'
    >>> render("{{ strftime_now('%d %b %Y') }}", {})
    '26 Jul 2024'

    Raises:
      RowError: the template refuses these messages, or fails on them in any other way.
      DataError: the template is broken, whatever the messages.
    """
    program = compiled(template, date)
    try:
        return program.render(variables)
    except Exception as error:  # a stranger's program raises what it likes
        raise RowError(f"chat template: {_said(error)}") from None


@functools.lru_cache(maxsize=16)
def compiled(template: str, date: datetime.date = DATE) -> jinja2.Template:
    """The template as a program.

    Raises:
      DataError: it is no Jinja.
    """
    try:
        return _environment(date).from_string(template)
    except Exception as error:
        raise DataError(f"chat template: {_said(error)}") from None


def conversation(
    template: str,
    messages: Messages,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    date: datetime.date = DATE,
) -> str:
    """The text of a conversation, as transformers' ``apply_chat_template`` gives it.

    Entries of a message that are null are absent, and reasoning has all names that templates know
    it by. Text parts of a content go to a template that reads such parts, and are one text
    for any other, which would print the list; a template that reads nothing but parts gets texts
    as parts.

    Args:
      template: in Jinja.
      messages: each with ``role``, and ``content`` that is a text, null or a list of text parts.
      variables: what else the template may read.
      add_generation_prompt: end with the opening of the assistant's turn.
      continue_final_message: end within the last message, behind its text, as one ends that shall
        go on; no new turn is opened then.
      date: the day that the template is told.

    Returns:
      The conversation as one text.

    Raises:
      RowError: messages of another form, ones that the template refuses, or to be continued and
        without a text at their end.
      DataError: the template is broken.
    """
    said = [_for_template(message, reads(template)) for message in checked(messages)]
    values = {**variables, "add_generation_prompt": add_generation_prompt, "messages": said}
    if not continue_final_message:
        return render(template, values, date=date)
    values["add_generation_prompt"] = False
    content = said[-1].get("content") or ""
    final = content if isinstance(content, str) else content[-1]["text"]
    said[-1] = extended(said[-1], _OPEN)
    text = render(template, values, date=date)
    place = text.rfind(_OPEN.strip())
    if place < 0 or final.strip() not in text:
        raise RowError("chat template: the text of the last message, to be continued, is not there")
    kept = text[place : place + len(_OPEN)] == _OPEN  # else the template trims
    return text[:place] if kept else text[:place].rstrip()


def extended(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The message with a text behind its last one.

    Args:
      message: of a conversation.
      text: what goes on there.

    Returns:
      A new message.

    >>> extended({"role": "assistant", "content": "a"}, "b")["content"]
    'ab'

    Raises:
      RowError: it has no text.
    """
    content = message.get("content")
    if content is None or content == []:
        raise RowError("the last message has no text that could be continued")
    if isinstance(content, str):
        return {**message, "content": content + text}
    *parts, last = content
    return {**message, "content": [*parts, {**last, "text": last["text"] + text}]}


def _for_template(message: Mapping[str, Any], form: str) -> dict[str, Any]:
    thought = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    content = message.get("content")
    if isinstance(content, str) and form == "parts":
        content = [{"type": "text", "text": content}]
    elif isinstance(content, list | tuple) and form == "texts":
        content = joined(content)
    return {**message, **({} if content is None else {"content": content})}


@functools.lru_cache(maxsize=16)
def reads(template: str) -> str:
    """What contents a template reads: ``"texts"``, ``"parts"`` (of lists) or ``"both"``.

    It is tried on one message of each form: a text that it swallows, or a list that it prints, it
    does not read.

    Args:
      template: in Jinja.

    Returns:
      One of the three.

    >>> reads("{% for m in messages %}{{ m.content }}{% endfor %}")
    'texts'

    Raises:
      DataError: the template is broken.
    """
    word = "Aardvark"
    known = dict.fromkeys(["bos_token", "eos_token", "unk_token", "pad_token"], "")

    def shows(content: Any) -> bool:
        values = {"messages": [{"role": "user", "content": content}], "tools": None, **known}
        try:
            text = render(template, values)
        except RowError:
            return False
        return word in text and "'text'" not in text and '"text"' not in text

    if not shows([{"type": "text", "text": word}]):
        return "texts"
    return "both" if shows(word) else "parts"


def _said(error: Exception) -> str:
    """One line of an error, with its name where it is not Jinja's."""
    name = "" if isinstance(error, jinja2.TemplateError) else type(error).__name__
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
    text = text if len(text) <= 300 else f"{text[:300]}..."
    return ": ".join(filter(None, (name, text))) or type(error).__name__


class _Generation(jinja2.ext.Extension):
    """Lets ``{% generation %}`` blocks through; they mark the assistant's text for other uses."""

    tags = {"generation"}  # noqa: RUF012 jinja2's own declaration

    def parse(self, parser: Any) -> Any:
        """The block's body, unchanged, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment(date: datetime.date) -> jinja2.Environment:
    """Jinja as chat templates expect it, but for what is not the same tomorrow."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # noqa: FBT002
        # Jinja's own filter escapes HTML.
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        return json.dumps(x, sort_keys=sort_keys, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = date.strftime
    del environment.filters["random"], environment.globals["lipsum"]
    return environment
