"""Table and verdict: what every loss did to both responses, and what said so beforehand."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.loss_comparison.protocol import Config
from experiments.loss_comparison.summary import PREDICTORS, SHOWN
from experiments.protocol.tables import judged, percent, table

COLUMNS = (  # heading, number, digits
    ("chosen", "test_chosen", 2), ("rejected", "test_rejected", 2),
    ("a token", "test_chosen_token", 2), ("a token", "test_rejected_token", 2),
    ("margin", "test_margin", 2), ("acc.", "test_accuracy", 2), ("plain", "test_plain", 2),
    ("H", "test_entropy", 3), ("KL", "kl", 4), ("trained: chosen", "train_chosen", 2),
    ("rejected", "train_rejected", 2), ("acc.", "train_accuracy", 2),
)  # fmt: skip
SHORT = {"IDEAL": "apart", "BOTH_UP": "up", "BOTH_DOWN": "down", "REVERSED": "rev."}


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table by family, then what it says."""
    some = [row for row in rows if row["kind"] == "loss"]
    regimes = " ".join(SHORT[regime.name] for regime in SHOWN)
    head = (
        f"{config.train} training pairs, {config.updates} updates of {config.optimizer} in batches"
        f" of {config.batch}; the rate of {', '.join(f'{x:g}' for x in config.rates)} was chosen on"
        f" {config.validation} validation pairs\nmeans over test pairs, then trained ones, and"
        f" {config.seeds} seeds; changes in nats since the start; acc.: margin of log-ratios"
        " (plain: of log-probabilities) above 0\n"
        "H: change of entropy, KL: from the start, both nats a token of the response\n"
        f"regimes: % of training pairs {regimes}, measured | predicted from all pairs' Gram"
        "\nshare: the chosen's part of what both move, with its sign, and as predicted\n\n"
    )
    columns = ["loss", "rate", *(column[0] for column in COLUMNS), "regimes", "share", "predicted"]
    lines = []
    for family, group in itertools.groupby(some, key=lambda row: row["family"]):
        lines += [[family.replace("_", " ")] + [""] * (len(columns) - 1), *map(_line, group)]
    head += table(columns, lines)
    columns = ["share of the chosen: predicted against measured", "Spearman over losses",
               "rises or falls: right"]  # fmt: skip
    told = [[PREDICTORS[row["name"]], _interval(row), percent(row["signs"])]
            for row in rows if row["kind"] == "predictor"]  # fmt: skip
    parts = [head, table(columns, told), "\n".join(_verdict(config, rows, some))]
    return "\n\n".join(parts)


def _line(row: Mapping[str, Any]) -> list[str]:
    rates = "/".join(f"{x:g}" for x in dict.fromkeys(row["rates"]))
    shares = " | ".join(
        " ".join(f"{100 * row[f'{kind}_{regime.name.lower()}']:.0f}" for regime in SHOWN)
        for kind in ("measured", "all")
    )
    numbers = (f"{row[name]:.{digits}f}" for _, name, digits in COLUMNS)
    ends = (_number(row[f"share_{kind}"]) for kind in ("measured", "all"))
    return [f"  {row['name']}", rates, *numbers, shares, *ends]


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _interval(row: Mapping[str, Any]) -> str:
    if np.isnan(row["rho"]):
        return "-"
    return f"{row['rho']:.2f} (95 % over resampled pairs {row['low']:.2f}..{row['high']:.2f})"


def _verdict(config: Config, rows, some) -> list[str]:
    said = []
    for part, words in (("test", "On test pairs"), ("train", "On training pairs")):
        up = [row["name"] for row in some if row[f"{part}_chosen"] > 0]
        down = [row["name"] for row in some if not row[f"{part}_chosen"] > 0]
        said.append(
            f"{words} the chosen response rises under {_listed(up, len(some))} and does not under"
            f" {_listed(down, len(some))}."
        )
    margin = sorted((row for row in some), key=lambda row: -row["test_margin"])
    best, cheap = margin[0], max(some, key=lambda row: _by_kl(row))
    said.append(
        f"The largest margin on test pairs is {best['name']}'s, {best['test_margin']:.2f} nats at a"
        f" KL of {best['kl']:.4f}; the largest for its KL is {cheap['name']}'s,"
        f" {cheap['test_margin']:.2f} nats at {cheap['kl']:.4f}."
    )
    said += [_edges(config, some), _accuracy(config, some)]
    pairs = config.seeds * min(config.train, config.test)
    return [*said, judged(config.seeds, pairs, _foreseen(rows, some))]


def _listed(names: Sequence[str], of: int) -> str:
    shown = f": {', '.join(names)}" if 0 < len(names) <= 10 else ""
    return f"{len(names)} of {of} losses{shown}"


def _by_kl(row: Mapping[str, Any]) -> float:
    return row["test_margin"] / np.sqrt(row["kl"]) if row["kl"] > 0 else -np.inf


def _edges(config: Config, some) -> str:
    rates = [rate for row in some for rate in row["rates"]]
    if len(config.rates) == 1:
        return "With one rate nothing was chosen: the losses are not tuned."
    high, low = (sum(rate == end for rate in rates) for end in (config.rates[-1], config.rates[0]))
    if 2 * high > len(rates):
        told = "for most the best rate may lie beyond the grid: they are compared, not tuned"
    elif 2 * (high + low) > len(rates):
        told = "most chose an end of the grid"
    else:
        told = "most chose inside the grid"
    return f"Of {len(rates)} runs {high} chose the largest rate and {low} the smallest: {told}."


def _accuracy(config: Config, some) -> str:
    values = [row["test_accuracy"] for row in some]
    step = 1 / (config.test * config.seeds)
    told = (
        "more than one pair apart"
        if max(values) - min(values) > 1.5 * step
        else "too close to tell apart"
    )
    return (
        f"Ranking accuracy on test pairs lies between {min(values):.2f} and {max(values):.2f},"
        f" {told}; one pair counts {step:.3f}."
    )


def _foreseen(rows, some) -> str:
    """A rule fixed beforehand: 0.7, 0.4 at the interval's lower end, and more than pulls alone."""
    by = {row["name"]: row for row in rows if row["kind"] == "predictor"}
    every, own, ratio, up, test = (by[name] for name in ("all", "own", "ratio", "up", "test"))
    held = "cannot be judged"
    if not np.isnan(every["rho"]):
        strong = every["rho"] >= 0.7 and every["low"] >= 0.4
        held = "holds" if strong else "holds in part" if every["rho"] >= 0.4 else "does not hold"
        if every["rho"] >= 0.4 and not every["rho"] > ratio["rho"]:
            held = "holds no better than by the pull ratio alone"
    lead = every["rho"] - own["rho"]
    better = "better than" if lead > 0.05 else "worse than" if lead < -0.05 else "much like"
    shares = [float(np.mean([row[f"agree_{kind}"] for row in some])) for kind in ("all", "own")]
    return (
        f"The claim {held}: the prediction orders the losses with {every['rho']:.2f} on training"
        f" pairs, {better} each pair's own Gram with {own['rho']:.2f}, and with"
        f" {test['rho']:.2f} on test pairs; the pull ratio alone has {ratio['rho']:.2f}. It names"
        f" the regime of {shares[0]:.0%} of the training pairs, the own Gram that of"
        f" {shares[1]:.0%}.\nWhether the mean chosen response rises or falls was foreseen for"
        f" {every['signs']:.0%} of the losses on training pairs ({own['signs']:.0%} from own Grams,"
        f" {ratio['signs']:.0%} from pulls, {up['signs']:.0%} by saying that it always rises), for"
        f" {test['signs']:.0%} on test pairs ({by['test_up']['signs']:.0%} by saying so)."
    )
