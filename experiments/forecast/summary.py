"""How well each signal forecast the change, as a table and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.correlation import interval, partial_spearman, spearman
from experiments.forecast.protocol import PROTOCOLS, SIGNALS, Config


def auc(score: np.ndarray, fell: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of the last axis: how often one that fell scores higher.

    NaN where all fell or none.
    """
    positive = fell.sum(axis=-1)
    both = positive * (fell.shape[-1] - positive)
    above = (stats.rankdata(score, axis=-1) * fell).sum(axis=-1) - positive * (positive + 1) / 2
    return np.where(both > 0, above / np.maximum(both, 1), np.nan)


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each protocol, number of updates and signal, over the pairs of all seeds."""
    rows = []
    columns = np.moveaxis(arrays["signals"], 1, 0).reshape(len(SIGNALS), -1)
    by = dict(zip(SIGNALS, columns, strict=True))
    for protocol in PROTOCOLS:
        for k, updates in enumerate(sorted(getattr(config, protocol))):
            change = arrays[protocol][:, k, :, 0].reshape(-1)
            fell = change < 0
            for name, score in by.items():
                rows.append(
                    {
                        "protocol": protocol,
                        "updates": updates,
                        "signal": name,
                        "cost": SIGNALS[name],
                        "fell": int(fell.sum()),
                        "of": len(fell),
                        "change": float(change.mean()),
                        "spearman": float(spearman(score, -change)),
                        "spearman_95": interval(spearman, (score, -change), config.resamples),
                        "given_length": float(
                            partial_spearman(score, -change, by["length difference"])
                        ),
                        "auc": float(auc(score, fell)),
                        "auc_95": interval(auc, (score, fell), config.resamples),
                    }
                )
    return rows


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and in words which signals forecast anything."""
    lines, words = [], []
    for protocol in PROTOCOLS:
        for updates in sorted(getattr(config, protocol)):
            some = [r for r in rows if (r["protocol"], r["updates"]) == (protocol, updates)]
            first = some[0]
            lines += [
                f"{protocol}, after {updates} updates of {config.optimizer} at {config.rate:g}:"
                f" {first['fell']} of {first['of']} chosen responses fell, mean change"
                f" {first['change']:+.4f} nats",
                f"{'signal':<34} {'Spearman (95 %)':>24} {'given length':>13} {'AUC (95 %)':>22}"
                "  cost a pair",
            ]
            for row in some:
                low, high = row["spearman_95"]
                area = "-" if row["auc"] != row["auc"] else "{:.2f} ({:.2f} to {:.2f})".format(
                    row["auc"], *row["auc_95"])  # fmt: skip
                lines.append(
                    f"{row['signal']:<34} {row['spearman']:>+7.2f} ({low:+.2f} to {high:+.2f})"
                    f" {row['given_length']:>+13.2f} {area:>22}  {row['cost']}"
                )
            lines.append("")
            words.append(_verdict(protocol, updates, some))
    return "\n".join([*lines, *words])


def _verdict(protocol: str, updates: int, rows: Sequence[Mapping[str, Any]]) -> str:
    told = [r for r in rows if r["spearman_95"][0] > 0]
    against = [r for r in rows if r["spearman_95"][1] < 0]
    best = sorted(told, key=lambda r: -r["spearman"])
    names = ", ".join(f"{r['signal']} ({r['spearman']:+.2f})" for r in best) or "no signal"
    said = f"{protocol}, {updates} updates: better than chance: {names}."
    if against:
        wrong = ", ".join(f"{r['signal']} ({r['spearman']:+.2f})" for r in against)
        said += f" The wrong way round: {wrong}."
    return said
