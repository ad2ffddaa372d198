"""The map: rate by updates, a panel for each start."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.dose.protocol import Config, looks
from experiments.dose.report import summarise
from experiments.protocol import changes


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Colour: change of unseen chosen responses; a ring: below its start and both controls."""
    rows = [r for r in summarise(config, arrays) if (r["arm"], r["set"]) == ("dpo", "unseen")]
    wide = len(config.starts)
    figure, axes = plt.subplots(1, wide, figsize=(4.2 * wide + 1.5, 4), layout="constrained",
                                squeeze=False, sharey=True)  # fmt: skip
    most = np.nanmax([abs(r["chosen"]) for r in rows] or [1.0])
    numbers, picture = looks(config), None
    for panel, start in zip(axes[0], config.starts, strict=True):
        some = {(r["rate"], r["updates"]): r for r in rows if r["start"] == start}
        field = np.array([[some[rate, n]["chosen"] for n in numbers] for rate in config.rates])
        picture = panel.imshow(field, cmap="RdBu", vmin=-most, vmax=most, origin="lower",
                               aspect="auto")  # fmt: skip
        for i, rate in enumerate(config.rates):
            for j, n in enumerate(numbers):
                row = some[rate, n]
                ink = "white" if abs(row["chosen"]) > 0.7 * most else "black"
                panel.text(j, i, f"{row['chosen']:+.2f}", ha="center", va="center", fontsize=8,
                           color=ink)  # fmt: skip
                if changes.displaced(row):
                    panel.plot(j, i, "o", ms=34, mfc="none", mec=ink, mew=1.2)
        panel.set_xticks(range(len(numbers)), list(map(str, numbers)))
        panel.set_yticks(range(len(config.rates)), [f"{rate:g}" for rate in config.rates])
        panel.set(title=f"{start} epochs of supervision", xlabel="updates")
    axes[0, 0].set_ylabel("learning rate")
    bar = figure.colorbar(picture, ax=axes[0].tolist())  # pyright: ignore[reportArgumentType]  # there is a panel
    bar.set_label("unseen chosen responses (nats); ringed: displaced")
    return figure
