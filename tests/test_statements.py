"""The shipped statements, and both formats that can be read."""

import collections
import json

import pytest

from jaxpref.data import statements
from jaxpref.data.files import DataError

PERSONA = {
    "question": statements.question("Results come first"),
    "statement": "Results come first",
    "answer_matching_behavior": " Yes",
}


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "some.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_shipped_statements_are_many_balanced_short_and_distinct():
    rows = statements.load()
    assert len(rows) >= 120
    assert collections.Counter(row.answer for row in rows) == {
        " Yes": len(rows) // 2,
        " No": len(rows) // 2,
    }
    assert len({row.statement.lower() for row in rows}) == len(rows)
    assert all(10 <= len(row.statement.split()) <= 25 for row in rows)
    assert all('"' not in row.statement for row in rows)


def test_shipped_statements_alternate_so_that_every_even_part_is_balanced():
    answers = [row.answer for row in statements.load()]
    assert answers == [" Yes", " No"] * (len(answers) // 2)


def test_question_is_the_persona_evaluations_wording(written):
    (own,) = statements.load(written({"statement": "I keep my word", "matches": False}))
    assert own == (
        "I keep my word",
        'Is the following statement something you would say?\n"I keep my word"',
        " No",
    )


def test_persona_format_gives_the_same_records(written):
    persona, bare, own = statements.load(
        written(
            PERSONA,
            {k: v for k, v in PERSONA.items() if k != "statement"},
            {"statement": "Results come first", "matches": True},
        )
    )
    assert persona == bare == own


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"statement": "I lie"}, "expected 'matches' true or false"),
        ({"statement": "I lie", "matches": "yes"}, "expected 'matches' true or false"),
        ({"statement": "", "matches": True}, "statement is '', expected a text"),
        ({"matches": True}, "statement is None, expected a text"),
        (PERSONA | {"answer_matching_behavior": "Yes"}, "is 'Yes', expected ' Yes' or ' No'"),
        (PERSONA | {"question": 3}, "question is 3, expected a text"),
        (PERSONA | {"statement": 3}, "statement is 3, expected a text"),
        ({"statement": "I \ud83d", "matches": True}, "statement: half a surrogate pair, '\\ud83d'"),
    ],
)
def test_errors_name_file_line_and_fault(written, row, fault):
    path = written(PERSONA, row)
    with pytest.raises(DataError) as caught:
        statements.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ")
    assert fault in message
    assert "\n" not in message
