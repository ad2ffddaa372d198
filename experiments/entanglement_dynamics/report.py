"""The tables in print, in words which losses lower unseen chosen responses, and the figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.entanglement_dynamics import protocol
from experiments.entanglement_dynamics.protocol import Config
from experiments.entanglement_dynamics.summary import log_ratio, summarise
from experiments.protocol import changes
from experiments.protocol.changes import CONTROLS, SETS, SIDES
from experiments.protocol.tables import percent, spread, table


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables, then the verdict."""
    by = {name: [r for r in rows if r["table"] == name]
          for name in ("changes", "losses", "predictors")}  # fmt: skip
    updates, level = by["losses"][0]["updates"], by["losses"][0]["level"]
    return "\n\n".join([
        "change of log-probability since the start, nats (95 % over seeds and pairs),"
        f" {config.seeds} seeds x {config.unseen} unseen pairs:",
        changes.shown(by["changes"]),
        f"after {updates} updates; r is the pull ratio; matched: unseen chosen where the unseen"
        f" margin is {level:.2f} nats, and how many of {config.seeds} runs reach it:",
        _losses(by["losses"]),
        changes.verdict(config, _verdict(by, updates)),
    ])  # fmt: skip


def _losses(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["loss", "r at the start", "along", "unseen: chosen", "margin", "right way", "matched",
            "reached", "trained: chosen", "margin"]  # fmt: skip
    return table(head, [
        [r["name"], *(f"{np.exp(r[n]):.2f}" if n in r else "" for n in ("log_r", "log_r_along")),
         spread(r, "unseen_chosen"), spread(r, "unseen_margin"), percent(r["unseen_right"]),
         spread(r, "matched"), str(r["reached"]), spread(r, "trained_chosen"),
         spread(r, "trained_margin")]
        for r in rows
    ])  # fmt: skip


def _verdict(by: Mapping[str, Sequence[Mapping[str, Any]]], updates: int) -> str:
    last = [r for r in by["changes"] if r["updates"] == updates and r["arm"] not in CONTROLS]
    said = []
    for which in ("unseen", "trained"):
        some = {r["arm"]: r for r in last if r["set"] == which}
        groups = {
            "below its start and both controls under": changes.displaced,
            "below its start, but not below both controls, under": lambda r: (
                r["chosen_95"][1] < 0 and not changes.displaced(r)),
            "above it under": lambda r: r["chosen_95"][0] > 0,
        }  # fmt: skip
        words = [f"{text} {', '.join(n for n, r in some.items() if test(r)) or 'no loss'}"
                 for text, test in groups.items()]  # fmt: skip
        said.append(f"After {updates} updates the mean {which} chosen response is "
                    + "; ".join(words) + ".")  # fmt: skip
    for row in by["predictors"]:
        found = [x for x in row["rho_seeds"] if x == x]
        each = ", ".join(f"{x:+.2f}" for x in found) or "no seed has a value"
        said.append(f"The pull ratio at the start orders the losses by their unseen chosen response"
                    f" at {row['target']}: rank correlation {each} (single seeds).")  # fmt: skip
    return "\n".join(said)


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
