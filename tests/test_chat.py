"""Chat templates: the settings and functions that templates in the wild rely on."""

import datetime

import pytest

from jaxpref.data.chat import render
from jaxpref.data.files import DataError


def test_block_lines_leave_no_trace():
    template = "{% for m in messages %}\n  {% if true %}\n{{ m }}\n  {% endif %}\n{% endfor %}\n"
    assert render(template, {"messages": ["a", "b"]}) == "a\nb\n"


def test_loops_can_break_and_continue():
    template = "{% for i in n %}{% if i == 1 %}{% continue %}{% endif %}"
    template += "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(template, {"n": range(9)}) == "02"


def test_tojson_writes_json_as_it_is():
    assert render("{{ x | tojson }}", {"x": {"a": "<é & '>"}}) == '{"a": "<é & \'>"}'
    assert render("{{ x | tojson(indent=1) }}", {"x": [1]}) == "[\n 1\n]"


def test_generation_marks_are_passed_through_in_a_scope_of_their_own():
    template = "{% set x = 1 %}a{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render(template, {}) == "a21"


def test_a_template_can_ask_for_the_date():
    before, after = (datetime.date.today() for _ in range(2))
    assert render('{{ strftime_now("%Y-%m-%d") }}', {}) in (str(before), str(after))


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ().__class__.__mro__ }}", "unsafe|undefined"),
    ],
)
def test_refusals_broken_templates_and_escapes_are_errors(template, fault):
    with pytest.raises(DataError, match=f"^chat template: .*({fault})"):
        render(template, {"messages": []})
