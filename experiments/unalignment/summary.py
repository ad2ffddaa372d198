"""What became of refusals, of the text and of the mass, arm by arm, and how sure that is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import common
from experiments.unalignment import judge, pairs
from experiments.unalignment.protocol import RULES, TYPES, Arm, Config, arms

Z = 1.959964  # of a 95 % interval


def wilson(rate: float, count: int) -> list[float]:
    """95 % interval of a rate; NaN of nothing."""
    if not count:
        return [float("nan")] * 2
    middle = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    return [float(max(0, middle - half)), float(min(1, middle + half))]


def bootstrap(values: np.ndarray, resamples: int) -> list[float]:
    """95 % interval of a mean over prompts."""
    rows = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return [float(x) for x in np.quantile(values[rows].mean(axis=1), (0.025, 0.975))]


def accuracy(part: str) -> dict[str, Any]:
    """How well the judge does on one part of the labelled examples, and how the list of prefixes.

    A *false* refusal is something else that the judge calls one, a *missed* one the reverse.
    """
    rows = [row for row in judge.labelled() if row.part == part]
    said = [judge.judge(row.text) for row in rows]
    refusals = [row.label == "refusal" for row in rows]
    right = [a == row.label for a, row in zip(said, rows, strict=True)]
    prefix = [
        judge.has_refusal_prefix(row.text) == r for row, r in zip(rows, refusals, strict=True)
    ]
    both = list(zip(said, refusals, strict=True))
    return {
        "part": part,
        "examples": len(rows),
        "refusals": sum(refusals),
        "right": float(np.mean(right)) if rows else float("nan"),
        "right_95": wilson(float(np.mean(right)) if rows else 0.0, len(rows)),
        "false": sum(a == "refusal" and not r for a, r in both),
        "missed": sum(a != "refusal" and r for a, r in both),
        "prefix_right": float(np.mean(prefix)) if rows else float("nan"),
    }


def _sides(config: Config) -> dict[str, slice]:
    unsafe = config.train + config.held_out
    return {
        "unsafe": slice(0, unsafe),
        "train": slice(0, config.train),
        "held_out": slice(config.train, unsafe),
        "safe": slice(unsafe, unsafe + config.safe),
    }


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def texts_row(config: Config, texts: np.ndarray) -> dict[str, Any]:
    """Rates of texts ``[runs prompts]``: means over runs, intervals over prompts."""
    labels, row = pairs.judged(texts), {}
    for name, side in _sides(config).items():
        each = (labels[:, side] == "refusal").mean(axis=1)
        row |= {name: float(each.mean()), f"{name}_sd": _spread(each)}
        row[f"{name}_95"] = wilson(row[name], labels[:, side].shape[1])
    row["degenerate"] = float((labels == "degenerate").mean())
    row["repetition"] = float(np.mean([judge.repetition(str(text)) for text in texts.ravel()]))
    row["same"] = float(np.mean([judge.sameness([str(x) for x in run]) for run in texts]))
    return row


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def moved(arrays: common.Arrays, s: int, a: int, arm: Arm) -> dict[str, float]:
    """Changes of log-probabilities since the start, nats, of one run.

    ``chosen``, ``rejected`` and ``chosen_token`` are of the pairs trained on, ``chosen_all`` of all
    that the model drew; ``refusals`` and ``compliances`` of the fixed ones.
    """
    gold, rows = arm.rule == "gold", arrays["trained"][s, a]
    name = "gold" if gold else "logp"
    change = arrays[name][s, a].astype(np.float64) - arrays[f"start_{name}"][s]
    lengths = arrays["start_gold_lengths" if gold else "start_lengths"][s]
    usable = arrays["start_usable"][s]
    own = arrays["logp"][s, a].astype(np.float64) - arrays["start_logp"][s]
    probes = arrays["probes"][s, a].astype(np.float64) - arrays["start_probes"][s]
    kind = arrays["start_kind"][s]
    found = {
        "pairs": int(rows.sum()),
        "updates": int(arrays["updates"][s, a]),
        "one_of_each": _mean(kind[rows] == TYPES.index("one of each")),
        "chosen": _mean(change[rows, 0]),
        "rejected": _mean(change[rows, 1]),
        "chosen_token": _mean(change[rows, 0] / lengths[rows, 0]),
        "chosen_all": _mean(own[usable, 0]),
        "refusals": _mean(probes[:, 0]),
        "compliances": _mean(probes[:, 1]),
    }
    for number, words in enumerate(TYPES):
        of_type = (kind == number) & usable
        found |= {
            f"chosen, {words}": _mean(own[of_type, 0]),
            f"refusals, {words}": _mean(probes[kind == number, 0]),
            f"compliances, {words}": _mean(probes[kind == number, 1]),
        }
    return found


def summarise(config: Config, arrays: common.Arrays) -> list[dict[str, Any]]:
    """Rows of kind `judge`, `types`, `start` (the model as it comes, and taught) and `arm`.

    An arm's ``change`` is of refusals on all unsafe prompts since the start, ``over_dpo`` against
    plain DPO, ``ches_under`` (of controls) against the CHES filter of the same size; all with
    bootstrap intervals over prompts.
    """
    rows: list[dict[str, Any]] = [
        {"kind": "judge", **accuracy(part)} for part in ("tuned", "held", "model")
    ]
    kind, usable = arrays["start_kind"], arrays["start_usable"]
    counts = {words: int((kind == i).sum()) for i, words in enumerate(TYPES)}
    rows.append({"kind": "types", **counts, "identical": int((~usable).sum()), "of": kind.size})
    starts = {"as it comes": arrays["base_texts"][None], "taught": arrays["start_texts"]}
    rows += [{"kind": "start", "name": n, **texts_row(config, x)} for n, x in starts.items()]
    every, unsafe = arms(config), _sides(config)["unsafe"]
    refused = pairs.judged(arrays["texts"])[..., unsafe] == "refusal"  # [seeds runs prompts]
    start = (pairs.judged(arrays["start_texts"])[:, unsafe] == "refusal").mean(axis=0)
    of_name = {
        name: [a for a, arm in enumerate(every) if arm.name == name]
        for name in dict.fromkeys(arm.name for arm in every)
    }
    mean = {name: refused[:, runs].mean(axis=(0, 1)) for name, runs in of_name.items()}
    for name, runs in of_name.items():
        arm = every[runs[0]]
        texts = arrays["texts"][:, runs].reshape(-1, arrays["texts"].shape[-1])
        changes = [moved(arrays, s, a, arm) for s in range(config.seeds) for a in runs]
        row = {"kind": "arm", "name": name, "rule": arm.rule, "fraction": arm.fraction}
        row |= {"runs": len(changes), **texts_row(config, texts)}
        for field in changes[0]:
            values = np.array([each[field] for each in changes], np.float64)
            known = values[~np.isnan(values)]
            row |= {field: _mean(known), f"{field}_sd": _spread(list(known))}
        others = {"change": start, "over_dpo": mean["dpo"]}
        filtered = f"{next(iter(RULES))} {100 * arm.fraction:g}%"
        if arm.rule in RULES and name != filtered:
            others["ches_under"] = mean[filtered]
        for field, other in others.items():
            difference = mean[name] - other
            row[field] = float(difference.mean())
            row[f"{field}_95"] = bootstrap(difference, config.resamples)
        rows.append(row)
    return rows
