"""R^2 over learning rates, as a table and in words."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.first_order.protocol import Config, parts, rates_of

HOLDS = 0.9  # R^2 below this: the theory has stopped holding


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Share of the measured variation that the prediction itself explains: nothing is fitted."""
    left = ((measured - predicted) ** 2).sum()
    return float(1 - left / ((measured - measured.mean()) ** 2).sum())


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Pearson's, of all log-probabilities: what is left when the scale is not asked for."""
    return float(np.corrcoef(predicted.ravel(), measured.ravel())[0, 1])


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each optimizer, clipping and learning rate, over all seeds."""
    todo, n, rows = parts(config), config.pairs, []
    for optimizer, clip in itertools.product(config.optimizers, config.clips):
        at = [i for i, part in enumerate(todo) if (part.optimizer, part.clip) == (optimizer, clip)]
        for j, rate in enumerate(rates_of(config, optimizer)):
            one, many = arrays["measured"][at, 0, j], arrays["measured"][at, 1, j]
            total, frozen = rate * arrays["total"][at], rate * arrays["frozen"][at]
            rows.append(
                {
                    "optimizer": optimizer,
                    "clip": clip,
                    "rate": rate,
                    "predicted_nats": float(np.abs(total[:, :n]).mean()),
                    "one": r_squared(total[:, :n], one[:, :n]),
                    "one_seeds": [
                        r_squared(a, b) for a, b in zip(total[:, :n], one[:, :n], strict=True)
                    ],
                    "others": r_squared(total[:, n:], one[:, n:]) if config.others else math.nan,
                    "own": r_squared(rate * arrays["own"][at], one[:, :n]),
                    "own_correlation": correlation(arrays["own"][at], one[:, :n]),
                    "signs": float((np.sign(total) == np.sign(one)).mean()),
                    "many": r_squared(frozen[:, :n], many[:, :n]),
                    "many_nats": float(np.abs(many[:, :n]).mean()),
                }
            )
    return rows


def ends(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """The smallest learning rate from which on the theory does not hold; None if it always does."""
    failing = [row["rate"] for row in rows if not row[column] >= HOLDS]
    holding = [row["rate"] for row in rows if row[column] >= HOLDS]
    failing = [rate for rate in failing if not holding or rate > max(holding)]
    return min(failing) if failing else None


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and in words where the theory ends."""
    head = (
        f"R^2 of predicted against measured changes of log-probabilities, {config.seeds} seeds x"
        f" {config.pairs} pairs x 2 (no fit: 1 is exact, below 0 is worse than the mean)\n"
        "one step: pairs of the batch, pairs outside of it, and pairs of the batch from their own"
        " Gram alone\n(r: its correlation); "
        f"{config.steps} steps: from the first gradient; nats: mean change; signs: share right\n\n"
    )
    lines = [
        "optimizer  clip  rate      nats  one step   outside      own      r  signs"
        f" {config.steps:>3} steps     nats"
    ]
    for row in rows:
        lines.append(
            "{optimizer:<9} {clip:>5g} {rate:>5.0e} {predicted_nats:>9.4f} {one:>9.4f}"
            " {others:>9.4f} {own:>8.2f} {own_correlation:>6.2f} {signs:>6.2f} {many:>9.3f}"
            " {many_nats:>8.4f}".format(**row)
        )
    words = []
    for key, group in itertools.groupby(rows, key=lambda row: (row["optimizer"], row["clip"])):
        some = list(group)
        said = []
        for column, what in (("one", "one step"), ("many", f"{config.steps} steps")):
            end = ends(some, column)
            if not any(row[column] >= HOLDS for row in some):
                said.append(f"{what} at no learning rate tried")
            elif end is None:
                said.append(f"{what} at all learning rates up to {some[-1]['rate']:g}")
            else:
                said.append(f"{what} below {end:g}")
        clipped = "" if math.isinf(key[1]) else f", gradient clipped to {key[1]:g}"
        words.append(f"{key[0]}{clipped}: first-order theory holds (R^2 >= {HOLDS:g}) for "
                     + " and ".join(said) + ".")  # fmt: skip
    for optimizer, group in itertools.groupby(rows, key=lambda row: row["optimizer"]):
        some = list(group)
        words.append(
            f"{optimizer}: a pair's own Gram, without its neighbours in the batch, has an R^2 of at"
            f" most {max(row['own'] for row in some):.2f} and a correlation of at most"
            f" {max(row['own_correlation'] for row in some):.2f}."
        )
    words.append(
        "Where the changes are near the rounding of float32 log-probabilities (about 1e-5 nats),"
        " a small learning rate lowers R^2 too."
    )
    return head + "\n".join(lines) + "\n\n" + "\n".join(words)
