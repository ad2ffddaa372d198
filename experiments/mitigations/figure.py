"""The figure."""

import itertools
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.mitigations.protocol import Config, parts
from experiments.mitigations.summary import courses

COLOURS = (
    *("#222222", "#8c6d31", "#bd9e39", "#1b6ca8", "#67b7dc"),
    *("#c8402f", "#e7969c", "#3c8d40", "#98c379", "#7b4fa3"),
)


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """For each optimizer: chosen, rejected and divergence against the margin reached."""
    todo = parts(config)
    every = [courses(config, arrays, i) for i in range(len(todo))]
    panels = (
        ("chosen", "chosen log-probability since the start (nats)"),
        ("rejected", "rejected log-probability since the start (nats)"),
        ("held_chosen", "chosen, held-out pairs (nats)"),
        ("kl", "KL to the start (nats a token, held-out)"),
    )
    figure, axes = plt.subplots(
        len(config.optimizers), len(panels), layout="constrained", squeeze=False,
        figsize=(4.4 * len(panels), 4 * len(config.optimizers)),
    )  # fmt: skip
    for row, optimizer in zip(axes, config.optimizers, strict=True):
        for panel, (name, label) in zip(row, panels, strict=True):
            for method, colour in zip(config.methods, itertools.cycle(COLOURS), strict=False):
                for i, part in enumerate(todo):
                    if part[1:] == (optimizer, method):
                        panel.plot(
                            every[i]["margin"], every[i][name], color=colour, lw=1.2,
                            marker=".", ms=4, label=method if part.seed == 0 else None,
                        )  # fmt: skip
            panel.axhline(0, color="black", lw=0.6)
            panel.set_xlabel("margin since the start, training pairs (nats)")
            panel.set_ylabel(label)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_title(f"{optimizer}: a line a seed, a point a look", fontsize=10)
    axes[0, -1].legend(frameon=False, fontsize=8)
    return figure
