"""The tables, and the verdict in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.ches_percentiles.protocol import SCORES, Config


def _interval(value: float, ends: Sequence[float]) -> str:
    return f"{value:+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f})" if value == value else "-"


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables, and in words what the percentiles of each score did."""
    out = rows[0]["left_out"]
    lines = [
        f"pools: {config.seeds} of {config.pairs} pairs, subsets of {config.subset}; left out of"
        f" the data: {out['unusable']} rows without two different responses, {out['too_long']}"
        f" pairs longer than {config.limit} tokens",
        "",
    ]
    words = []
    for loss in config.losses:
        some = [row for row in rows if row["loss"] == loss]
        lines += [*_course_table(config, loss, some), ""]
        for kind, told in (("own", "its own subsets"), ("all", "all subsets")):
            lines += [*_correlation_table(loss, told, [(r["score"], r[kind]) for r in some]), ""]
        words += _verdict(config, loss, some)
    return "\n".join([*lines, *words])


def _course_table(config: Config, loss: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def line(name, cells, end=""):
        return f"{name:<26}" + "".join(f"{cell:>11}" for cell in cells) + end

    title = f"{loss}, {config.subset // config.batch} updates of RMSprop at {config.rate:g}: mean"
    lines = [
        f"{title} change of the chosen response's log-probability (nats) by percentile of a score",
        line("score", config.percentiles, "  falls at every step"),
    ]
    for row in rows:
        for unit, digits, label in (("sum", 3, SCORES[row["score"]]), ("token", 4, "  a token")):
            found = row[unit]
            told = f"  {'yes' if found['falls'] else 'no':<3} in {found['falls_seeds']} of"
            cells = [f"{x:+.{digits}f}" for x in found["mean"]]
            lines.append(line(label, cells, f"{told} {config.seeds} seeds"))
            for end, of_seeds in (("lowest", min), ("highest", max)) if config.seeds > 1 else ():
                cells = [f"{of_seeds(x):+.{digits}f}" for x in found["seeds"]]
                lines.append(line(f"    {end} of the seeds", cells))
        lines.append(line("  tokens", ["{:.1f}/{:.1f}".format(*x) for x in row["tokens"]]))
    return lines


def _correlation_table(loss: str, told: str, rows: Sequence[tuple[str, Any]]) -> list[str]:
    lines = [
        f"{loss}, Spearman of score and change over pairs of {told} ({rows[0][1]['pairs']} pairs in"
        " the first row); -1 if the score orders falls",
        f"{'score':<24} {'with length':>11}  {'change':<6} {'Spearman (95 %)':>24}"
        f" {'given length difference':>24} {'given chosen length':>24} {'in bins':>8}",
    ]
    for name, row in rows:
        for unit in ("sum", "token"):
            found, first = row[unit], unit == "sum"
            cells = [
                _interval(found[key], found[f"{key}_95"])
                for key in ("spearman", "given_difference", "given_chosen")
            ]
            matched = f"{found['matched']:+.2f}" if found["matched"] == found["matched"] else "-"
            lines.append(
                f"{SCORES[name] if first else '':<24}"
                f" {format(row['difference'], '+.2f') if first else '':>11}  {unit:<6}"
                + "".join(f" {cell:>24}" for cell in cells)
                + f" {matched:>8}"
            )
    return lines


def _verdict(config: Config, loss: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    by = {row["score"]: row for row in rows}
    words = [f"{loss}:"]
    grew = sum(x > 0 for row in rows for x in row["margin"])
    words.append(f"  The margin grew in {grew} of {len(rows) * len(config.percentiles)} subsets.")
    if ches := by.get("ches"):
        words += _paper(config, ches)
    drops = sorted(
        (row["sum"]["mean"][-1] - row["sum"]["mean"][0], name) for name, row in by.items()
    )
    told = ", ".join(f"{SCORES[name]} {drop:+.3f}" for drop, name in drops)
    words.append(f"  From lowest to highest percentile, nats, largest fall first: {told}.")
    strict = [SCORES[n] for n, row in by.items() if row["sum"]["falls"] and n != "ches"]
    words.append(f"  Other scores whose means fall at every step: {', '.join(strict) or 'none'}.")
    for unit, told in (("sum", "the sum"), ("token", "the change a token")):
        alone = rows[0]["all"][unit]["chosen_alone"]
        words.append(
            f"  Scores that order {told} better than chance over the pairs of all subsets:"
            f" {_below(by, unit, 'spearman')}; at equal length difference:"
            f" {_below(by, unit, 'given_difference')}; at equal chosen length:"
            f" {_below(by, unit, 'given_chosen')}. The chosen length alone: {alone:+.2f}."
        )
    if ches := by.get("ches"):
        words += _after_length(ches)
    return words


def _paper(config: Config, ches: Mapping[str, Any]) -> list[str]:
    words, whole = [], True
    for unit, told in (("sum", "nats"), ("token", "nats a token")):
        found = ches[unit]
        mean, falls = found["mean"], "falls" if found["falls"] else "does not fall"
        words.append(
            f"  By CHES percentile the mean change goes from {mean[0]:+.4f} to {mean[-1]:+.4f}"
            f" {told} and {falls} at every step ({found['falls_seeds']} of {config.seeds} seeds)."
        )
        if unit == "sum":
            whole = found["falls"] and mean[0] > 0 > mean[-1]
    words.append(
        "  The paper's finding, of sums: the lowest subset rises, the highest falls, every step is"
        f" one down: {'it holds here' if whole else 'not the whole of it here'}."
    )
    return words


def _after_length(ches: Mapping[str, Any]) -> list[str]:
    words = []
    for unit, told in (("sum", "sums"), ("token", "changes a token")):
        found = ches["all"][unit]
        said = "nothing is left that chance would not do"
        if found["spearman_95"][1] >= 0:
            said = "it did not order them to begin with"
        elif found["given_difference_95"][1] < 0:
            said = "something is left"
        before = _interval(found["spearman"], found["spearman_95"])
        after = _interval(found["given_difference"], found["given_difference_95"])
        words.append(f"  CHES and {told}: {before}; at equal length difference {after}: {said}.")
    return words


def _below(by: Mapping[str, Mapping[str, Any]], unit: str, key: str) -> str:
    """The scores whose interval is below zero."""
    names = [SCORES[n] for n, row in by.items() if row["all"][unit][f"{key}_95"][1] < 0]
    return ", ".join(names) or "none"
