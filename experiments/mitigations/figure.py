"""Chosen responses against the margin that each method has reached."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.mitigations import protocol
from experiments.mitigations.protocol import Config
from experiments.mitigations.summary import courses, places
from experiments.protocol.changes import CONTROLS, between


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Unseen pairs, trained pairs, and KL; a line for each method, a point for each look."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    colours = plt.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]  # a listed map has them
    style = {name: {"color": colours[i]} for i, name in enumerate(config.methods)}
    style |= {
        "dpo": {"color": "black", "lw": 2.5},
        "coin": {"color": "#888888", "ls": ":"},
        "sft": {"color": "#888888", "ls": "--"},
    }
    panels = (("unseen", "chosen", "unseen pairs"), ("trained", "chosen", "trained pairs"),
              ("unseen", "kl", "unseen responses"))  # fmt: skip
    for panel, (which, field, title) in zip(axes, panels, strict=True):
        for name in protocol.names(config):
            found = courses(config, arrays, name, which)
            x, y = (found[f].mean(axis=(0, 2)) for f in ("margin", field))
            panel.plot(x, y, marker=".", label=CONTROLS.get(name, name), **style[name])
            panel.plot(x[-1:], y[-1:], "o", ms=5, color=style[name]["color"])
        label = "KL to the start (nats a token)" if field == "kl" else "chosen, change (nats)"
        panel.axhline(0, color="black", lw=0.5)
        panel.set(title=title, xlabel=f"margin since the start, {which} pairs (nats)", ylabel=label)
    margin = courses(config, arrays, "dpo", "unseen")["margin"]
    each = zip(margin, places(config, arrays, "dpo"), strict=True)
    level = np.mean([between(x, place) for x, place in each])
    for panel in axes[[0, 2]]:
        panel.axvline(level, color="black", lw=0.6, ls=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure
