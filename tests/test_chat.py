"""Chat templates: the settings and functions that templates in the wild rely on."""

import datetime

import pytest

from jaxpref.data.chat import conversation, render
from jaxpref.data.files import DataError, RowError


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


def said(template, message, **options):
    return conversation(template, [{"role": "assistant", **message}], {}, **options)


def test_a_message_that_goes_on_opens_no_other():
    template = "{{ '>' if add_generation_prompt }}{{ messages[0].content }}."
    assert said(template, {"content": "so "}) == ">so ."
    assert said(template, {"content": "so "}, continue_final_message=True) == "so "
    with pytest.raises(RowError, match="the last message has no text that could be continued"):
        said(template, {"content": None}, continue_final_message=True)
    with pytest.raises(RowError, match="the text of the last message, to be continued, is not the"):
        said("{{ messages[0].role }}", {"content": "so"}, continue_final_message=True)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_know(name):
    template = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    assert said(template, {"content": "", name: "hm"}) == "hmhm"
    assert said(template, {"content": "", name: None}) == ""
