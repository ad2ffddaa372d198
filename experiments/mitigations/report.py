"""The tables in print, in words which methods keep unseen chosen responses up, and the figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.mitigations import protocol
from experiments.mitigations.protocol import Config
from experiments.mitigations.summary import courses, places
from experiments.protocol import changes
from experiments.protocol.changes import CONTROLS, between
from experiments.protocol.tables import percent, spread, table

Row = Mapping[str, Any]


def report(config: Config, rows: Sequence[Row]) -> str:
    """All tables, then the verdict."""
    methods = [r for r in rows if r["table"] == "methods"]
    updates, level = methods[0]["updates"], _of_dpo(methods, "unseen_margin")
    ends = [r for r in rows if r["table"] == "changes" and r["updates"] == updates]
    return "\n\n".join([
        "change of log-probability since the start, nats (95 % over seeds and pairs), after one"
        f" epoch, {config.seeds} seeds x {config.unseen} unseen pairs:",
        changes.shown(ends),
        "unseen pairs after that epoch; ranked: the chosen is the more likely; right: its margin"
        " grew:",
        _ends(methods),
        "unseen pairs where their margin is DPO's after that epoch,"
        f" {level:+.2f} nats in the mean of seeds; controls after as many updates:",
        _matched(config, methods),
        changes.verdict(config, _verdict(config, methods, ends)),
    ])  # fmt: skip


def _of_dpo(methods: Sequence[Row], field: str) -> float:
    return next(r[field] for r in methods if r["name"] == "dpo")


def displaced(row: Row) -> bool:
    """`changes.displaced` at DPO's margin."""
    at = {k.removeprefix("matched_"): x for k, x in row.items() if k.startswith("matched_")}
    return changes.displaced(at)


def _ends(rows: Sequence[Row]) -> str:
    head = ["method", "chosen", "rejected", "margin", "ranked", "right", "KL a token"]
    return table(head, [
        [r["name"], *(spread(r, f"unseen_{n}") for n in ("chosen", "rejected", "margin")),
         *(percent(r[f"unseen_{n}"]) for n in ("ranked", "right")), spread(r, "unseen_kl", 4)]
        for r in rows
    ])  # fmt: skip


def _matched(config: Config, rows: Sequence[Row]) -> str:
    beyond = [f"beyond {words}" for words in CONTROLS.values()]
    head = ["method", "reached", "chosen", "over DPO", "rejected", *beyond, "ranked", "KL a token"]
    return table(head, [
        [r["name"], f"{r['reached']} of {config.seeds}",
         *(spread(r, f"matched_{n}") for n in ("chosen", "over_dpo", "rejected")),
         *("" if r["name"] in CONTROLS else spread(r, f"matched_beyond_{c}") for c in CONTROLS),
         percent(r["matched_ranked"]), spread(r, "matched_kl", 4)]
        for r in rows
    ])  # fmt: skip


def _verdict(config: Config, methods: Sequence[Row], ends: Sequence[Row]) -> str:
    plain = next(r for r in ends if (r["arm"], r["set"]) == ("dpo", "unseen"))
    kl = _of_dpo(methods, "matched_kl")
    said = [
        f"DPO moves unseen chosen responses by {spread(plain, 'chosen')} nats and rejected ones by"
        f" {spread(plain, 'rejected')} in an epoch: "
        + ("displacement, below the start and both controls." if changes.displaced(plain) else
           "no displacement, which is a fall below the start and both controls.")
    ]  # fmt: skip
    others = [r for r in methods if r["name"] not in ("dpo", *CONTROLS)]
    there = [r for r in others if r["reached"] == config.seeds]
    groups = {
        "above their start": lambda up, over: up > 0,
        "higher than under DPO, not clearly than their start": lambda up, over: over > 0 >= up,
        "not higher than under DPO": lambda up, over: max(up, over) <= 0,
    }
    for words, fits in groups.items():
        some = [r for r in there if fits(r["matched_chosen_95"][0], r["matched_over_dpo_95"][0])]
        each = "; ".join(_named(r, kl) for r in some) or "under no method"
        said.append(f"At DPO's margin unseen chosen responses are {words}: {each}.")
    if short := [f"{r['name']} ({r['reached']} of {config.seeds} seeds)"
                 for r in others if r["reached"] < config.seeds]:  # fmt: skip
        said.append(f"Not compared, for they do not reach it: {', '.join(short)}.")
    if broken := {r["arm"]: r["diverged"] for r in ends if r["diverged"]}:
        said.append("Diverged: " + ", ".join(f"{n} ({k} seeds)" for n, k in broken.items()) + ".")
    return "\n".join(said)


def _named(row: Row, plain: float) -> str:
    times = f"{row['matched_kl'] / plain:.1f} x DPO's" if plain > 0 else f"{row['matched_kl']:.4f}"
    fell = ", displaced" if displaced(row) else ""
    return f"{row['name']} ({row['matched_chosen']:+.2f}, KL {times}{fell})"


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
