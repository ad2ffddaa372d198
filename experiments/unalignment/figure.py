"""Refusal against over-refusal, changes of log-probabilities, and where mass went."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.protocol import running
from experiments.unalignment.protocol import Config
from experiments.unalignment.summary import summarise

UNSAFE, SAFE, CHOSEN, REJECTED = "#c8402f", "#3c8d40", "#1b6ca8", "#777777"


def draw(config: Config, arrays: running.Arrays) -> Figure:
    """A line an arm: rates with intervals, then changes of log-probabilities."""
    rows = [row for row in summarise(config, arrays) if row["kind"] in ("start", "arm")]
    figure, panels = plt.subplots(
        1, 3, figsize=(14, 0.27 * len(rows) + 1.6), layout="constrained", sharey=True,
        width_ratios=(1.3, 1, 1),
    )  # fmt: skip
    places = -np.arange(len(rows))
    _draw_rates(panels[0], rows, places)
    counts = [f"  (n = {row['pairs']:.0f})" if row["kind"] == "arm" else "" for row in rows]
    panels[0].set_yticks(places, [row["name"] + n for row, n in zip(rows, counts, strict=True)])
    for panel, lines, words in (
        (panels[1], {"chosen": CHOSEN, "rejected": REJECTED}, "the pairs trained on"),
        (panels[2], {"refusals": UNSAFE, "compliances": SAFE}, "fixed responses, untrained"),
    ):
        _draw_changes(panel, rows[2:], places[2:], lines)
        panel.set_xlabel(f"log-probability of {words},\nmean change since the start (nats)")
        panel.grid(axis="y", color="#eeeeee", lw=0.8)
        panel.set_axisbelow(True)
    return figure


def _draw_rates(panel, rows, places) -> None:
    for name, colour, marker, shift, label in (
        ("unsafe", UNSAFE, "o", 0.15, "unsafe prompts refused"),
        ("safe", SAFE, "s", -0.15, "safe prompts refused"),
    ):
        ends = np.array([r[f"{name}_95"] for r in rows]).T
        panel.hlines(places + shift, *ends, color=colour, lw=1)
        panel.plot([r[name] for r in rows], places + shift, marker, color=colour, ms=4, label=label)
        start = next(r[name] for r in rows if r["name"] == "taught")
        panel.axvline(start, color=colour, lw=0.8, ls=":")
    bad = [row["degenerate"] for row in rows]
    panel.plot(bad, places, "x", color="black", ms=4, label="degenerate text")
    panel.set_xlim(-0.03, 1.03)
    panel.set_xlabel("share of prompts, 95 % interval over seeds and prompts\n(dotted: the start)")
    panel.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _draw_changes(panel, arms, places, lines) -> None:
    for (name, colour), marker in zip(lines.items(), "os", strict=True):
        panel.plot([r[name] for r in arms], places, marker, color=colour, ms=4, label=name)
        panel.hlines(places, *np.array([r[f"{name}_95"] for r in arms]).T, color=colour, lw=1)
    panel.axvline(0, color="black", lw=0.6)
    panel.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
