"""What the percentiles of each score did to trained and to unseen pairs."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.ches_percentiles.protocol import SCORES, Config
from experiments.ches_percentiles.report import subsets
from experiments.protocol.changes import CONTROLS, SETS


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """A line for each score, grey ones for the controls on its subsets; a row for each loss."""
    rows, high = subsets(config, arrays), len(config.losses)
    figure, axes = plt.subplots(high, 2, figsize=(13, 4.8 * high), layout="constrained",
                                squeeze=False)  # fmt: skip
    x, wide = np.array(config.percentiles, float), np.ptp(config.percentiles)
    for loss, line in zip(config.losses, axes, strict=True):
        for which, panel in zip(SETS, line, strict=True):
            for k, score in enumerate(config.scores):
                some = [r for r in rows if (r["score"], r["set"]) == (score, which)]
                by = {arm: [r for r in some if r["arm"] == arm] for arm in (loss, *CONTROLS)}
                for arm, style in zip(CONTROLS, (":", "--"), strict=True):
                    panel.plot(x, [r["chosen"] for r in by[arm]], style, color="#999999", lw=0.8,
                               label="" if k else CONTROLS[arm])  # fmt: skip
                places = x + (k - (len(config.scores) - 1) / 2) * 0.012 * wide
                panel.plot(places, [r["chosen"] for r in by[loss]], "o-", ms=4, color=f"C{k}",
                           label=SCORES[score])  # fmt: skip
                panel.vlines(places, *np.array([r["chosen_95"] for r in by[loss]]).T,
                             color=f"C{k}", lw=1)  # fmt: skip
            panel.axhline(0, color="black", lw=0.6)
            panel.set_xticks(config.percentiles)
            panel.set(title=f"{loss}: chosen responses of {which} pairs",
                      xlabel="percentile of the score that chose the trained pairs",
                      ylabel="change of log-probability (nats)")  # fmt: skip
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure
