"""Lines that figures of several experiments have."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.protocol.arms import ARMS
from experiments.protocol.changes import COLOURS, NAMES

Rows = Sequence[Mapping[str, Any]]


def band(panel: Axes, rows: Rows, field: str, colour: str, label: str, dash: str = "-") -> None:
    """A number of each row over its updates, with its interval."""
    x = [r["updates"] for r in rows]
    panel.plot(x, [r[field] for r in rows], dash, marker=".", color=colour, label=label)
    low, high = np.array([r[f"{field}_95"] for r in rows]).T
    panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def courses(panel: Axes, rows: Rows, which: str, arms: Sequence[str] = tuple(ARMS), dash: str = "-",
            more: str = "") -> None:  # fmt: skip
    """Chosen responses of a set under each arm, from rows of `changes.rows`, from 0 on."""
    begun = {"updates": 0, "chosen": 0.0, "chosen_95": [0.0, 0.0]}
    for arm in arms:
        some = [r for r in rows if (r["table"], r.get("arm"), r.get("set"))
                == ("changes", arm, which)]  # fmt: skip
        band(panel, [begun, *some], "chosen", COLOURS[arm], NAMES[arm] + more, dash)
    panel.axhline(0, color="black", lw=0.6)
    panel.set(xlabel="updates", ylabel="change of log-probability (nats)")
