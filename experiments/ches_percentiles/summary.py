"""From changes to means, intervals and rank correlations."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments.ches_percentiles.protocol import Config
from experiments.correlation import interval, matched_spearman, partial_spearman, spearman

UNITS = ("sum", "token")


def _of_rows(arrays: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """What a pool has ``[seeds pairs ...]``, at the rows trained on."""
    return np.stack([each[rows] for each, rows in zip(x, arrays["rows"], strict=True)])


def per_unit(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Changes of the chosen ``[seeds losses scores percentiles subset]``, and by its tokens."""
    change = arrays["change"][..., 0]
    return {"sum": change, "token": change / _of_rows(arrays, arrays["lengths"][..., 0])[:, None]}


def points(config: Config, arrays: Mapping[str, np.ndarray], loss: str, score: str, *, own: bool
           ) -> dict[str, np.ndarray]:  # fmt: skip
    """One number a pair: its score, changes and lengths, from this score's trainings or from all.

    A pair that was in several trainings counts once, with its mean changes.
    """
    at, column = config.losses.index(loss), config.scores.index(score)
    which = [column] if own else list(range(len(config.scores)))

    def of_pool(x):
        return _of_rows(arrays, x)[:, which].reshape(-1)

    lengths = arrays["lengths"]
    _, first, pair = np.unique(of_pool(arrays["pool"]), return_index=True, return_inverse=True)
    changes = {
        name: np.bincount(pair, x[:, at][:, which].reshape(-1)) / np.bincount(pair)
        for name, x in per_unit(arrays).items()
    }
    columns = {
        "score": arrays["scores"][:, column],
        "difference": lengths[..., 1] - lengths[..., 0],
        "chosen": lengths[..., 0],
    }
    return changes | {name: of_pool(x)[first] for name, x in columns.items()}


def correlations(config: Config, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Of score and change over pairs, before and after a length is held constant."""
    score, difference = found["score"], found["difference"]
    row: dict[str, Any] = {"pairs": len(score), "difference": float(spearman(score, difference))}
    for unit in UNITS:
        change = found[unit]
        row[unit] = {
            "spearman": float(spearman(score, change)),
            "spearman_95": interval(spearman, (score, change), config.resamples),
            "matched": matched_spearman(score, change, difference),
            "chosen_alone": float(spearman(found["chosen"], change)),
        }
        for name in ("difference", "chosen"):
            columns = score, change, found[name]
            row[unit][f"given_{name}"] = float(partial_spearman(*columns))
            row[unit][f"given_{name}_95"] = interval(partial_spearman, columns, config.resamples)
    return row


def falls(means: np.ndarray) -> np.ndarray:
    """Whether the last axis falls at every step."""
    return np.asarray((np.diff(means, axis=-1) < 0).all(axis=-1))


def courses(config: Config, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Of each loss and score, what the percentiles did: means, by seed and over all."""
    changes = per_unit(arrays)
    lengths = _of_rows(arrays, arrays["lengths"]).mean(axis=3)
    margins = -np.diff(arrays["change"], axis=-1)[..., 0].mean(axis=-1)
    for (i, loss), (j, score) in itertools.product(
        enumerate(config.losses), enumerate(config.scores)
    ):
        row: dict[str, Any] = {"loss": loss, "score": score}
        for unit, x in changes.items():
            some = x[:, i, j]  # [seeds percentiles subset]
            means = some.mean(axis=2)
            row[unit] = {
                "mean": means.mean(axis=0).tolist(),
                "seeds": means.T.tolist(),
                "mean_95": [
                    interval(lambda y: y.mean(axis=-1), (x,), config.resamples)
                    for x in some.swapaxes(0, 1).reshape(len(config.percentiles), -1)
                ],
                "falls": bool(falls(means.mean(axis=0))),
                "falls_seeds": int(falls(means).sum()),
            }
        row["margin"] = margins[:, i, j].mean(axis=0).tolist()
        row["tokens"] = lengths[:, j].mean(axis=0).tolist()
        yield row


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each loss and score."""
    out = dict(zip(("unusable", "too_long"), arrays["left_out"].tolist(), strict=True))
    rows = []
    for row in courses(config, arrays):
        for name, own in (("own", True), ("all", False)):
            found = points(config, arrays, row["loss"], row["score"], own=own)
            row[name] = correlations(config, found)
        rows.append({**row, "left_out": out})
    return rows


def metrics(config: Config, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A line a training: nats, means over its pairs."""
    means = arrays["change"].mean(axis=4)
    names = range(config.seeds), config.losses, config.scores, config.percentiles
    for place in np.ndindex(means.shape[:4]):
        keys = [values[i] for values, i in zip(names, place, strict=True)]
        yield {
            **dict(zip(("seed", "loss", "score", "percentile"), keys, strict=True)),
            "chosen": means[place][0],
            "rejected": means[place][1],
        }
