"""The map as a table and as a picture, and where the fall begins."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.dose.protocol import Config, Dose, looks
from experiments.protocol import changes
from experiments.protocol.arms import ARMS
from experiments.protocol.tables import percent, spread, table


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of `changes.rows` for every start and rate."""
    found = []
    for start in config.starts:
        for rate in config.rates:
            own = {"lengths": arrays["lengths"]}
            for arm in ARMS:
                for key in ("change", "diverged"):
                    own[f"{arm}_{key}"] = arrays[f"{Dose(start, rate, arm)}_{key}"]
            some = changes.rows(config, own, dict.fromkeys(ARMS, looks(config)))
            found += [{"start": start, "rate": rate, **row} for row in some]
    return found


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of DPO's doses, and the verdict."""
    some = [r for r in rows if r["arm"] == "dpo"]
    head = ["start, rate, updates", "unseen chosen", "fell", "beyond coin", "beyond supervision",
            "displaced", "trained chosen", "diverged"]  # fmt: skip
    pairs = zip(some[::2], some[1::2], strict=True)
    lines = [
        [f"{u['start']} epochs, {u['rate']:g}, {u['updates']}", spread(u, "chosen"),
         percent(u["chosen_fell"]), spread(u, "beyond_coin"), spread(u, "beyond_sft"),
         "yes" if changes.displaced(u) else "no", spread(t, "chosen"), str(u["diverged"])]
        for t, u in pairs
    ]  # fmt: skip
    told = [r for r in some if r["set"] == "unseen"]
    fell = [r for r in told if changes.displaced(r)]
    said = (
        f"Unseen chosen responses are displaced, below their start and below both controls, at"
        f" {len(fell)} of {len(told)} doses."
    )
    if fell:
        least = min(fell, key=lambda r: r["rate"] * r["updates"])
        said += (
            f" The smallest such dose, by rate times updates: {least['updates']} updates at"
            f" {least['rate']:g} after {least['start']} epochs of supervision,"
            f" {spread(least, 'chosen')} nats."
        )
    return f"{table(head, lines)}\n\n{changes.verdict(config, said)}"


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
