"""Unseen chosen responses of every set beside the controls, and the cosines of the gradients."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.protocol.arms import ARMS
from experiments.protocol.changes import COLOURS, NAMES
from experiments.suffix_entanglement.protocol import Config, sets_of
from experiments.suffix_entanglement.report import summarise

SHADES = {"single": "#8fbce0", "short": "#e8a33d", "long": "#c8402f", "data": "#3a3a3a"}
LINES = [("response", arm, NAMES[arm], "-") for arm in ARMS]
LINES.append(("differing token", "dpo", "DPO, the differing token alone", ":"))
BEFORE = {"updates": 0, "chosen": 0.0, "chosen_95": [0.0, 0.0]}


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """A panel for each set, with 95 % bands over seeds and pairs; then the cosines."""
    rows, texts = summarise(config, arrays), sets_of(config)
    wide = len(texts) + 1
    figure, axes = plt.subplots(1, wide, figsize=(4.3 * wide, 4), layout="constrained")
    for panel, text in zip(axes, texts, strict=False):
        for of, arm, label, dash in LINES:
            some = [r for r in rows if (r.get("text"), r.get("of"), r.get("arm"), r.get("set"))
                    == (text, of, arm, "unseen")]  # fmt: skip
            _line(panel, [BEFORE, *some], "chosen", COLOURS[arm], label, dash)
        panel.set(title=f"{text}: unseen chosen responses")
    axes[0].set_ylabel("change of log-probability (nats)")
    axes[0].legend(fontsize=8)
    for text in texts:
        some = [r for r in rows if (r["table"], r.get("text")) == ("gradients", text)]
        _line(axes[-1], some, "cosine", SHADES[text], text)
    axes[-1].set(title="unseen pairs: cosine of the two gradients", ylim=(-1.05, 1.05))
    axes[-1].legend(fontsize=8)
    for panel in axes:
        panel.axhline(0, color="black", lw=0.6)
        panel.set(xlabel="updates")
    return figure


def _line(panel: Axes, rows: list, name: str, colour: str, label: str, dash: str = "-") -> None:
    x = [r["updates"] for r in rows]
    panel.plot(x, [r[name] for r in rows], dash, marker=".", color=colour, label=label)
    panel.fill_between(x, *np.array([r[f"{name}_95"] for r in rows]).T, color=colour, alpha=0.15,
                       lw=0)  # fmt: skip
