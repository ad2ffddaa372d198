"""What the percentiles of each score did."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.ches_percentiles.protocol import SCORES, Config
from experiments.ches_percentiles.summary import courses


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """For each score, change against percentile: as a sum above, a token below."""
    rows, wide = list(courses(config, arrays)), 4
    high = -(-len(config.scores) // wide)
    figure, axes = plt.subplots(
        2 * high, wide, figsize=(11, 4.6 * high), layout="constrained", sharex=True, squeeze=False
    )
    for panel in axes.flat:
        panel.set_visible(False)
    for k, score in enumerate(config.scores):
        for below, (unit, label) in enumerate((("sum", "nats"), ("token", "nats a token"))):
            panel = axes[2 * (k // wide) + below, k % wide]
            panel.set_visible(True)
            panel.sharey(axes[below, 0])
            _course(config, panel, [r for r in rows if r["score"] == score], unit)
            if below == 0:
                panel.set_title(SCORES[score], fontsize=10)
            else:
                panel.set_xlabel("percentile of the score")
                panel.tick_params(labelbottom=True)
            if k % wide == 0:
                panel.set_ylabel(f"change of log π(chosen)\n({label})")
    axes[0, 0].legend(frameon=False, fontsize=9)
    return figure


def _course(config: Config, panel: Any, rows: Sequence[Mapping[str, Any]], unit: str) -> None:
    for row, colour, shift in zip(rows, ("#1b6ca8", "#c8402f"), (-1.2, 1.2), strict=False):
        x = np.array(config.percentiles) + shift
        panel.plot(x, row[unit]["mean"], color=colour, lw=1.2, label=row["loss"].upper())
        panel.vlines(x, *np.array(row[unit]["mean_95"]).T, color=colour, lw=1)
        seeds = np.array(row[unit]["seeds"])  # [percentiles seeds]
        panel.plot(x, seeds, "o", ms=3, color=colour)
    panel.axhline(0, color="black", lw=0.6)
    panel.set_xticks(config.percentiles)
    panel.spines[["top", "right"]].set_visible(False)
