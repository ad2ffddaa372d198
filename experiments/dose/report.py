"""The map as a table, and where the fall begins."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    return f"{table(head, lines)}\n\n{said}"
