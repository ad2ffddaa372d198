"""R^2 over learning rates, as a table, in words, and as a figure."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.first_order.protocol import Config, parts, rates_of
from experiments.protocol.tables import judged, table

COLOURS = {"chosen": "#1b6ca8", "rejected": "#777777"}
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
            rows.append({
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
                **_controls(arrays, at, rate, one[:, :n]),
                "signs": float((np.sign(total) == np.sign(one)).mean()),
                "many": r_squared(frozen[:, :n], many[:, :n]),
                "many_nats": float(np.abs(many[:, :n]).mean()),
            })  # fmt: skip
    return rows


def _controls(arrays: Mapping[str, np.ndarray], at: list[int], rate: float, one: np.ndarray
              ) -> dict[str, float]:  # fmt: skip
    """Of what is said of the next pair, and of the next pair's Gram under this one's pulls.

    They come as near as the predictions where all pairs move alike. NaN of a batch of one pair.
    """
    names = ("total", "own", "gram", "pull")
    total, own, gram, pull = (arrays[name][at].astype(np.float64) for name in names)
    n = one.shape[1]
    if n == 1:
        return {"another": math.nan, "another_correlation": math.nan}
    size = arrays["factor"][at][:, None, None] / n
    foreign = ((gram - np.roll(gram, 1, axis=1)) @ pull[..., None])[..., 0]
    return {
        "another": r_squared(rate * np.roll(total[:, :n], 1, axis=1), one),
        "another_correlation": correlation(own + size * foreign, one),
    }


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
        "one step: pairs of the batch, and outside of it; own: pairs of the batch from their own"
        " Gram alone, and its correlation;\nanother: what is predicted of another pair of the"
        " batch, and the correlation of another pair's Gram;\n"
        f"{config.steps} steps: from the first gradient; nats: mean change; signs: share right\n\n"
    )
    columns = {
        "optimizer": ("optimizer", ""), "clip": ("clip", "g"), "rate": ("rate", ".0e"),
        "predicted_nats": ("nats", ".4f"), "one": ("one step", ".4f"),
        "others": ("outside", ".4f"), "own": ("own", ".2f"), "own_correlation": ("r", ".2f"),
        "another": ("another", ".2f"), "another_correlation": ("r", ".2f"),
        "signs": ("signs", ".2f"), "many": (f"{config.steps} steps", ".3f"),
        "many_nats": ("nats", ".4f"),
    }  # fmt: skip
    lines = [[format(row[name], form) for name, (_, form) in columns.items()] for row in rows]
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
            f" {max(row['own_correlation'] for row in some):.2f}; what is predicted of another pair"
            f" has an R^2 of at most {max(row['another'] for row in some):.2f}."
        )
    words.append(
        "Where the changes are near the rounding of float32 log-probabilities (about 1e-5 nats),"
        " a small learning rate lowers R^2 too."
    )
    pairs = config.seeds * (config.pairs + config.others)
    said = judged(config.seeds, pairs, "\n".join(words))
    return f"{head}{table([word for word, _ in columns.values()], lines)}\n\n{said}"


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Above: a point a response, at the largest rate that holds. Below: R^2 over rates."""
    rows, todo, n = summarise(config, arrays), parts(config), config.pairs
    count = len(config.optimizers)
    figure, axes = plt.subplots(
        2, count, figsize=(4.6 * count, 8), layout="constrained", squeeze=False
    )
    clip = config.clips[0]
    for k, optimizer in enumerate(config.optimizers):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        holding = [r["rate"] for r in mine if r["clip"] == clip and r["one"] >= HOLDS]
        rate = max(holding, default=rates_of(config, optimizer)[0])
        j = rates_of(config, optimizer).index(rate)
        at = [i for i, part in enumerate(todo) if (part.optimizer, part.clip) == (optimizer, clip)]
        panel = axes[0, k]
        for side, name in enumerate(COLOURS):
            x = rate * arrays["total"][at, :, side]
            y = arrays["measured"][at, 0, j, :, side]
            style = {"color": COLOURS[name], "s": 22}
            panel.scatter(x[:, :n], y[:, :n], label=f"{name}, in the batch", **style)
            if config.others:
                panel.scatter(
                    x[:, n:], y[:, n:], label=f"{name}, outside", facecolors="none",
                    edgecolors=COLOURS[name], s=22,
                )  # fmt: skip
        panel.axline((0, 0), slope=1, color="black", lw=0.8, zorder=0)
        clipped = "no clipping" if math.isinf(clip) else f"clipped to {clip:g}"
        panel.set_title(f"{optimizer}, one step at {rate:g}, {clipped}", fontsize=10)
        panel.set_xlabel("predicted change of log-probability (nats)")
        panel.set_ylabel("measured change (nats)")
        if k == 0:
            panel.legend(fontsize=8)
        _draw_reach(axes[1, k], config, mine, legend=k == 0)
    return figure


def _draw_reach(panel, config: Config, rows: Sequence[Mapping[str, Any]], *, legend: bool) -> None:
    lines = (("one", "one step", "#1b6ca8"), ("many", f"{config.steps} steps", "#c8402f"),
             ("own_correlation", "one step, own Gram only (correlation)", "#777777"))  # fmt: skip
    for clip, dash in zip(config.clips, ("-", "--", ":", "-."), strict=False):
        some = [row for row in rows if row["clip"] == clip]
        for column, name, colour in lines:
            label = name if math.isinf(clip) else f"{name}, clipped to {clip:g}"
            panel.plot(
                [row["rate"] for row in some],
                np.clip([row[column] for row in some], -1, 1),
                dash, marker="o", ms=3, color=colour, label=label,
            )  # fmt: skip
    panel.axhline(HOLDS, color="black", lw=0.6)
    panel.set_xscale("log")
    panel.set_ylim(-1.05, 1.05)
    panel.set_xlabel("learning rate")
    panel.set_ylabel("R² of the prediction (below -1 drawn at -1)")
    if legend:
        panel.legend(fontsize=8, loc="lower left")
