"""What all command lines share: an error is one line, and an option of text means one thing."""

import contextlib
import datetime
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from jaxpref.data import pairs
from jaxpref.data.files import DataError, RowError, TextPair
from jaxpref.data.pairs import Counts, TokenPair
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import bounds
from jaxpref.models.decoder import Policy

# What a user can cause: a file, a setting, a disk, a network, memory, a package that is not there.
_CAUSED = (
    ValueError, OSError, ImportError, MemoryError, ArithmeticError, jax.errors.JaxRuntimeError,
)  # fmt: skip


@contextlib.contextmanager
def one_line(program: str, *, again: str = "") -> Iterator[None]:
    r"""Ends the program with one line for an error that its user can cause.

    Anything else is a fault of this library and keeps its traceback. Ctrl-C ends with status 130,
    as shells expect.

    >>> with one_line("demo"):
    ...     raise ValueError("keep: got 2,\n expected less")
    Traceback (most recent call last):
    SystemExit: demo: keep: got 2, expected less
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted{again and f'; {again}'}", file=sys.stderr)
        sys.exit(130)
    except _CAUSED as error:
        said = " ".join(str(error).split()) or type(error).__name__
        # A message may repeat what it met, and that may be anything: half a character, a megabyte.
        said = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in said)
        sys.exit(f"{program}: {said if len(said) <= 1000 else f'{said[:1000]}...'}")


def columns_of(text: str) -> dict[str, str | None] | None:
    """The file's names of columns; a name without another is a column that is not read.

    >>> columns_of("chosen=good,system=")
    {'chosen': 'good', 'system': None}

    Raises:
      ValueError: a part without ``=``, or a name that comes twice.
    """
    parts = [part.partition("=") for part in text.split(",") if text]
    found = {ours.strip(): theirs.strip() or None for ours, _, theirs in parts}
    if len(found) < len(parts) or not all(ours.strip() and sign for ours, sign, _ in parts):
        expected = "NAME=COLUMN with commas between them, each name once"
        raise ValueError(f"columns: got {text!r}, expected {expected}")
    return found or None


def end_of(text: str) -> int | str | None:
    """What closes a response that nothing else closes, as `jaxpref.data.pairs.encode` takes it.

    >>> end_of("none"), end_of("eos"), end_of("<end_of_turn>"), end_of("107")
    (None, 'eos', '<end_of_turn>', 107)
    """
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    return None if text == "none" else text


def date_of(text: str) -> datetime.date:
    """A day for templates that ask for one.

    >>> date_of("2024-07-26")
    datetime.date(2024, 7, 26)

    Raises:
      ValueError: not a day of the calendar, ``YYYY-MM-DD``.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"date: got {text!r}, expected a day as YYYY-MM-DD") from None


def encode(
    rows: Sequence[TextPair],
    policy: Policy,
    tokenizer: Tokenizer,
    *,
    bad: Literal["error", "skip"],
    **options: Any,
) -> tuple[list[TokenPair], Counts]:
    """`jaxpref.data.pairs.encode`; a pair that the model cannot read is a bad row, too.

    Args:
      rows: the pairs.
      policy: the model, for its bounds.
      tokenizer: the model's.
      bad: a row that cannot be used is an error, or left out and in the counts.
      **options: of `encode`.

    Raises:
      DataError: as `encode`; a pair outside the model's bounds under ``"error"``; no pair is left.
    """
    drop = "error" if bad == "error" else "drop"
    found, counts = pairs.encode(rows, tokenizer, bad=drop, **options)
    kept, faults = [], []
    for pair in found:
        fault = _unreadable(policy, pair)
        if fault is None:
            kept.append(pair)
            continue
        faults.append(f"{rows[pair.index].place or f'row {pair.index}'}: {fault}")
        if bad == "error":
            raise RowError(faults[0])
    if found and not kept:
        raise DataError(f"no row is left with bad='skip'; the first: {faults[0]}")
    return kept, counts._replace(kept=len(kept), faults=(*counts.faults, *faults))


def _unreadable(policy: Policy, pair: TokenPair) -> str | None:
    for side, ids in zip(("chosen", "rejected"), pair.tokens, strict=True):
        if fault := bounds.fault(policy.bounds, ids):
            return f"{side}: {fault}"
    return None


def tell(what: str, rows: Sequence[str]) -> None:
    """Says on stderr how many rows something happened to, and names the first twenty."""
    if rows:
        some = "; ".join(map(str, rows[:20])) + "; ..." * (len(rows) > 20)
        print(f"{len(rows)} rows {what}: {some}", file=sys.stderr)
