"""Conversations and texts: what is scored as the response, and what closes it."""

import dataclasses
import datetime

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxpref.data import pairs
from jaxpref.data.files import DataError, RowError, TextExample, TextList, TextPair
from jaxpref.data.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<turn>", "<end>"]
VOCAB = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
CHATML = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "q"}
CALL = {"function": {"name": "f"}}


@pytest.fixture(scope="module")
def plain():
    """A token a character."""
    vocab = {token: i for i, token in enumerate(VOCAB)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, adds_bos=True)


def responses(row, tokenizer, *, end="eos", **options):
    """The text of each response as it is scored, and what stands before the first."""
    (pair,), _ = pairs.encode([row], tokenizer, end=end, **options)
    ids = [tokens.tolist() for tokens in pair.tokens]
    texts = [tokenizer.decode(t[s:]) for t, s in zip(ids, pair.starts, strict=True)]
    return [tokenizer.decode(ids[0][: pair.starts[0]]), *texts]


def with_template(tokenizer, template):
    return dataclasses.replace(tokenizer, template=template)


def fault(row, tokenizer, *, end="eos", **options):
    with pytest.raises(RowError) as caught:
        pairs.encode([row], tokenizer, end=end, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The assistant's turn is the template's


@pytest.mark.parametrize(
    ("template", "prompt", "before", "after"),
    [
        # The white space behind the end of the turn is not scored: no model is asked for it.
        (CHATML, [USER], "<turn>user\nq<end>\n<turn>assistant\n", "{}<end>"),
        # As in Llama 2: a space before, one behind, and the EOS. The BOS is the template's.
        (
            "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]"
            "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
            [USER],
            "<s>[q]",
            " {} </s>",
        ),
        # As in Qwen3: an empty thought belongs to the answer.
        (
            "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}"
            "(thought)\n{% endif %}{{ m.content }}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}<turn>assistant\n{% endif %}",
            [USER],
            "<turn>user\nq<end>\n<turn>assistant\n",
            "(thought)\n{}<end>",
        ),
        # Nothing closes the turn: then the option does.
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}", [USER], "user:qassistant:",
         "{}</s>"),
        # A prompt that ends within the assistant's message goes on.
        (
            CHATML,
            [USER, {"role": "assistant", "content": "so "}],
            "<turn>user\nq<end>\n<turn>assistant\nso ",
            "{}<end>",
        ),
        # Of a template that trims, the space before the response is the response's.
        (
            CHATML.replace("m.content", "m.content | trim"),
            [USER, {"role": "assistant", "content": "so "}],
            "<turn>user\nq<end>\n<turn>assistant\nso",
            " {}<end>",
        ),
    ],
)  # fmt: skip
def test_a_response_is_what_the_template_writes_behind_the_prompt(
    plain, template, prompt, before, after
):
    row = TextPair(prompt, "yes", "no")
    found = responses(row, with_template(plain, template))
    assert found == [before, after.format("yes"), after.format("no")]


def test_a_prompt_that_is_no_beginning_is_refused_with_the_first_difference(plain):
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n(think){% endif %}")
    found = fault(TextPair([USER], "yes", "no", "F, line 7"), with_template(plain, template))
    place = len("<turn>user\nq<end>\n<turn>assistant\n")
    assert found.startswith("F, line 7: chat template: with the response the prompt is another, at")
    assert found.endswith(f"character {place}, '(think)' and then 'yes<end>\\n'")


def test_the_response_may_call_tools(plain):
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson }}")
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = TextPair([USER], called, {**called, "tool_calls": []})
    template = template.replace("{{ m.content }}{{", "{{ m.content or '' }}{{")
    template = template.replace("m.tool_calls |", "(m.tool_calls or 0) |")
    found = responses(row, with_template(plain, template))
    assert found[1:] == ['[{"function": {"name": "f"}}]<end>', "0<end>"]
    assert "message with tool_calls" in fault(row._replace(prompt="q"), plain)


# The end of a response


@pytest.mark.parametrize(
    ("end", "response", "scored", "ends"),
    [
        ("eos", "yes", "yes</s>", 1),
        ("eos", "yes</s>", "yes</s>", 1),  # once
        ("eos", "yes</s>\n", "yes</s>", 1),  # and nothing behind it
        ("eos", "yes ", "yes </s>", 1),  # other white space is the response's own
        ("eos", "yes<end>\n", "yes<end>", 1),  # the end of the template's turns is one, too
        ("eos", "yes<turn>", "yes<turn></s>", 1),
        ("<end>", "yes", "yes<end>", 1),
        ("<end>", "yes<end>\n", "yes<end>", 1),
        ("<end>", "yes</s>", "yes</s><end>", 1),  # another end was asked for by name
        (VOCAB.index("s"), "yes", "yes", 1),  # any token can be the end, and is one
        (None, "yes</s>\n", "yes</s>\n", 0),  # nothing was asked for
    ],
)
def test_a_text_gets_one_end(plain, end, response, scored, ends):
    tokenizer = with_template(plain, CHATML)
    row = TextPair("q", response, "no")
    assert responses(row, tokenizer, end=end)[1] == scored
    assert pairs.encode([row], tokenizer, end=end)[0][0].ends[0] == ends


@pytest.mark.parametrize("end", ["eos", "<end>", "<turn>", None])
def test_a_conversation_ends_as_its_template_says_and_once(plain, end):
    tokenizer = with_template(plain, CHATML)
    row = TextPair([USER], "yes", "no<end>\n")
    assert responses(row, tokenizer, end=end)[1:] == ["yes<end>", "no<end>"]
    assert pairs.encode([row], tokenizer, end=end)[0][0].ends == (1, 1)


def test_a_bos_stands_before_the_whole_text_only(plain):
    assert "begins with '<s>'" in fault(TextPair("q", "<s>yes", "no"), plain)
    row = TextPair("<s>q", "yes", "no")
    assert responses(row, plain)[0] == "<s>q"
    # A template that writes none gets none, as in transformers.
    row = row._replace(prompt=[USER])
    assert not responses(row, with_template(plain, CHATML))[0].startswith("<s>")


def test_an_end_that_is_no_token_is_refused(plain):
    with pytest.raises(DataError, match="end is '<stop>', expected 'eos', None or a token"):
        pairs.encode([TextPair("q", "yes", "no")], plain, end="<stop>")


# Contents


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ([{"text": "a"}], "a"),
        ([], ""),
    ],
)
def test_null_is_absent_and_text_parts_are_one_text(plain, content, text):
    message = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    tokenizer = with_template(plain, CHATML)
    found = tokenizer.chat([USER, message, USER], add_generation_prompt=False)
    assert found == f"<turn>user\nq<end>\n<turn>assistant\n{text}<end>\n<turn>user\nq<end>\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": True}, "message 2: content is a bool, expected a text, null"),
        ({"role": "user", "content": 4}, "message 2: content is a int"),
        ({"role": "user", "content": {"text": "a"}}, "message 2: content is a dict"),
        ({"role": "user", "content": ["a"]}, "content holds a part of type 'str', expected text"),
        ({"role": "user", "content": [{"type": "image"}]}, "a part of type 'image'"),
        ({"role": "user", "content": [{"type": "audio", "text": "a"}]}, "a part of type 'audio'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "a part of type 'text'"),
        ({"role": 1, "content": "a"}, "message 2: role is a int, expected a text"),
    ],
)
def test_any_other_content_is_refused_and_the_row_is_named(plain, message, expected):
    row = TextPair([USER, message], "yes", "no", "F, line 2")
    found = fault(row, with_template(plain, CHATML))
    assert found.startswith("F, line 2: ")
    assert expected in found


def test_a_template_of_parts_gets_parts(plain):
    template = "{{ eos_token + '' if tools is not none and tools else bos_token + '' }}"
    template += "{% for m in messages %}{% for part in m.content %}({{ part.text | trim }})"
    template += "{% endfor %}{% endfor %}"
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, USER]
    assert with_template(plain, template).chat(messages) == "<s>(a)(b)(q)"


# What a stranger's template does


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ 1 + 'a' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) }}",
        "{{ nothing.there }}",
        "{{ messages[9].content }}",
        "{{ [].pop() }}",
        "{{ {}['a'] | tojson }}",
        "{{ ''.__class__ }}{{ ().__class__.__bases__ }}",
        "{{ 'a' | int(base=99) }}",
        "{{ strftime_now(3) }}",
        "{{ '\ud800' }}",
        "{{ raise_exception('two\nlines') }}",
    ],
)
def test_whatever_a_template_raises_is_the_row_s_fault_in_one_line(plain, template):
    template = f"{{% if messages | length != 1 or messages[0].content == 'q' %}}{template}"
    tokenizer = with_template(plain, template + "{% endif %}{{ messages[0].content }}")
    bad = TextPair([USER], "yes", "no", "F, line 1")
    found = fault(bad, tokenizer)
    assert found.startswith("F, line 1: ")
    good = TextPair("plain", "yes", "no", "F, line 2")
    kept, counts = pairs.encode([bad, good], tokenizer, end=None, bad="drop")
    assert [pair.index for pair in kept] == [1]
    (again,) = counts.faults
    assert again[:50] == found[:50]  # how deep it went, the interpreter says in several ways


@pytest.mark.parametrize("template", ["{% for %}", "{{ x | no_such_filter }}", "{% if x %}", "{{"])
def test_a_broken_template_is_the_model_s_fault_and_ends_it(plain, template):
    row = TextPair([USER], "yes", "no", "F, line 1")
    good = TextPair("plain", "yes", "no", "F, line 2")
    for tokenizer in (with_template(plain, template), plain):
        with pytest.raises(DataError, match="chat template") as caught:
            pairs.encode([row, good], tokenizer, end=None, bad="drop")
        assert not isinstance(caught.value, RowError)


def test_the_date_is_set(plain):
    tokenizer = with_template(plain, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    row = TextPair([USER], "yes", "no")
    assert responses(row, tokenizer)[0].startswith("26 Jul 2024<turn>")
    other = responses(row, tokenizer, date=datetime.date(2031, 2, 3))
    assert other[0].startswith("03 Feb 2031<turn>")


def test_names_of_the_template_s_own_arguments_are_not_variables(plain):
    for name in ("messages", "add_generation_prompt", "tokenize", "tools", "self"):
        row = TextPair([USER], "yes", "no", template_kwargs={name: 1})
        assert f"chat_template_kwargs: {name!r} is not" in fault(row, with_template(plain, CHATML))
    row = TextPair([USER], "yes", "no", template_kwargs={"bos_token": "[", "more": "x"})
    found = responses(row, with_template(plain, "{{ bos_token }}{{ more }}" + CHATML))
    assert found[0].startswith("[x<turn>")


def test_tools_are_shown_by_the_template(plain):
    tokenizer = with_template(plain, "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    row = TextPair([USER], "yes", "no")
    for tools, start in [([{"f": 1}], '[{"f": 1}]<turn>'), ([], "<turn>"), (None, "<turn>")]:
        assert responses(row._replace(tools=tools), tokenizer)[0].startswith(start)
    assert "a text with tools" in fault(TextPair("q", "yes", "no", tools=[{"f": 1}]), plain)


# One rule for rows


def test_rows_with_faults_are_left_out_counted_and_named(plain):
    rows = [
        TextPair("q", "yes", "no", "line 1"),
        TextPair("q", "yes", "yes", "line 2"),
        TextPair("q", "half \ud83d", "no", "line 3"),
        TextPair([{"role": "user", "content": 4}], "yes", "no", "line 4"),
        TextPair("a long one", "yes", "no", "line 5"),
        TextPair([USER], "yes", "no", "line 6"),
    ]
    tokenizer = with_template(plain, "{% for m in messages %}{{ m.content }}{% endfor %}")
    kept, counts = pairs.encode(rows, tokenizer, end=None, bad="drop", limit=8)
    assert [pair.index for pair in kept] == [0, 5]
    assert counts[:4] == (2, 0, 0, 0)
    starts = [
        "line 2: chosen and rejected have the same token ids",
        "line 3: text: half a surrogate pair, '\\ud83d' at character 6",
        "line 4: messages: message 1: content is a int",
        "line 5: prompt is 6 tokens too long",
    ]
    assert [
        fault[: len(start)] for fault, start in zip(counts.faults, starts, strict=True)
    ] == starts
    assert all(fault.isascii() for fault in counts.faults)
    with pytest.raises(DataError, match="no row is left with bad='drop'; the first: line 2: ch"):
        pairs.encode(rows[1:2], tokenizer, end=None, bad="drop")
    with pytest.raises((ValueError, TypeError), match="bad"):
        pairs.encode(rows, tokenizer, end=None, bad="skip")


def test_half_a_surrogate_pair_is_no_text(plain):
    with pytest.raises(DataError, match=r"half a surrogate pair, '.udc00' at character 1"):
        plain.encode("a\udc00")
    messages = [{"role": "user", "content": "\ud800"}]
    assert "half a surrogate" in fault(TextPair(messages, "a", "b"), with_template(plain, CHATML))


def test_single_responses_and_lists_have_the_ids_that_pairs_have(plain):
    tokenizer = with_template(plain, CHATML)
    for prompt in ("q", [USER]):
        (pair,), _ = pairs.encode([TextPair(prompt, "yes", "no")], tokenizer, end="eos")
        rows = [TextExample(prompt, "no"), TextList(prompt, ("no", "yes", "no"))]
        (single, several), _ = pairs.encode(rows, tokenizer, end="eos")
        assert [x.tolist() for x in single.tokens] == [pair.tokens[1].tolist()]
        assert [x.tolist() for x in several.tokens] == [pair.tokens[i].tolist() for i in (1, 0, 1)]
        assert several.starts == (pair.starts[0],) * 3
        assert (single.ends, several.ends) == ((1,), (1, 1, 1))


pieces = st.sampled_from(["a", " ", "\n", "<end>", "</s>", "<s>", "é", "\ud800", "{{", "b "])
strings = st.lists(pieces, max_size=4).map("".join)
contents = st.one_of(
    strings, st.none(), st.booleans(), st.integers(),
    st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": strings}), max_size=2),
)  # fmt: skip
chats = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents}),
    max_size=3,
)
templates = st.sampled_from(
    [
        CHATML,
        CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
        "{{ bos_token }}{% for m in messages %}{{ m.role + m.content }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('a')[-1] }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content[0] }}{% endif %}"
        "{% endfor %}",
        "{{ messages[5].content + 1 }}",
        "{{ messages | tojson }}",
    ]
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(chats | strings, strings, strings, templates, st.sampled_from(["eos", None, "<end>"]))
def test_any_row_is_encoded_or_refused_in_a_line(plain, prompt, chosen, rejected, template, end):
    tokenizer = with_template(plain, template)
    row = TextPair(prompt, chosen, rejected, "F, line 1")
    good = TextPair("q", "yes", "no")
    (*found, pair), counts = pairs.encode([row, good], tokenizer, end=end, bad="drop")
    for fault in counts.faults:
        assert fault.startswith("F, line 1: ")
        assert "\n" not in fault
    if not found:
        assert len(counts.faults) == 1
        return
    (pair,) = found
    for ids, start in zip(pair.tokens, pair.starts, strict=True):
        assert 0 < start < len(ids)
        said = (chosen, rejected)
        assert not tokenizer.decode(ids.tolist()).endswith("</s></s>") or any(
            "</s></s>" in text for text in said
        )


def test_a_template_of_tools_that_is_no_jinja_is_the_models_fault(plain):
    tokenizer = dataclasses.replace(plain, template=CHATML, tool_template="{{")
    row = TextPair([USER], "a", "b")
    responses(row, tokenizer)  # nothing reads it
    with pytest.raises(DataError, match=r"^chat template: ") as error:
        pairs.encode([row, row._replace(tools=[CALL])], tokenizer, end=None, bad="drop")
    assert not isinstance(error.value, RowError)
