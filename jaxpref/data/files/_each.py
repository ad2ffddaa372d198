"""Rows of a file, one by one, as what they are: the rule of bad rows is that of pairs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jaxpref.data.files._pairs import Found
from jaxpref.data.files._rows import DataError, Row, RowError


def each(
    found: Iterable[Row],
    make: Callable[[Mapping[str, Any]], Any],
    *,
    bad: Literal["error", "drop"] = "error",
) -> Found:
    """What `make` gives of each row.

    Args:
      found: the place and the content of each row.
      make: raises a `RowError` for a row that it cannot use, without its place.
      bad: such a row is an error, or left out and kept in the faults.

    Returns:
      What was made, and the faults, each with its place.

    Raises:
      RowError: a bad row under ``"error"``.
      DataError: no row, or none that can be used.

    >>> each([("here", {"a": 1})], lambda row: row["a"]).rows
    [1]
    """
    rows, faults = [], []
    for place, row in found:
        try:
            rows.append(make(row))
        except RowError as fault:
            faults.append(f"{place}: {fault}")
            if bad == "error":
                raise RowError(faults[0]) from None
    if not rows:
        raise DataError(f"no row can be used; the first: {faults[0]}" if faults else "no row")
    return Found(rows, faults)
