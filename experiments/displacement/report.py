"""The forecast in print, the table, ten lines of words, and the figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.displacement.protocol import Config, looks
from experiments.protocol import changes
from experiments.protocol.arms import ARMS
from experiments.protocol.changes import COLOURS, NAMES, of_set
from experiments.protocol.correlation import auc
from experiments.protocol.figures import courses
from experiments.protocol.tables import percent, spread, table
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.training.pairset import PairSet

SAID = 16  # responses that are said beforehand, at most


def foretold(unseen: np.ndarray, forecast: np.ndarray, pairs: PairSet, tokenizer: Tokenizer) -> str:
    """Which unseen chosen responses will fall, by how much: said before the training."""
    lines = []
    for row, change in list(zip(unseen, forecast, strict=True))[:SAID]:
        pair = pairs.pairs[row]
        ids = pair.tokens[0][pair.starts[0] : len(pair.tokens[0]) - pair.ends[0]]
        text = " ".join(tokenizer.decode(ids.tolist()).split())
        lines.append([text if len(text) < 58 else f"{text[:55]}...", f"{change:+.2f}",
                      "falls" if change < 0 else "rises"])  # fmt: skip
    head = ["foretold before the training: unseen chosen response", "nats", ""]
    count = int((forecast < 0).sum())
    return (
        f"{table(head, lines)}\nof all {len(forecast)}, {count} will fall; on average"
        f" {forecast.mean():+.2f} nats\n"
    )


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """``changes`` of every arm, and how good the ``forecast`` was."""
    rows = changes.rows(config, arrays, dict.fromkeys(ARMS, looks(config)))
    measured = of_set(config, arrays["dpo_change"][:, -1, :, 0], "unseen")
    expected = arrays["forecast"][..., 0]
    fell = measured < 0
    return [*rows, {
        "table": "forecast", "unseen": measured.size, "fell": int(fell.sum()),
        "foretold": int((expected < 0).sum()), "right": float((fell == (expected < 0)).mean()),
        "auc": float(auc(-expected.ravel(), fell.ravel())), "mean": float(measured.mean()),
        "expected": float(expected.mean()),
        "control_fell": float((of_set(config, arrays["sft_change"][:, -1, :, 0], "unseen") < 0
                               ).mean()),
    }]  # fmt: skip


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """One table, and words for a reader from outside the field."""
    last = [r for r in rows if r["table"] == "changes" and r["updates"] == looks(config)[-1]]
    by = {(r["arm"], r["set"]): r for r in last}
    told = next(r for r in rows if r["table"] == "forecast")
    head = ["after training", "trained: chosen", "rejected", "unseen: chosen", "fell", "rejected"]
    lines = [
        [NAMES[arm], spread(by[arm, "trained"], "chosen"), spread(by[arm, "trained"], "rejected"),
         spread(by[arm, "unseen"], "chosen"), percent(by[arm, "unseen"]["chosen_fell"]),
         spread(by[arm, "unseen"], "rejected")]
        for arm in ARMS
    ]  # fmt: skip
    unseen, trained = by["dpo", "unseen"], by["dpo", "trained"]
    words = [
        "Log-probabilities in nats since the training began; in brackets the middle 95 % of a"
        " bootstrap.",
        f"DPO was shown {config.pairs} pairs of answers and told which one is better.",
        f"The better answers that it was shown moved by {trained['chosen']:+.2f}, the worse ones by"
        f" {trained['rejected']:+.2f}.",
        f"Better answers to other questions moved by {spread(unseen, 'chosen')}:"
        f" {told['fell']} of {told['unseen']} became less likely.",
        _judged(unseen),
        f"Training went on with the better answers alone lowers {percent(told['control_fell'])} of"
        " them.",
        f"Before the training it was foretold that {told['foretold']} would fall, by"
        f" {told['expected']:+.2f} on average; it was {told['mean']:+.2f}.",
        f"The forecast was right for {percent(told['right'])} of the answers; of one that fell and"
        f" one that did not it put the right one lower in {percent(told['auc'])} of cases.",
        "What lowers an unseen answer is other pairs: the loss asks for a difference only, and the"
        " worse answers' fall takes what is like them along.",
        f"One seed of {config.unseen} unseen pairs; three seeds and all controls:"
        " docs/forecast.md.",
    ]
    return f"{table(head, lines)}\n\n" + "\n".join(words)


def _judged(row: Mapping[str, Any]) -> str:
    if changes.displaced(row):
        return "That is displacement: below zero, and below both controls."
    if row["chosen_95"][1] < 0:
        return "That is below zero, but not surely below both controls."
    return "That is not surely below zero: no displacement is shown here."


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Courses of the unseen chosen responses, and the forecast against what came."""
    rows = summarise(config, arrays)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    courses(left, rows, "unseen")
    left.set_title("preferred answers that were not trained on")
    left.legend()
    expected = arrays["forecast"][..., 0].ravel()
    measured = of_set(config, arrays["dpo_change"][:, -1, :, 0], "unseen").ravel()
    ends = [min(expected.min(), measured.min()), max(expected.max(), measured.max())]
    right.plot(ends, ends, color="black", lw=0.6)
    right.plot(expected, measured, "o", ms=5, color=COLOURS["dpo"], alpha=0.7)
    right.axhline(0, color="black", lw=0.3)
    right.axvline(0, color="black", lw=0.3)
    right.set(title="each a preferred answer", xlabel="foretold before the training (nats)",
              ylabel="measured after it (nats)")  # fmt: skip
    return figure
