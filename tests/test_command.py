"""What command lines share: one line for what a user caused, and settings that are asked first."""

import dataclasses
import datetime

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from experiments.protocol import checks, inputs
from jaxpref.data.files import DataError, TextPair
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models.bounds import Bounds
from jaxpref.models.decoder import Policy
from jaxpref.score import command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("keep: got 2,\n  expected 1"), "x: keep: got 2, expected 1"),
        (
            FileNotFoundError(2, "No such file or directory", "a.jsonl"),
            "x: .* directory: 'a.jsonl'",
        ),
        (OSError(28, "No space left on device"), "x: .* No space left on device"),
        (PermissionError(13, "Permission denied", "a"), "x: .*Permission denied: 'a'"),
        (MemoryError(), "x: MemoryError"),
        (FloatingPointError("loss is nan"), "x: loss is nan"),
        (DataError("a, line 1: \ud800 and \0"), r"x: a, line 1: \\ud800 and \\x00"),
    ],
)
def test_what_a_user_caused_is_one_line(error, said):
    with pytest.raises(SystemExit, match=f"^{said}$") as ended, command.one_line("x"):
        raise error
    assert str(ended.value).isprintable()


def test_a_fault_of_the_library_keeps_its_traceback():
    with pytest.raises(KeyError), command.one_line("x"):
        raise KeyError("a")


def test_a_message_of_a_megabyte_is_cut():
    with pytest.raises(SystemExit) as ended, command.one_line("x"):
        raise ValueError("y" * 10**6)
    assert len(str(ended.value)) == 1006


def test_ctrl_c_says_how_the_run_goes_on(capsys):
    with pytest.raises(SystemExit) as ended, command.one_line("x", again="--resume goes on"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "x: interrupted; --resume goes on\n"


@pytest.mark.parametrize("text", ["good", "=good", "a=b,a=c", "a=b,,c"])
def test_columns_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=r"^columns: got .*, expected NAME=COLUMN"):
        command.columns_of(text)


def test_options_of_text_by_hand():
    assert command.columns_of("") is None
    assert command.columns_of("prompt=q, chosen=a b") == {"prompt": "q", "chosen": "a b"}
    assert [command.end_of(x) for x in ("0", "³", "12345678901")] == [0, "³", "12345678901"]
    assert command.date_of("2030-01-02") == datetime.date(2030, 1, 2)
    with pytest.raises(ValueError, match="date: got '2030-02-30', expected a day as YYYY-MM-DD"):
        command.date_of("2030-02-30")


def test_a_pair_that_the_model_cannot_read_is_a_bad_row(monkeypatch):
    rows = [TextPair("a", "b", "c", "f, line 1"), TextPair("a", "b" * 9, "c", "f, line 2")]
    policy = Policy(None, None, bounds=Bounds(vocab=128, longest=4))
    found = [
        command.pairs.TokenPair(
            tuple(np.arange(len(pair.prompt + side)) for side in pair[1:3]), (1, 1), (False,) * 2,
            (0, 0), i,
        )
        for i, pair in enumerate(rows)
    ]  # fmt: skip
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE()), {}, False)
    counts = command.Counts(2, 0, 0, 0, ("f, line 9: no",))
    monkeypatch.setattr(command.pairs, "encode", lambda *_, **__: (found, counts))
    kept, told = command.encode(rows, policy, tokenizer, bad="skip", end=None)
    assert [pair.index for pair in kept] == [0]
    assert told.kept == 1
    assert told.faults[0] == "f, line 9: no"
    assert told.faults[1].startswith("f, line 2: chosen: a text of 10 tokens, expected at most 5")
    with pytest.raises(DataError, match=r"^f, line 2: chosen: a text of 10 tokens"):
        command.encode(rows, policy, tokenizer, bad="error", end=None)
    found.pop(0)
    with pytest.raises(DataError, match="no row is left with bad='skip'; the first: f, line 2"):
        command.encode(rows, policy, tokenizer, bad="skip", end=None)


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = 1.0
    clips: tuple[float, ...] = (float("inf"), 1.0)
    margin: float | None = None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite_numbers(value):
    checks.finite(Config())
    for settings in ({"rate": value}, {"margin": value}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"^{name}: got {value}, expected a finite number"):
            checks.finite(Config(**settings))
    with pytest.raises(ValueError, match="clips: got nan"):
        checks.finite(Config(clips=(float("nan"),)))


def test_a_provenance_holds_no_folder():
    faults = [
        "/home/me/a.jsonl, line 3: no",
        "b.parquet, row 4: x/y, line 2",
        "tfds:a/b, row 1: no",
    ]
    assert inputs.without_folders(faults) == ["a.jsonl, line 3: no", *faults[1:]]
