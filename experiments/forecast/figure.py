"""The figure."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.forecast.protocol import PROTOCOLS, SIGNALS, Config
from experiments.forecast.summary import summarise


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Rank correlation of every signal with the fall, with its interval."""
    rows = summarise(config, arrays)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained", sharey=True)
    place = {name: -i for i, name in enumerate(SIGNALS)}
    colours = ("#1b6ca8", "#c8402f", "#777777", "#3c8d40")
    for panel, protocol in zip(axes, PROTOCOLS, strict=True):
        horizons = sorted(getattr(config, protocol))
        for k, (updates, colour) in enumerate(zip(horizons, colours, strict=False)):
            some = [r for r in rows if (r["protocol"], r["updates"]) == (protocol, updates)]
            y = [place[r["signal"]] + 0.22 * (len(horizons) / 2 - k) for r in some]
            panel.hlines(y, *np.array([r["spearman_95"] for r in some]).T, color=colour, lw=1)
            label = f"{updates} update" + "s" * (updates > 1)
            panel.plot([r["spearman"] for r in some], y, "o", ms=4, color=colour, label=label)
        panel.axvline(0, color="black", lw=0.6)
        panel.set_title(f"pairs trained {protocol}", fontsize=10)
        panel.set_xlabel("Spearman with the fall of the chosen (95 % interval over pairs)")
        panel.set_xlim(-1.05, 1.05)
        panel.legend(frameon=False, fontsize=8, loc="lower left")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(place.values()), list(place))
    return figure
