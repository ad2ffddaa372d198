"""What became of refusals, of the text and of the mass, arm by arm, and how sure that is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.protocol import changes, running
from experiments.protocol.intervals import mean_of_known
from experiments.unalignment import judge, pairs
from experiments.unalignment.judge import Label
from experiments.unalignment.protocol import CONTROLS, FILTER, RULES, TYPES, Arm, Config, arms

DIVERGED = ""  # the label of what no model said


def about(config: Config, name: str, x: np.ndarray) -> dict[str, Any]:
    """The mean of what is known of ``[seeds items]``, and its interval over seeds and items."""
    return changes.about(name, config, mean_of_known, x)


def accuracy(part: str) -> dict[str, Any]:
    """How well the judge does on one part of the labelled examples, and how the list of prefixes.

    A *false* refusal is something else that the judge calls one, a *missed* one the reverse.
    """
    rows = [row for row in judge.labelled() if row.part == part]
    said = np.array([judge.judge(row.text) for row in rows])
    label = np.array([row.label for row in rows])
    refusal, right = label == "refusal", float((said == label).mean())
    count = stats.binomtest(int((said == label).sum()), len(rows))
    prefix = np.array([judge.has_refusal_prefix(row.text) for row in rows])
    return {
        "part": part,
        "examples": len(rows),
        "refusals": int(refusal.sum()),
        "right": right,
        "right_95": list(count.proportion_ci(method="wilson")),
        "false": int(((said == "refusal") & ~refusal).sum()),
        "missed": int(((said != "refusal") & refusal).sum()),
        "prefix_right": float((prefix == refusal).mean()),
    }


def _sides(config: Config) -> dict[str, slice]:
    unsafe = config.train + config.held_out
    return {
        "unsafe": slice(0, unsafe),
        "train": slice(0, config.train),
        "held_out": slice(config.train, unsafe),
        "safe": slice(unsafe, unsafe + config.safe),
    }


def shares(labels: np.ndarray, label: Label) -> np.ndarray:
    """Of an arm's runs ``[seeds runs prompts] -> [seeds prompts]``; NaN where one diverged."""
    return np.where(labels == DIVERGED, np.nan, labels == label).mean(axis=1)


def texts_row(config: Config, texts: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Rates of texts ``[seeds runs prompts]`` and their labels."""
    refused, row = shares(labels, "refusal"), {}
    for name, side in _sides(config).items():
        row |= about(config, name, refused[:, side])
    said = texts[labels[..., 0] != DIVERGED].tolist()
    found = {
        "degenerate": shares(labels, "degenerate").ravel(),
        "same": [judge.sameness(run) for run in said],
    }
    return row | {name: float(mean_of_known(np.array(x))) for name, x in found.items()}


def moved(arrays: running.Arrays, runs: Sequence[int], name: str) -> np.ndarray:
    """Change since the start of `logp`, `gold` or `probes`, nats, ``[seeds runs prompts 2]``."""
    return arrays[name][:, runs].astype(np.float64) - arrays[f"start_{name}"][:, None]


def arm_row(
    config: Config, arrays: running.Arrays, labels: np.ndarray, arm: Arm, runs: Sequence[int]
) -> dict[str, Any]:
    """What an arm of these runs did: to texts, to the pairs trained on, to fixed responses."""
    trained, diverged = arrays["trained"][:, runs], arrays["diverged"][:, runs]
    mixed = arrays["start_kind"][:, None] == TYPES.index("one of each")
    row: dict[str, Any] = {
        "kind": "arm", "name": arm.name, "rule": arm.rule, "fraction": arm.fraction,
        "runs": diverged.size, "diverged": int(diverged.sum()),
        "pairs": float(trained.sum(axis=-1).mean()),
        "updates": float(arrays["updates"][:, runs].mean()),
        "one_of_each": float(mean_of_known(np.where(trained, mixed, np.nan).ravel())),
        **texts_row(config, arrays["texts"][:, runs], labels[:, runs]),
    }  # fmt: skip
    gold = arm.rule == "gold"
    change = np.where(trained[..., None], moved(arrays, runs, "gold" if gold else "logp"), np.nan)
    lengths = arrays["start_gold_lengths" if gold else "start_lengths"][:, None]
    fixed = moved(arrays, runs, "probes")
    for name, x in (
        ("chosen", change[..., 0]), ("chosen_token", change[..., 0] / lengths[..., 0]),
        ("rejected", change[..., 1]), ("refusals", fixed[..., 0]), ("compliances", fixed[..., 1]),
    ):  # fmt: skip
        row |= about(config, name, x.reshape(len(x), -1))
    return row


def summarise(config: Config, arrays: running.Arrays) -> list[dict[str, Any]]:
    """Rows of kind `judge`, `rate`, `types`, `start` (as it comes, and taught) and `arm`.

    An arm's ``change`` is of refusals on all unsafe prompts since the start, ``over_dpo`` against
    plain DPO, ``ches_under`` (of controls) against the CHES filter of the same size. At as many
    updates as a control, ``change_beyond_coin`` and ``change_beyond_sft`` are against that; where
    the pairs are the same, too, ``chosen_beyond_coin`` and ``chosen_beyond_sft``.
    """
    rows: list[dict[str, Any]] = [
        {"kind": "judge", **accuracy(part)} for part in ("tuned", "held", "model")
    ]
    rows += [
        {"kind": "rate", "rate": rate, "losses": losses.tolist(),
         "falls": bool(pairs.falls(losses)), "taken": rate == float(arrays["rate"])}
        for rate, losses in zip(config.rates, arrays["rate_losses"], strict=False)  # or none
    ]  # fmt: skip
    kind, usable = arrays["start_kind"], arrays["start_usable"]
    counts = {words: int((kind == i).sum()) for i, words in enumerate(TYPES)}
    rows.append({"kind": "types", **counts, "identical": int((~usable).sum()), "of": kind.size})
    taught = arrays["start_texts"][:, None]
    starts = {"as it comes": arrays["base_texts"][None, None], "taught": taught}
    rows += [
        {"kind": "start", "name": name, **texts_row(config, texts, pairs.judged(texts))}
        for name, texts in starts.items()
    ]
    every, unsafe = arms(config), _sides(config)["unsafe"]
    names = [arm.name for arm in every]
    of_name = {n: [a for a, name in enumerate(names) if name == n] for n in dict.fromkeys(names)}
    start = shares(pairs.judged(taught), "refusal")[:, unsafe]
    labels = np.where(arrays["diverged"][..., None], DIVERGED, pairs.judged(arrays["texts"]))
    refused = {
        name: shares(labels[:, runs], "refusal")[:, unsafe] for name, runs in of_name.items()
    }
    for name, runs in of_name.items():
        arm = every[runs[0]]
        row = arm_row(config, arrays, labels, arm, runs)
        row |= about(config, "change", refused[name] - start)
        others = {"over_dpo": "dpo"}
        filtered = f"{FILTER} {100 * arm.fraction:g}%"
        if arm.rule in RULES and name != filtered:
            others["ches_under"] = filtered
        for control in CONTROLS:
            there = of_name.get(control, [])
            if there and (arrays["updates"][:, runs] == arrays["updates"][:, there]).all():
                others[f"change_beyond_{control}"] = control
                if arm.rule != "gold" and name not in CONTROLS:
                    gap = moved(arrays, runs, "logp") - moved(arrays, there, "logp")
                    some = np.where(arrays["trained"][:, runs], gap[..., 0], np.nan)
                    row |= about(config, f"chosen_beyond_{control}", some.reshape(len(some), -1))
        for field, other in others.items():
            if other in refused:
                row |= about(config, field, refused[name] - refused[other])
        rows.append(row)
    return rows
