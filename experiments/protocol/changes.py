"""What every arm did to trained and to unseen pairs, beside the two controls."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.protocol.intervals import clustered, mean_of
from experiments.protocol.settings import Protocol
from experiments.protocol.tables import judged, percent, spread, table

SETS = ("trained", "unseen")
SIDES = ("chosen", "rejected")
CONTROLS = {"coin": "labels by coin", "sft": "supervision continued"}
NAMES = {"dpo": "DPO", "coin": "DPO, labels by coin", "sft": "supervision continued"}
COLOURS = {"dpo": "#c8402f", "coin": "#777777", "sft": "#1b6ca8"}


def of_set(config: Protocol, x: np.ndarray, which: str) -> np.ndarray:
    """The trained or the unseen probes of ``[seeds probes ...]``."""
    return x[:, : config.trained] if which == "trained" else x[:, config.trained :]


def about(
    name: str, config: Any, function: Callable[..., Any], *columns: np.ndarray
) -> dict[str, Any]:
    """A statistic of all seeds together, its interval, and its value in each seed.

    Of the configuration it reads ``resamples``.
    """
    flat = [x.reshape(1, -1) for x in columns]
    return {
        name: float(function(*flat)[0]),
        f"{name}_95": clustered(function, columns, config.resamples),
        f"{name}_seeds": [float(x) for x in function(*columns)],
    }


def rows(
    config: Protocol, arrays: Mapping[str, np.ndarray], looks: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """A row for each arm, look and set: changes since the start, nats, and those beyond controls.

    Args:
        config: Of the run.
        arrays: ``{arm}_change [seeds looks probes 2]`` and ``{arm}_diverged [seeds]`` of every arm,
            and ``lengths [seeds probes 2]``.
        looks: Numbers of updates of each arm's looks; the controls are among the arms.
    """
    found = []
    for arm, numbers in looks.items():
        for k, number in enumerate(numbers):
            for which in SETS:
                change = of_set(config, arrays[f"{arm}_change"][:, k], which)
                tokens = of_set(config, arrays["lengths"], which)
                row = {"table": "changes", "arm": arm, "updates": number, "set": which}
                row["diverged"] = int((arrays[f"{arm}_diverged"] >= 0).sum())
                for i, side in enumerate(SIDES):
                    x = change[..., i]
                    row |= about(side, config, mean_of, x)
                    row[f"{side}_a_token"] = float((x / tokens[..., i]).mean())
                    row[f"{side}_fell"] = float(np.where(np.isnan(x), np.nan, x < 0).mean())
                for control in CONTROLS:
                    if arm not in CONTROLS and number in looks[control]:
                        there = looks[control].index(number)
                        other = of_set(config, arrays[f"{control}_change"][:, there], which)
                        gap = change[..., 0] - other[..., 0]
                        row |= about(f"beyond_{control}", config, mean_of, gap)
                found.append(row)
    return found


def reached(margin: np.ndarray, level: float) -> float:
    """Where a margin first reaches a level, in looks: 1.5 is half way from look 1 to look 2.

    Args:
        margin: ``[looks]``, the first one 0, before any update.
        level: Of the margin, nats.

    Returns:
        NaN if the level is never reached or is not above 0.
    """
    over = np.flatnonzero(margin >= level)
    if not over.size or not level > 0:
        return float("nan")
    j = int(over[0])
    return float(j - 1 + (level - margin[j - 1]) / (margin[j] - margin[j - 1]))


def between(values: np.ndarray, place: float) -> np.ndarray:
    """``[looks items]`` at a place of `reached`, by a straight line; NaN where that is NaN."""
    if np.isnan(place):
        return np.full(values.shape[1:], np.nan)
    j = max(math.ceil(place), 1)
    return values[j - 1] + (place - j + 1) * (values[j] - values[j - 1])


def displaced(row: Mapping[str, Any]) -> bool:
    """Whether chosen responses fell in the mean, and below both controls, beyond all intervals."""
    if not np.isfinite(row["chosen"]):  # of a seed that diverged nothing is known
        return False
    bounds = [row["chosen_95"], *(row.get(f"beyond_{c}_95", [np.nan] * 2) for c in CONTROLS)]
    return all(high < 0 for _, high in bounds)


def verdict(config: Protocol, said: str) -> str:
    """What is said of a run, if it has enough seeds and pairs in the smaller of both sets."""
    return judged(config.seeds, config.seeds * min(config.trained, config.unseen), said)


def shown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of `rows`."""
    head = ["arm", "set", "updates", "chosen", "a token", "fell", "rejected", "fell",
            *(f"beyond {words}" for words in CONTROLS.values())]  # fmt: skip
    return table(head, [
        [r["arm"] + f" ({r['diverged']} diverged)" * bool(r["diverged"]), r["set"],
         str(r["updates"]), spread(r, "chosen"), f"{r['chosen_a_token']:+.3f}",
         percent(r["chosen_fell"]), spread(r, "rejected"), percent(r["rejected_fell"]),
         *(spread(r, f"beyond_{c}") if f"beyond_{c}" in r else "" for c in CONTROLS)]
        for r in found
    ])  # fmt: skip
