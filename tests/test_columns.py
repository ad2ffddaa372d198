"""Columns beside the two texts, other kinds of rows, and the same rows in every format of file."""

import csv
import gzip
import json

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from jaxpref.data.files import (
    NEEDS,
    DataError,
    RowError,
    TextExample,
    TextList,
    TextPair,
    csv_rows,
    filter_file,
    read,
    rows,
)

USER = {"role": "user", "content": "q"}
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
CHAT = PAIR | {"prompt": [USER]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def one(row, kind="pairs", **options):
    return read([("F, line 1", row)], kind, **options).rows[0]


def fault(row, kind="pairs", **options):
    with pytest.raises(RowError) as caught:
        one(row, kind, **options)
    text = str(caught.value)
    assert text.startswith("F, line 1: ")
    assert "\n" not in text
    left = read([("F, line 1", row), ("F, line 2", GOOD[kind])], kind, bad="drop", **options)
    assert left.faults == [text]
    assert [found.row for found in left.rows] == [1]
    return text.removeprefix("F, line 1: ")


GOOD = {
    "pairs": CHAT | {"win_probability": 0.7, "tie": False, "chosen_score": 2, "rejected_score": 1},
    "examples": {"prompt": "q", "completion": "yes", "label": True},
    "lists": {"prompt": "q", "responses": ["yes", "no"], "rewards": [1, 0]},
}

# What belongs to the prompt


def test_a_system_text_is_the_first_message():
    system = {"role": "system", "content": "s"}
    assert one(CHAT | {"system": "s"}).prompt == [system, USER]
    assert one(CHAT | {"system": None}).prompt == one(CHAT | {"system": ""}).prompt == [USER]
    assert one(CHAT | {"prompt": [system, USER], "system": "s"}).prompt == [system, USER]
    both = {
        side: [USER, {"role": "assistant", "content": side}] for side in PAIR if side != "prompt"
    }
    assert one(both | {"system": "s"}).prompt == [system, USER]
    other = CHAT | {"prompt": [system, USER], "system": "t"}
    assert fault(other) == "system is not the system message that the prompt begins with"
    assert fault(CHAT | {"system": 3}).startswith("system is a int, expected a text")


def test_tools_and_variables_of_the_template_come_as_they_are_or_as_json():
    more = {"enable_thinking": False}
    for tools, values in [(TOOLS, more), (json.dumps(TOOLS), json.dumps(more))]:
        found = one(CHAT | {"tools": tools, "chat_template_kwargs": values})
        assert (found.tools, found.template_kwargs) == (TOOLS, more)
    found = one(CHAT | {"tools": None, "chat_template_kwargs": {}})
    assert (found.tools, found.template_kwargs) == (None, None)
    assert fault(CHAT | {"tools": "f"}).startswith("tools is a text, but no JSON")
    assert fault(CHAT | {"tools": {"f": 1}}).startswith("tools: expected a list of objects")
    assert fault(CHAT | {"chat_template_kwargs": [1]}).startswith("chat_template_kwargs: expected")


@pytest.mark.parametrize(
    ("name", "value"),
    [("system", "s"), ("tools", TOOLS), ("chat_template_kwargs", {"a": 1})],
)
@pytest.mark.parametrize("kind", NEEDS)
def test_what_a_text_has_no_place_for_is_refused(kind, name, value):
    row = GOOD[kind] | {"prompt": "q", name: value}
    assert fault(row, kind).startswith(f"{name} belongs to a conversation, but prompt is a text")
    assert one(row, kind, columns={name: None}).prompt == "q"


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
def test_a_prompt_of_more_than_text_is_refused(name):
    assert fault(CHAT | {name: ["x.png"]}).startswith(f"{name}: more than text belongs to this")
    assert one(CHAT | {name: []}).prompt == [USER]


def test_nulls_of_objects_are_absent_and_what_json_has_not_is_refused():
    call = {"function": {"name": "f", "arguments": {"a": None, "b": 1}}, "id": None}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    found = one(CHAT | {"prompt": [USER, message, USER]}).prompt
    assert found[1] == {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1}}}],
    }
    assert "holds a bytes, expected what JSON" in fault(CHAT | {"prompt": [USER | {"a": b"x"}]})
    assert "nested too deeply" in fault(CHAT | {"prompt": [USER | {"a": deep(5000)}]})


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


def test_messages_written_as_a_text_are_messages():
    row = {"prompt": json.dumps([USER]), "chosen": "yes", "rejected": "[no]"}
    assert one(row)[:3] == ([USER], "yes", "[no]")
    printed = {name: str([USER]) for name in PAIR}
    assert fault(PAIR | printed).startswith("prompt is a list as Python prints it, expected JSON")


def test_a_response_that_is_more_than_text_stays_a_message():
    message = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert one(CHAT | {"chosen": [message | {"name": None}]}).chosen == message
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    assert one(CHAT | {"chosen": [{"role": "assistant", "content": parts}]}).chosen == "yes"
    empty = [{"role": "assistant", "content": None}]
    assert fault(CHAT | {"chosen": empty}).startswith("chosen is an empty response")


# Names


def test_columns_of_other_names():
    row = {"good": "yes", "bad": "no", "question": "q", "chosen": "not this"}
    columns = {"chosen": "good", "rejected": "bad", "prompt": "question"}
    assert one(row, columns=columns)[:3] == ("q", "yes", "no")
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert one(PAIR, columns=swapped)[:3] == ("q", "no", "yes")
    with pytest.raises(RowError, match="no column 'good' for chosen, found 'prompt'"):
        one(PAIR, columns={"chosen": "good"})
    with pytest.raises(DataError, match="no row has the column 'sys', given for 'system'"):
        one(CHAT, columns={"system": "sys"})
    with pytest.raises(ValueError, match="columns names 'choosen', expected some of prompt, chos"):
        one(PAIR, columns={"choosen": "good"})


# Numbers


@pytest.mark.parametrize("names", [("chosen_score", "rejected_score"),
                                   ("score_chosen", "score_rejected"),
                                   ("chosen_rating", "rejected_rating")])  # fmt: skip
def test_rewards_of_both_responses(names):
    row = PAIR | dict(zip(names, (4, "1.5"), strict=True))
    assert one(row, needs=["rewards"]).rewards == (4.0, 1.5)
    assert one(row).rewards is None
    for value in (None, True, "good", float("nan"), [1], 10**400):
        found = fault(row | {names[0]: value}, needs=["rewards"])
        if value is None:
            assert found.startswith("no columns 'chosen_score' and 'rejected_score' or ")
        else:
            assert found.endswith("expected a finite number")
    twice = row | {"chosen_reward": 3, "rejected_reward": 1}
    assert fault(twice, needs=["rewards"]).startswith(f"rewards stand in {names[0]!r} and in") or (
        names[0] == "chosen_rating"
    )


def test_win_probabilities():
    assert one(PAIR | {"win_probability": 0.75}, needs=["win_probability"]).win_probability == (
        0.75,
        0.25,
    )
    both = {"chosen_probs_win": 0.9, "chosen_probs_lose": "0.2"}
    assert one(PAIR | both, needs=["win_probability"]).win_probability == (0.9, 0.2)
    found = fault(PAIR, needs=["win_probability"])
    assert found.startswith(
        "no column 'win_probability', nor 'chosen_probs_win' and 'chosen_probs_"
    )
    found = fault(PAIR | {"win_probability": 1.5}, needs=["win_probability"])
    assert found == "win_probability is 1.5, expected a number from 0 to 1"


def test_a_tie_is_no_preference_unless_it_is_asked_for():
    for name in ("tie", "is_tie"):
        assert one(PAIR | {name: True}, needs=["is_tie"]).is_tie is True
        assert one(PAIR | {name: "0"}, needs=["is_tie"]).is_tie is False
        assert fault(PAIR | {name: True}) == "the two responses are tied, expected a preference"
        assert one(PAIR | {name: False}).is_tie is None
    assert fault(PAIR, needs=["is_tie"]).startswith("no column 'is_tie' or 'tie', found 'prompt'")


def test_single_responses_with_a_label():
    row = {"prompt": "q", "completion": "yes", "label": False, "more": 1}
    assert one(row, "examples") == TextExample("q", "yes", "F, line 1", 0)
    for label, expected in [(False, False), (1, True), ("True", True), ("0", False)]:
        found = one(row | {"label": label}, "examples", needs=["desirable"])
        assert found.desirable is expected
    for label in (2, "good", None, 0.5, [True]):
        found = fault(row | {"label": label}, "examples", needs=["desirable"])
        assert found == f"label is {label!r}, expected true or false"
    del row["label"]
    found = fault(row, "examples", needs=["desirable"])
    assert found == "no column 'label', found 'prompt', 'completion', 'more'"
    messages = [{"role": "assistant", "content": "yes"}]
    found = one(row | {"prompt": [USER], "completion": messages}, "examples")
    assert found[:2] == ([USER], "yes")


def test_lists_of_responses_with_rewards_or_ranks():
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]}
    expected = TextList("q", ("a", "b", "c"), "F, line 1", 0, rewards=(1.0, 3.0, 2.0))
    assert one(row, "lists", needs=["rewards"]) == expected
    ranked = {"prompt": "q", "completions": json.dumps(["a", "b", "c"]), "ranks": "[3, 1, 2]"}
    found = one(ranked, "lists", needs=["rewards"])
    assert (found.responses, found.rewards) == (("a", "b", "c"), (-3.0, -1.0, -2.0))
    for change, expected in [
        ({"scores": [1, 2]}, "scores: got 2, expected one for each of 3 responses"),
        ({"scores": 1}, "scores: got a int, expected one for each of 3 responses"),
        ({"scores": None}, "no column 'rewards', 'scores' or 'ranks', found 'prompt', 'responses'"),
        ({"scores": [1, None, 2]}, "scores is None, expected a finite number"),
        ({"responses": []}, "responses is a list, expected a list of responses"),
        ({"responses": None}, "no column 'responses' or 'completions', found"),
        ({"responses": ["a", " ", "c"]}, "response 2 is an empty response"),
        ({"responses": ["a", 2, "c"]}, "response 2 is a int"),
    ]:
        assert fault(row | change, "lists", needs=["rewards"]).startswith(expected)


def test_options_that_do_not_exist_are_refused():
    for options, text in [
        ({"kind": "triples"}, "kind is 'triples', expected one of 'pairs', 'examples', 'lists'"),
        ({"needs": ["desirable"]}, "needs names 'desirable', expected some of rewards, win_prob"),
        ({"bad": "skip"}, "bad is 'skip', expected 'error' or 'drop'"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"{text}|{next(iter(options))}"):
            read([("F, line 1", PAIR)], **options)


# Tables of texts


def write_table(path, found, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(found)
    return path


def test_tables_hold_quotes_commas_ends_of_lines_and_long_texts(tmp_path):
    found = [PAIR | {"chosen": 'a "b", c\n\nd'}, PAIR | {"chosen": "x" * 200_000, "prompt": ""}]
    for name, delimiter in [("rows.csv", ","), ("rows.tsv", "\t")]:
        path = write_table(tmp_path / name, found, delimiter)
        assert [pair[:3] for pair in read(path).rows] == [tuple(row.values()) for row in found]
        assert [place for place, _ in csv_rows(path)] == [f"{path}, row {n}" for n in (0, 1)]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")
    assert len(read(path).rows) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", ": the file is empty"),
        (b"prompt,chosen,rejected\n", ": the file is empty"),
        (b"prompt,chosen,chosen\nq,a,b\n", ": 2 columns are named 'chosen', expected one"),
        (b"prompt,chosen,rejected\nq,a\n", ", row 0: 2 texts, expected the 3 of the header"),
        (b"prompt,chosen,rejected\nq,a,b,c\n", ", row 0: 4 texts, expected the 3 of the header"),
        (b'prompt,chosen,rejected\nq,a,"b\n', ", line 2: not a table of texts (unexpected end"),
        (b'prompt,chosen,rejected\nq,a,"b"c\n', ", line 2: not a table of texts ("),
        (b"prompt,chosen,rejected\nq,a,\xff\n", ", line 2: not UTF-8 ("),
    ],
)
def test_faults_of_tables_name_file_and_row(tmp_path, text, expected):
    path = tmp_path / "rows.csv"
    path.write_bytes(text)
    for bad in ("error", "drop"):
        with pytest.raises(DataError) as caught:
            read(path, bad=bad)
        assert str(caught.value).startswith(f"{path}{expected}")
        assert not isinstance(caught.value, RowError)


def test_part_of_a_table_is_copied_byte_for_byte(tmp_path):
    lines = [b"prompt,chosen,rejected\r\n", b'q,"a\n\nb",c\r\n', b"\r\n", b'"q",d,e\n', b"q,f,g"]
    for name, opened in [("rows.csv", open), ("rows.csv.gz", gzip.open)]:
        path, out = tmp_path / name, tmp_path / f"part.{name}"
        with opened(path, "wb") as file:
            file.writelines(lines)
        filter_file(path, [0, 2], out)
        with opened(out, "rb") as file:
            assert file.read() == lines[0] + lines[1] + lines[4]
        assert [pair[1:3] for pair in read(out).rows] == [("a\n\nb", "c"), ("f", "g")]
    with pytest.raises(DataError, match=r"expected a name that ends in '\.csv\.gz'"):
        filter_file(path, [0], tmp_path / "part.csv")


# One array


def test_one_array_of_objects_is_read_and_not_filtered(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIR, PAIR | {"chosen": "so"}], indent=1))
    assert [pair.place for pair in read(path).rows] == [f"{path}, row {n}" for n in (0, 1)]
    with pytest.raises(DataError, match="one JSON array, expected JSON lines to filter"):
        filter_file(path, [0], tmp_path / "part.json")
    for text, expected in [
        ("[]", ": the file is empty"),
        ("[1]", ", row 0: expected a JSON object, found a int"),
        ("[{}, ", ": not valid JSON"),
        ('["a"]\n{}', ": not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            read(path, bad="drop")
        assert str(caught.value).startswith(f"{path}{expected}")


# The same rows in every format

TEXT = st.text(st.sampled_from("ab ,\"'\n\r\té[]{}日"), min_size=1, max_size=8)
NAMES = st.sampled_from(["f", "g"])
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": NAMES}, optional={
        "arguments": st.fixed_dictionaries({}, optional={"a": st.integers(-2**40, 2**40)})
        .filter(bool)})}),
    min_size=1, max_size=2,
)  # fmt: skip
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT}, optional={"tool_calls": CALLS}
) | st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none(), "tool_calls": CALLS})
USERS = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}, optional={"name": NAMES})
CHATS = st.lists(st.tuples(USERS, ANSWERS), max_size=2).map(
    lambda turns: [m for turn in turns for m in turn] + [USER]
)
SCORES = {"chosen_score": st.floats(-9, 9), "rejected_score": st.integers(0, 9)}
PAIRS = {"chosen": TEXT, "rejected": TEXT, **SCORES}
TEXTS = st.fixed_dictionaries({"prompt": TEXT, **PAIRS})
CONVERSATIONS = st.fixed_dictionaries(
    {"prompt": CHATS, **PAIRS},
    optional={
        "system": TEXT,
        "tools": st.just(TOOLS),
        "chat_template_kwargs": st.just({"enable_thinking": False}),
        "seen": st.none() | st.dates(),
    },
)


def cell(value):
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


@settings(derandomize=True, deadline=None, max_examples=40,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.lists(TEXTS, min_size=1, max_size=3) | st.lists(CONVERSATIONS, min_size=1, max_size=3))
def test_the_same_rows_in_another_format_are_the_same_pairs(tmp_path, found):
    plain = [{k: v for k, v in row.items() if k != "seen"} for row in found]
    lines, names = "".join(json.dumps(row) + "\n" for row in plain), list(dict.fromkeys(
        name for row in plain for name in row))  # fmt: skip
    paths = {name: tmp_path / f"rows.{name}" for name in ("jsonl", "json", "jsonl.gz", "parquet",
                                                          "csv", "tsv")}  # fmt: skip
    paths["jsonl"].write_text(lines)
    paths["jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    paths["json"].write_text(json.dumps(plain))
    parquet.write_table(pyarrow.Table.from_pylist(found, schema=_schema(found)), paths["parquet"])
    table = [{name: cell(row.get(name)) for name in names} for row in plain]
    write_table(paths["csv"], table)
    write_table(paths["tsv"], table, "\t")

    def outcome(path):
        """The rows without their places, or what was said about the first."""
        try:
            read_rows = read(path, bad="drop", needs=["rewards"])
        except DataError as error:
            return str(error).rsplit(": ", 1)[1].split(" is a ")[0]
        left = [fault.split(": ", 1)[1] for fault in read_rows.faults]
        return [row._replace(place="") for row in read_rows.rows], left

    expected = outcome(paths["jsonl"])
    for path in paths.values():
        assert outcome(path) == expected
    assert [place for place, _ in rows(paths["csv"])] == [
        f"{paths['csv']}, row {n}" for n in range(len(found))
    ]


def _schema(found):
    """All columns of all rows: Arrow alone takes the first row's."""
    names = dict.fromkeys(name for row in found for name in row)
    columns = {name: pyarrow.array([row.get(name) for row in found]) for name in names}
    return pyarrow.table(columns).schema


def test_a_response_may_be_null_in_one_side_s_schema_and_the_prompt_is_still_one(tmp_path):
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    found = {"chosen": [USER, called], "rejected": [USER, {"role": "assistant", "content": "no"}]}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([found]), path)
    assert read(path).rows == [TextPair([USER], called, "no", f"{path}, row 0", 0)]


def test_a_table_of_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table([pyarrow.array(["a"])] * 2, names=["chosen", "chosen"])
    parquet.write_table(table, path)
    with pytest.raises(DataError, match="2 columns are named 'chosen', expected one"):
        read(path)
