"""One figure: what fell, what three theories expected, and where the mass went."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.forecast import protocol
from experiments.forecast.protocol import Config
from experiments.forecast.summary import SIGNALS, at_horizon, forecasts, summarise
from experiments.protocol.arms import ARMS
from experiments.protocol.changes import COLOURS, NAMES, of_set
from experiments.protocol.figures import courses


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Six panels, from the arrays of a run."""
    rows = summarise(config, arrays)
    figure, axes = plt.subplots(2, 3, figsize=(16.5, 9.5), layout="constrained")
    for panel, which in zip(axes[0], ("unseen", "trained"), strict=False):
        courses(panel, rows, which)
        panel.set_title(f"chosen responses of {which} pairs")
        panel.legend(fontsize=8)
    _scatter(axes[0, 2], config, arrays)
    _areas(axes[1, 0], rows)
    _made_of(axes[1, 1], rows)
    _mass(axes[1, 2], rows)
    return figure


def _scatter(panel: Axes, config: Config, arrays: Mapping[str, np.ndarray]) -> None:
    name = "replay, model moved"
    expected = of_set(config, forecasts(arrays)[name][..., 0], "unseen")
    measured = of_set(config, at_horizon(config, arrays, "dpo")[..., 0], "unseen")
    for seed, (x, y) in enumerate(zip(expected, measured, strict=True)):
        panel.plot(x, y, ".", ms=5, alpha=0.7, label=f"seed {seed}")
    ends = [min(expected.min(), measured.min()), max(expected.max(), measured.max())]
    panel.plot(ends, ends, color="black", lw=0.6)
    panel.axhline(0, color="black", lw=0.3)
    panel.axvline(0, color="black", lw=0.3)
    updates = protocol.horizon(config)
    panel.set(title="unseen chosen responses, each a point",
              xlabel="forecast before training (nats)",
              ylabel=f"measured after {updates} updates (nats)")  # fmt: skip
    panel.legend(fontsize=8)


def _areas(panel: Axes, rows: list) -> None:
    place = {name: -i for i, name in enumerate(SIGNALS)}
    for shift, which, colour in ((0.15, "unseen", "#c8402f"), (-0.15, "trained", "#aaaaaa")):
        some = [r for r in rows if (r["table"], r.get("set")) == ("signals", which)
                and r["signal"] in SIGNALS]  # fmt: skip
        y = [place[r["signal"]] + shift for r in some]
        panel.hlines(y, *np.array([r["auc_95"] for r in some]).T, color=colour, lw=1)
        panel.plot([r["auc"] for r in some], y, "o", ms=4, color=colour, label=which)
    panel.axvline(0.5, color="black", lw=0.6)
    panel.set_yticks(list(place.values()), list(place), fontsize=8)
    panel.set(title="who foresees which chosen responses fall", xlabel="area under ROC (95 %)",
              xlim=(0, 1.02))  # fmt: skip
    panel.legend(fontsize=8, loc="lower left")


def _made_of(panel: Axes, rows: list) -> None:
    some = [r for r in rows if r["table"] == "shares" and r["side"] == "chosen"]
    parts = {"others": "#c8402f", "own": "#3c8d40", "drag": "#e0a030", "rest": "#bbbbbb"}
    up, down = np.zeros(len(some)), np.zeros(len(some))
    for name, colour in parts.items():
        value = np.array([r[name] for r in some])
        base = np.where(value >= 0, up, down)
        panel.bar(range(len(some)), value, bottom=base, color=colour, width=0.6, label=name)
        up, down = up + np.maximum(value, 0), down + np.minimum(value, 0)
    whole = np.array([r["measured"] for r in some])
    error = np.abs(np.array([r["measured_95"] for r in some]).T - whole)
    panel.errorbar(range(len(some)), whole, yerr=error, fmt="k_", ms=14, lw=1, label="measured")
    panel.axhline(0, color="black", lw=0.6)
    panel.set_xticks(range(len(some)), [f"{r['arm']}\n{r['set']}" for r in some], fontsize=8)
    panel.set(title="what an epoch's change of the chosen is made of", ylabel="nats")
    panel.legend(fontsize=8)


def _mass(panel: Axes, rows: list) -> None:
    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["table"] == "kinds"))
    for shift, arm in zip((0.22, 0, -0.22), ARMS, strict=True):
        some = [r for r in rows if r["table"] == "kinds" and r["arm"] == arm]
        y = [shift - kinds.index(r["kind"]) for r in some]
        panel.hlines(y, *np.array([r["a_token_95"] for r in some]).T, color=COLOURS[arm], lw=1)
        panel.plot([r["a_token"] for r in some], y, "o", ms=4, color=COLOURS[arm], label=NAMES[arm])
    panel.axvline(0, color="black", lw=0.6)
    panel.set_yticks([-i for i in range(len(kinds))], kinds, fontsize=8)
    panel.set(title="responses of every kind to unseen prompts", xlabel="change a token (nats)")
    panel.locator_params(axis="x", nbins=6)
    panel.legend(fontsize=8)
