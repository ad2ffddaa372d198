"""Tables in print: columns of text, and numbers with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

SEEDS, PAIRS = 3, 24  # at least, of a verdict


def spread(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """A number and its interval, ``+0.12 (-0.01 to +0.25)``; a dash where there is none."""
    if row[name] != row[name]:
        return "-"
    low, high = row[f"{name}_95"]
    return f"{row[name]:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def percent(share: float) -> str:
    """``36 %``; a dash where there is none."""
    return f"{100 * share:.0f} %" if share == share else "-"


def judged(seeds: int, pairs: int, verdict: str) -> str:
    """A verdict in words, unless it would rest on too little.

    Args:
        seeds: Of the run.
        pairs: That it is about, over all seeds.
        verdict: The words.
    """
    if seeds >= SEEDS and pairs >= PAIRS:
        return verdict
    return (
        f"Too small for a verdict: {seeds} seeds and {pairs} pairs over all of them, expected"
        f" {SEEDS} and {PAIRS}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first ones' words to the left, numbers to the right."""
    every = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
             for row in every]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
