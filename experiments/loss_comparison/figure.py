"""Every loss on the test pairs, the regimes of the training pairs, and what was foreseen."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.loss_comparison.protocol import FAMILIES, Config, rows_of
from experiments.loss_comparison.summary import SHOWN, courses, summarise
from experiments.protocol import running
from jaxpref.diagnostics import Regime

CHOSEN, REJECTED, ACCENT = "#1b6ca8", "#777777", "#c8402f"
REGIMES = {
    Regime.IDEAL: ("apart, as wanted", CHOSEN),
    Regime.BOTH_UP: ("both up", "#a9cce3"),
    Regime.BOTH_DOWN: ("both down", "#c9c9c9"),
    Regime.REVERSED: ("reversed", ACCENT),
}
LABELLED = 4  # points that a scatter names: those farthest from the others


def draw(config: Config, arrays: running.Arrays) -> Figure:
    """On the left a line a loss, by family; on the right all of them together."""
    rows = [row for row in summarise(config, arrays) if row["kind"] == "loss"]
    places, gaps = _places(rows)
    figure = plt.figure(figsize=(15, max(10.5, 0.2 * places[-1] + 1.6)), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(8, 6))[0]
    changes, shares = left.subplots(1, 2, sharey=True, width_ratios=(3, 1.4))
    _draw_changes(changes, rows, places)
    _draw_regimes(shares, rows, places)
    for at, family in gaps:
        changes.annotate(family.replace("_", " "), (0, at), (4, 0), fontsize=8, color=ACCENT,
                         xycoords=("axes fraction", "data"), textcoords="offset points",
                         va="center")  # fmt: skip
    panels = right.subplots(3, 1)
    _draw_courses(config, arrays, panels[0])
    _draw_frontier(panels[1], rows)
    _draw_foreseen(panels[2], rows)
    return figure


def _places(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights of the losses, and of the families' names above them."""
    places, gaps, height, family = [], [], 0.0, None
    for row in rows:
        if row["family"] != family:
            family = row["family"]
            gaps.append((height, family))
            height += 1
        places.append(height)
        height += 1
    return places, gaps


def _draw_changes(panel: Axes, rows, places) -> None:
    chosen, rejected = ([row[f"test_{side}"] for row in rows] for side in ("chosen", "rejected"))
    panel.hlines(places, rejected, chosen, color="#d0d0d0", lw=2.5, zorder=1)
    panel.scatter(rejected, places, color=REJECTED, s=22, label="rejected", zorder=2)
    panel.scatter(chosen, places, color=CHOSEN, s=22, label="chosen", zorder=3)
    panel.axvline(0, color="black", lw=0.7)
    words = [row["name"].replace("generalised_cross_entropy", "gce") for row in rows]
    panel.set_yticks(places, words, fontsize=8)
    panel.set_ylim(max(places) + 0.8, -0.8)
    panel.set_xlabel("change of log-probability, test pairs (nats)")
    panel.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def _draw_regimes(panel: Axes, rows, places) -> None:
    """Measured on the upper half of a bar, predicted on the lower."""
    heights = np.array(places)
    for kind, shift in (("measured", -0.2), ("all", 0.2)):
        left = np.zeros(len(rows))
        for regime in SHOWN:
            label, colour = REGIMES[regime]
            share = np.array([100 * row[f"{kind}_{regime.name.lower()}"] for row in rows])
            panel.barh(heights + shift, share, 0.36, left=left, color=colour,
                       label=label if shift < 0 else None)  # fmt: skip
            left += share
    panel.tick_params(labelleft=False, left=False)
    panel.set_xlabel("training pairs (%):\nmeasured above, predicted below")
    panel.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(-0.1, 1))


def _draw_courses(config: Config, arrays: running.Arrays, panel: Axes) -> None:
    """Both log-probabilities of every loss, means over the test pairs."""
    moved = courses(config, arrays)[:, :, :, rows_of(config, "test")].mean(axis=(1, 3))
    for side, (label, colour, dash) in enumerate(
        (("chosen", CHOSEN, "-"), ("rejected", REJECTED, "--"))
    ):
        panel.plot(arrays["step"], moved[:, :, side].T, dash, color=colour, lw=0.8, alpha=0.5)
        middle = np.median(moved[:, :, side], axis=0)
        panel.plot(arrays["step"], middle, dash, color=colour, lw=2.5, label=f"{label}, median")
    panel.axhline(0, color="black", lw=0.7)
    panel.set_xticks(arrays["step"])
    panel.set_xlabel("updates")
    panel.set_ylabel("change of log-probability,\ntest pairs (nats); a line a loss")
    panel.legend(fontsize=8)


def _draw_frontier(panel: Axes, rows) -> None:
    x, y = (np.array([row[name] for row in rows]) for name in ("kl", "test_margin"))
    _scatter(panel, rows, x, y)
    panel.axhline(0, color="black", lw=0.7)
    panel.set_xlabel("KL from the start, test pairs (nats a token)")
    panel.set_ylabel("margin, test pairs (nats)")


def _draw_foreseen(panel: Axes, rows) -> None:
    x, y = (np.array([row[f"share_{name}"] for row in rows]) for name in ("all", "measured"))
    _scatter(panel, rows, x, y)
    panel.axline((0, 0), slope=1, color="black", lw=0.7, ls=":")
    panel.axhline(0, color="black", lw=0.7)
    panel.axvline(0, color="black", lw=0.7)
    panel.set_xlabel("chosen's share of the change, predicted from the training pairs' Gram")
    panel.set_ylabel("measured")


def _scatter(panel: Axes, rows, x: np.ndarray, y: np.ndarray) -> None:
    """A colour a family; the outermost points have their names."""
    colours = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]  # a listed map has them
    for i, family in enumerate(FAMILIES):
        at = [j for j, row in enumerate(rows) if row["family"] == family]
        if at:
            panel.scatter(x[at], y[at], color=colours[i % 10], s=24, alpha=0.8,
                          label=family.replace("_", " "))  # fmt: skip
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if known.size < 2:
        return
    points = np.stack([x, y], axis=1)[known]
    unit = (points - np.median(points, axis=0)) / (np.ptp(points, axis=0) + 1e-12)
    for j in known[np.argsort(-np.abs(unit).max(axis=1))[:LABELLED]]:
        panel.annotate(rows[j]["name"], (x[j], y[j]), (4, 4), fontsize=7,
                       textcoords="offset points")  # fmt: skip
