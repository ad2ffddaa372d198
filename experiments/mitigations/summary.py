"""The table and the verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.mitigations.methods import MASKS
from experiments.mitigations.protocol import Config, parts
from jaxpref import diagnostics


def courses(config: Config, arrays: Mapping[str, np.ndarray], at: int) -> dict[str, np.ndarray]:
    """What the table reads of one run, ``[looks]`` each: nats since the start, means over pairs."""
    n, logp = config.pairs, arrays["logp"][at]
    margin = logp[..., 0] - logp[..., 1]
    return {
        "chosen": logp[:, :n, 0].mean(axis=1),
        "rejected": logp[:, :n, 1].mean(axis=1),
        "margin": margin[:, :n].mean(axis=1),
        "held_chosen": logp[:, n:, 0].mean(axis=1),
        "held_margin": margin[:, n:].mean(axis=1),
        "accuracy": (margin[:, n:] > 0).mean(axis=1),
        "kl": arrays["kl"][at],
    }


def at_margin(course: Mapping[str, np.ndarray], target: float) -> dict[str, float]:
    """The course where its margin first reaches the target, between two looks; NaN if never."""
    margin = course["margin"]
    after = int(np.argmax(margin >= target))
    if not margin[after] >= target:
        return dict.fromkeys(course, float("nan"))
    if after == 0:
        return {name: float(x[0]) for name, x in course.items()}
    share = (target - margin[after - 1]) / (margin[after] - margin[after - 1])
    return {
        name: float(x[after - 1] + share * (x[after] - x[after - 1])) for name, x in course.items()
    }


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each optimizer and method: at the end, and at the margin that all reach."""
    todo, rows = parts(config), []
    every = [courses(config, arrays, i) for i in range(len(todo))]
    for optimizer in config.optimizers:
        targets = [
            min(every[i]["margin"].max() for i, p in enumerate(todo) if p[:2] == (seed, optimizer))
            for seed in range(config.seeds)
        ]
        for method in config.methods:
            at = [i for i, part in enumerate(todo) if part[1:] == (optimizer, method)]
            matched = [at_margin(every[i], targets[todo[i].seed]) for i in at]
            regimes = arrays["regime"][at]
            row: dict[str, Any] = {"optimizer": optimizer, "method": method}
            row["target"] = float(np.mean(targets))
            row["ideal"] = float((regimes == diagnostics.Regime.IDEAL).mean())
            row["mask"] = float(arrays["mask"][at, -1].mean())
            for name in every[0]:
                row[name] = [float(every[i][name][-1]) for i in at]
                row[f"matched_{name}"] = [each[name] for each in matched]
            rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> str:
    known = [x for x in values if x == x]
    if not known:
        return "never"
    return f"{np.mean(known):+.3f} ({np.std(known, ddof=1) if len(known) > 1 else 0:.3f})"


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and in words what kept the chosen response up."""
    lines, words = [], []
    for optimizer in config.optimizers:
        some = [row for row in rows if row["optimizer"] == optimizer]
        step = (
            f"steps of length {config.length:g}"
            if optimizer == "sgd"
            else f"rate {config.adam_rate:g}"
        )
        lines += [
            f"{optimizer}, {step}, {config.updates} updates of {config.batch} pairs, mean (sd) over"
            f" {config.seeds} seeds; nats since the start; ideal: share of pairs at the start",
            f"{'':<14}{'':>6}  {'after all updates':^54}  {'held out':^34}"
            f"  at the training margin {some[0]['target']:.3f}",
            f"{'method':<14}{'ideal':>6} {'chosen':>17} {'rejected':>17} {'margin':>17}"
            f" {'chosen':>17} {'right':>15} {'KL a token':>16} {'chosen':>17} {'KL a token':>17}",
        ]
        for row in some:
            ideal = "" if row["method"] in MASKS else f"{row['ideal']:.2f}"
            lines.append(
                f"{row['method']:<14}{ideal:>6} "
                + " ".join(
                    f"{_spread(row[name]):>17}"
                    for name in ("chosen", "rejected", "margin", "held_chosen", "accuracy", "kl",
                                 "matched_chosen", "matched_kl")
                )
            )  # fmt: skip
        lines.append("")
        words += _verdict(optimizer, some)
    return "\n".join([*lines, *words])


def _verdict(optimizer: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    by = {row["method"]: row for row in rows}
    if "dpo" not in by:
        return []
    plain = np.array(by["dpo"]["matched_chosen"])
    fell = np.mean(plain) < 0
    words = [
        f"{optimizer}: at the matched margin the chosen response {'fell' if fell else 'rose'} under"
        f" plain DPO, by {abs(np.mean(plain)):.3f} nats on average."
    ]
    better, worse = [], []
    for name, row in by.items():
        if name == "dpo":
            continue
        gain = np.array(row["matched_chosen"]) - plain
        (better if (gain > 0).all() else worse).append(f"{name} ({np.nanmean(gain):+.3f})")
    words.append("  Higher than under DPO in every seed: " + (", ".join(better) or "none") + ".")
    words.append("  Not in every seed: " + (", ".join(worse) or "none") + ".")
    up = [n for n, row in by.items() if (np.array(row["matched_chosen"]) >= 0).all()]
    words.append("  Not below its start in any seed: " + (", ".join(up) or "none") + ".")
    return words
