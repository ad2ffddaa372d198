"""The tables in print, and in words which losses lower unseen chosen responses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.entanglement_dynamics.protocol import Config
from experiments.protocol import changes
from experiments.protocol.changes import CONTROLS
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
        _verdict(by, updates),
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
