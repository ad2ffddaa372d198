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


def test_a_template_that_asks_for_the_date_is_told_the_one_that_is_set():
    template = "{{ strftime_now('%Y-%m-%d %H:%M') }}"
    assert render(template, {}) == "2024-07-26 00:00"
    assert render(template, {}, date=datetime.date(2031, 2, 3)) == "2031-02-03 00:00"
    assert render(template, {}) == "2024-07-26 00:00"


def test_a_template_has_no_chance():
    for template in ("{{ [1, 2] | random }}", "{{ lipsum() }}"):
        with pytest.raises(DataError, match=r"^chat template: .*(random|lipsum)"):
            render(template, {})


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
