"""Table and verdict: what every loss did to both responses, and what said so beforehand."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.loss_comparison.protocol import Config
from experiments.loss_comparison.summary import PREDICTORS, SHOWN

SHORT = {"IDEAL": "apart", "BOTH_UP": "up", "BOTH_DOWN": "down", "REVERSED": "rev."}


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table by family, then what it says."""
    some = [row for row in rows if row["kind"] == "loss"]
    regimes = " ".join(SHORT[regime.name] for regime in SHOWN)
    head = (
        f"{config.train} training pairs, {config.updates} updates of {config.optimizer} in batches"
        f" of {config.batch}; the rate of {', '.join(f'{x:g}' for x in config.rates)} was chosen on"
        f" {config.validation} validation pairs\nmeans over pairs and {config.seeds} seeds; changes"
        " in nats since the start; acc.: margin of log-ratios (of log-probabilities) above 0\n"
        "H: change of entropy, KL: from the start, both nats a token of the response, test pairs\n"
        f"regimes: % of training pairs {regimes}, measured | predicted from all pairs' Gram"
        "\nshare: the chosen's part of what both move, with its sign, and as predicted\n\n"
    )
    lines = [
        f"{'':<35} {'test':>41} {'':>15}   {'training':>24}\n"
        f"{'loss':<26} {'rate':>8} {'chosen':>7} {'reject.':>7} {'a token':>12} {'margin':>7}"
        f" {'acc.':>11} {'H':>7} {'KL':>8}   {'chosen':>7} {'reject.':>7} {'acc.':>5}"
        f" {'regimes':>25} {'share':>6} {'pred.':>6}"
    ]
    for family, group in itertools.groupby(some, key=lambda row: row["family"]):
        lines += ["", f"{family.replace('_', ' ')}"]
        lines += [_line(row) for row in group]
    lines += [
        "",
        f"{'share of the chosen: predicted against measured':<52} Spearman over losses",
    ]
    for row in rows:
        if row["kind"] == "predictor":
            lines.append(f"{PREDICTORS[row['name']]:<52} {_interval(row)}")
    return head + "\n".join(lines) + "\n\n" + "\n".join(_verdict(config, rows, some))


def _line(row: Mapping[str, Any]) -> str:
    rates = "/".join(f"{x:g}" for x in dict.fromkeys(row["rates"]))
    name = row["name"].replace("generalised_cross_entropy", "gce")
    shares = " | ".join(
        " ".join(f"{100 * row[f'{kind}_{regime.name.lower()}']:.0f}" for regime in SHOWN)
        for kind in ("measured", "all")
    )
    tokens = f"{row['test_chosen_token']:.2f} {row['test_rejected_token']:.2f}"
    return (
        f"  {name:<24} {rates:>8} {row['test_chosen']:>7.2f} {row['test_rejected']:>7.2f}"
        f" {tokens:>12} {row['test_margin']:>7.2f}"
        f" {row['test_accuracy']:>4.2f} ({row['test_plain']:.2f}) {row['test_entropy']:>7.3f}"
        f" {row['kl']:>8.4f}   {row['train_chosen']:>7.2f} {row['train_rejected']:>7.2f}"
        f" {row['train_accuracy']:>5.2f} {shares:>25} {_number(row['share_measured'])}"
        f" {_number(row['share_all'])}"
    )


def _number(value: float) -> str:
    return f"{'-':>6}" if np.isnan(value) else f"{value:>6.2f}"


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
    said += [_foreseen(rows, some), _signs(some)]
    return said


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
    """A rule fixed beforehand: at least 0.7, and at least 0.4 at the interval's lower end."""
    every, own, test = (
        next(row for row in rows if row.get("name") == name and row["kind"] == "predictor")
        for name in PREDICTORS
    )
    held = "cannot be judged"
    if not np.isnan(every["rho"]):
        strong = every["rho"] >= 0.7 and every["low"] >= 0.4
        held = "holds" if strong else "holds in part" if every["rho"] >= 0.4 else "does not hold"
    lead = every["rho"] - own["rho"]
    better = "better than" if lead > 0.05 else "worse than" if lead < -0.05 else "much like"
    shares = [float(np.mean([row[f"agree_{kind}"] for row in some])) for kind in ("all", "own")]
    return (
        f"The claim {held}: the prediction orders the losses with {every['rho']:.2f} on training"
        f" pairs, {better} each pair's own Gram with {own['rho']:.2f}, and with"
        f" {test['rho']:.2f} on test pairs. It names the regime of"
        f" {shares[0]:.0%} of the training pairs, the own Gram that of {shares[1]:.0%}."
    )


def _signs(some) -> str:
    share = {kind: float(np.mean([row[f"sign_{kind}"] for row in some]))
             for kind in ("all", "own", "test_all")}  # fmt: skip
    return (
        f"Whether the mean chosen response rises or falls was foreseen for {share['all']:.0%} of"
        f" the losses on training pairs ({share['own']:.0%} from own Grams), for"
        f" {share['test_all']:.0%} on test pairs."
    )
