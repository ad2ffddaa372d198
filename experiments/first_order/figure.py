"""The signature figure: predicted against measured, and how far the theory reaches."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.first_order.protocol import Config, parts, rates_of
from experiments.first_order.summary import HOLDS, summarise

COLOURS = {"chosen": "#1b6ca8", "rejected": "#777777"}


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Above: a point a response, at the largest rate that holds. Below: R^2 over rates."""
    rows, todo, n = summarise(config, arrays), parts(config), config.pairs
    count = len(config.optimizers)
    figure, axes = plt.subplots(
        2, count, figsize=(4.6 * count, 8), layout="constrained", squeeze=False
    )
    clip = config.clips[0]
    for k, optimizer in enumerate(config.optimizers):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        holding = [r["rate"] for r in mine if r["clip"] == clip and r["one"] >= HOLDS]
        rate = max(holding, default=rates_of(config, optimizer)[0])
        j = rates_of(config, optimizer).index(rate)
        at = [i for i, part in enumerate(todo) if (part.optimizer, part.clip) == (optimizer, clip)]
        panel = axes[0, k]
        for side, name in enumerate(COLOURS):
            x = rate * arrays["total"][at, :, side]
            y = arrays["measured"][at, 0, j, :, side]
            style = {"color": COLOURS[name], "s": 22}
            panel.scatter(x[:, :n], y[:, :n], label=f"{name}, in the batch", **style)
            if config.others:
                panel.scatter(
                    x[:, n:], y[:, n:], label=f"{name}, outside", facecolors="none",
                    edgecolors=COLOURS[name], s=22,
                )  # fmt: skip
        panel.axline((0, 0), slope=1, color="black", lw=0.8, zorder=0)
        clipped = "no clipping" if math.isinf(clip) else f"clipped to {clip:g}"
        panel.set_title(f"{optimizer}, one step at {rate:g}, {clipped}", fontsize=10)
        panel.set_xlabel("predicted change of log-probability (nats)")
        panel.set_ylabel("measured change (nats)")
        if k == 0:
            panel.legend(fontsize=8)
        _draw_reach(axes[1, k], config, mine, legend=k == 0)
    return figure


def _draw_reach(panel, config: Config, rows: Sequence[Mapping[str, Any]], *, legend: bool) -> None:
    lines = (("one", "one step", "#1b6ca8"), ("many", f"{config.steps} steps", "#c8402f"),
             ("own_correlation", "one step, own Gram only (correlation)", "#777777"))  # fmt: skip
    for clip, dash in zip(config.clips, ("-", "--", ":", "-."), strict=False):
        some = [row for row in rows if row["clip"] == clip]
        for column, name, colour in lines:
            label = name if math.isinf(clip) else f"{name}, clipped to {clip:g}"
            panel.plot(
                [row["rate"] for row in some],
                np.clip([row[column] for row in some], -1, 1),
                dash, marker="o", ms=3, color=colour, label=label,
            )  # fmt: skip
    panel.axhline(HOLDS, color="black", lw=0.6)
    panel.set_xscale("log")
    panel.set_ylim(-1.05, 1.05)
    panel.set_xlabel("learning rate")
    panel.set_ylabel("R² of the prediction (below -1 drawn at -1)")
    if legend:
        panel.legend(fontsize=8, loc="lower left")
