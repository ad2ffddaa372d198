"""Chat templates: a conversation as the one text that the model was trained to read."""

import datetime
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxpref.data.files import DataError


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Renders a chat template as Hugging Face does, in a sandbox.

    Args:
      template: in Jinja.
      variables: what it may read, ``messages`` among them.

    Returns:
      The conversation as one text.

    >>> render("{% for m in messages %}[{{ m.content }}]{% endfor %}",
    ...        {"messages": [{"content": "hi"}]})
    '[hi]'

    Raises:
      DataError: the template is broken or refuses these messages.
    """
    try:
        return _environment().from_string(template).render(variables)
    except jinja2.TemplateError as error:
        raise DataError(f"chat template: {error}") from None


class _Generation(jinja2.ext.Extension):
    """Lets ``{% generation %}`` blocks through; they mark the assistant's text for other uses."""

    tags = {"generation"}  # noqa: RUF012 jinja2's own declaration

    def parse(self, parser: Any) -> Any:
        """The block's body, unchanged, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it, in the sandbox: a template is a stranger's program."""

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
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
