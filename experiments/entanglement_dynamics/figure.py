"""Trained and unseen pairs side by side under every loss; the pull ratio against the fall."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.entanglement_dynamics import protocol
from experiments.entanglement_dynamics.protocol import Config
from experiments.entanglement_dynamics.summary import log_ratio, summarise
from experiments.protocol.changes import CONTROLS, SETS, SIDES


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Courses of both responses, unseen above and trained below; then what the ratio says."""
    rows = summarise(config, arrays)
    figure, axes = plt.subplots(2, 3, figsize=(17, 9), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]  # a listed map has them
    style = {name: {"color": colours[i % 20], "lw": 1.5} for i, name in enumerate(config.losses)}
    style |= {"coin": {"color": "#888888", "ls": ":", "lw": 2},
              "sft": {"color": "black", "ls": "--", "lw": 2}}  # fmt: skip
    for line, which in enumerate(reversed(SETS)):
        for column, side in enumerate(SIDES):
            panel = axes[line, column]
            for name in protocol.names(config):
                some = [r for r in rows if (r["table"], r.get("arm"), r.get("set"))
                        == ("changes", name, which)]  # fmt: skip
                x = [0, *(r["updates"] for r in some)]
                panel.plot(x, [0, *(r[side] for r in some)], label=CONTROLS.get(name, name),
                           marker=".", **style[name])  # fmt: skip
            panel.axhline(0, color="black", lw=0.5)
            panel.set(title=f"{side} responses of {which} pairs", xlabel="updates",
                      ylabel="change of log-probability (nats)")  # fmt: skip
    axes[0, 1].legend(fontsize=8, ncols=2)
    _ratio(axes[0, 2], config, arrays, rows, style, "unseen_chosen", "after one epoch")
    _ratio(axes[1, 2], config, arrays, rows, style, "matched", "at equal margin")
    return figure


def _ratio(panel, config, arrays, rows, style, field, words) -> None:
    edge = 6.0
    for row in rows:
        if row["table"] != "losses" or row["name"] not in config.losses:
            continue
        ratio = np.clip(np.nan_to_num(log_ratio(arrays[f"{row['name']}_start"]), posinf=edge),
                        -edge, edge).mean()  # fmt: skip
        low, high = row[f"{field}_95"]
        colour = style[row["name"]]["color"]
        panel.vlines(ratio, low, high, color=colour, lw=1)
        panel.plot(ratio, row[field], "o", color=colour)
        panel.annotate(row["name"], (ratio, row[field]), fontsize=8, xytext=(4, 2),
                       textcoords="offset points")  # fmt: skip
    panel.axhline(0, color="black", lw=0.5)
    panel.set_xticks(np.log([0.1, 1, 10, 100]), ["0.1", "1", "10", "100"])
    panel.set(title=f"unseen chosen {words}",
              xlabel="pull ratio at the start (right edge: infinite)",
              ylabel="nats (95 %)")  # fmt: skip
