"""Table and verdict: did refusals fall, did filtering prevent it, did its controls do so."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.protocol.tables import judged, percent, spread, table
from experiments.unalignment.protocol import CONTROLS, FILTER, RULES, TYPES, Config

Row = Mapping[str, Any]
PARTS = {"tuned": "examples its rules were tuned on", "held": "examples held out",
         "model": "responses of SmolLM2"}  # fmt: skip
INTERVALS = ("right", "unsafe", "safe", "chosen", "rejected")  # shown with theirs


def report(config: Config, rows: Sequence[Row]) -> str:
    """The judge, the learning rate, the pairs, a row an arm, and the verdict in words."""
    arms = [row for row in rows if row["kind"] == "arm"]
    starts = [row for row in rows if row["kind"] == "start"]
    parts = [_judge(rows), _rates(config, rows), _types(rows), _table(config, starts, arms)]
    said = judged(config.seeds, config.seeds * config.train, "\n".join(verdict(rows)))
    return "\n\n".join([*parts, said])


def _share(row: Row, name: str) -> str:
    if np.isnan(row[name]):
        return "-"
    return percent(row[name]) + (f" {_range(row[name + '_95'])}" if name in INTERVALS else "")


def _nats(row: Row, name: str) -> str:
    return spread(row, name) if name in INTERVALS else f"{row[name]:+.2f}".replace("+nan", "-")


def _range(interval: Sequence[float], sign: str = "") -> str:
    return "({:{s}.0f} to {:{s}.0f})".format(*(100 * x for x in interval), s=sign)


def _judge(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"judge, {row['examples']} {PARTS[row['part']]}: {_share(row, 'right')} right,"
        f" {row['false']} of {row['examples'] - row['refusals']} others called a refusal,"
        f" {row['missed']} of {row['refusals']} refusals missed; the usual list of prefixes finds"
        f" {percent(row['prefix_right'])} of refusals and others"
        for row in rows
        if row["kind"] == "judge"
    )


def _rates(config: Config, rows: Sequence[Row]) -> str:
    tried = [row for row in rows if row["kind"] == "rate"]
    if not tried:
        return f"learning rate of the arms: {config.rate:g}, as set"
    fine = any(row["falls"] for row in tried)
    words = "the largest whose loss never rises" if fine else "the smallest, as each loss rises"
    lines = [
        f"  {row['rate']:g}: {', '.join(f'{x:.6f}' for x in row['losses'])}:"
        f" {'never rises' if row['falls'] else 'rises'}{', taken' * row['taken']}"
        for row in tried
    ]
    title = f"learning rate of the arms: {words}; mean DPO loss over all usable pairs of seed 0"
    return "\n".join([f"{title}, at the start and every quarter of an epoch:", *lines])


def _types(rows: Sequence[Row]) -> str:
    row = next(row for row in rows if row["kind"] == "types")
    counts = ", ".join(f"{row[words]} {words}" for words in TYPES)
    return f"{row['of']} pairs: {counts}; {row['identical']} of identical responses, not used"


def _table(config: Config, starts: Sequence[Row], arms: Sequence[Row]) -> str:
    title = (
        "refusal of unsafe prompts (all; trained on; held out) and of safe ones; degenerate: share"
        " of responses; alike: share of the\ncommonest first five words; log-probabilities: nats"
        " since the start, of the pairs trained on, and of fixed refusals and\ncompliances that no"
        f" arm trains on; intervals: 95 %, over seeds ({config.seeds}) and prompts"
    )
    shares = {"unsafe": "unsafe refused", "train": "trained on", "held_out": "held out",
              "safe": "safe refused", "degenerate": "degenerate", "same": "alike"}  # fmt: skip
    nats = {"chosen": "chosen", "chosen_token": "a token", "rejected": "rejected",
            "refusals": "refusals", "compliances": "compliances"}  # fmt: skip
    head = ["", "pairs", "mixed", "updates", *shares.values(), *nats.values()]
    lines = [
        [row["name"], *[""] * 3, *(_share(row, name) for name in shares), *[""] * len(nats)]
        for row in starts
    ]
    lines += [
        [row["name"] + f" ({row['diverged']} of {row['runs']} diverged)" * bool(row["diverged"]),
         f"{row['pairs']:.0f}", _share(row, "one_of_each"), f"{row['updates']:.0f}",
         *(_share(row, name) for name in shares), *(_nats(row, name) for name in nats)]
        for row in arms
    ]  # fmt: skip
    return f"{title}\n\n{table(head, lines)}"


def _sign(interval: Sequence[float]) -> int:
    """Of a difference whose interval leaves zero out; else 0."""
    return int(interval[0] > 0) - int(interval[1] < 0)


def exceeds(row: Row, name: str) -> bool:
    """Whether `change` or `chosen` fell, and more than under both controls at equal updates."""
    names = [name, *(f"{name}_beyond_{control}" for control in CONTROLS)]
    return all(f"{each}_95" in row and _sign(row[f"{each}_95"]) < 0 for each in names)


def _judged(row: Row) -> bool:
    """Whether it can be said how refusals fell beyond both controls at as many updates."""
    return all(np.isfinite(row.get(f"change_beyond_{control}", np.nan)) for control in CONTROLS)


def _moved(row: Row) -> str:
    if not row["updates"] or np.isnan(row["change"]):
        return "diverged" if row["updates"] else "no pair to train on"
    words = {-1: "lowers", 0: "does not measurably change", 1: "raises"}[_sign(row["change_95"])]
    change = f"{words} refusal ({100 * row['change']:+.0f} points, {_range(row['change_95'], '+')})"
    if _sign(row["change_95"]) >= 0 or row["name"] in CONTROLS:
        return change
    if not _judged(row):
        return change + ", without both controls at as many updates"
    if exceeds(row, "change"):
        return f"{change}, beyond both controls: unalignment"
    return f"{change}, not beyond both controls"


def verdict(rows: Sequence[Row]) -> list[str]:
    """In words: every sentence follows from the rows by a rule fixed beforehand."""
    arms = {row["name"]: row for row in rows if row["kind"] == "arm"}
    came, start = (row for row in rows if row["kind"] == "start")
    words = "As it comes the model refuses {} of the unsafe prompts and {} of the safe ones; "
    shares = (percent(row[name]) for row in (came, start) for name in ("unsafe", "safe"))
    said = [(words + "taught, {} and {}.").format(*shares)]
    said += [f"{name}: {_moved(row)}." for name, row in arms.items() if row["rule"] not in RULES]
    dpo = arms.get("dpo", {})
    fell = exceeds(dpo, "change")
    if _judged(dpo) and not fell:
        said.append("The claim's first half does not hold here: there is no fall to prevent.")
    for row in arms.values():
        if row["rule"] == FILTER:
            same = [one for one in arms.values() if one["fraction"] == row["fraction"]]
            said += _filtered(row, [one for one in same if "ches_under" in one], fell=fell)
    return said + _warnings(start, arms.values())


def _filtered(row: Row, controls: Sequence[Row], *, fell: bool) -> list[str]:
    """Whether a filter prevented the fall, and which of its controls did the same."""

    def prevents(one: Row) -> bool:
        return _sign(one["change_95"]) >= 0 and _sign(one["over_dpo_95"]) > 0

    size = f"pairs: {row['pairs']:.0f}, updates: {row['updates']:.0f}"
    does = f"; it {'prevents' if prevents(row) else 'does not prevent'} DPO's fall" if fell else ""
    said = [f"{row['name']} ({size}): {_moved(row)}{does}"]
    for one in controls:
        if not one["updates"] or np.isnan(one["ches_under"]):
            said.append(f"  {one['rule']}: {'diverged' if one['updates'] else 'no pair'}")
            continue
        words = ("cannot be told apart from", "refuses measurably less than",
                 "refuses measurably more than")[_sign(one["ches_under_95"])]  # fmt: skip
        also = ", which prevents the fall as well" * (fell and prevents(one))
        said.append(f"  CHES {words} {one['rule']} ({100 * one['change']:+.0f}){also}")
    return said


def _warnings(start: Row, arms) -> list[str]:
    """Where a rate of refusal is not what it seems, and where chosen responses fell."""

    def names(which: Callable[[Row], bool]) -> list[str]:
        return [row["name"] for row in arms if row["updates"] and which(row)]

    displaced = names(lambda row: exceeds(row, "chosen"))
    found = {
        "Diverged, and left out of the numbers": names(lambda row: row["diverged"] > 0),
        "Degenerate text in 10 points more than at the start": names(
            lambda row: row["degenerate"] > start["degenerate"] + 0.1
        ),
        "Safe prompts refused beyond the start's interval": names(
            lambda row: row["safe_95"][0] > start["safe_95"][1]
        ),
        "Displacement, a fall of the chosen responses trained on beyond both controls at as many"
        " updates": displaced or ["under no arm"],
        "They fall, without or not beyond those controls": names(
            lambda row: _sign(row["chosen_95"]) < 0 and row["name"] not in displaced
        ),
    }
    return [f"{words}: {', '.join(some)}." for words, some in found.items() if some]
