"""What became of chosen responses under every loss, and whether the pull ratio said so."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.entanglement_dynamics import protocol
from experiments.entanglement_dynamics.protocol import Config
from experiments.protocol import arms, changes
from experiments.protocol.changes import SETS, about, of_set
from experiments.protocol.correlation import spearman
from experiments.protocol.intervals import mean_of, mean_of_known

Arrays = Mapping[str, np.ndarray]


def log_ratio(pull: np.ndarray) -> np.ndarray:
    """``ln(d_w / d_l)`` of the mean pulls over the axis of pairs, ``[... pairs 2] -> [...]``.

    Infinite where only one side is pulled; NaN without either, or where a mean pulls the wrong way.
    """
    chosen, rejected = -pull[..., 0].mean(axis=-1), pull[..., 1].mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(chosen) - np.log(rejected)


def level_of(config: Config, arrays: Arrays) -> float:
    """Mean margin on unseen pairs, nats, that three of four runs of losses reach in an epoch."""
    reached = [curve(config, arrays, name, seed)[0].max()
               for name in config.losses for seed in range(config.seeds)]  # fmt: skip
    return float(np.nanquantile(reached, 0.25))


def curve(config: Config, arrays: Arrays, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean margin ``[looks]`` and chosen change ``[looks unseen]`` of unseen pairs, from 0 on."""
    change = arrays[f"{name}_change"][seed, :, config.trained :]
    change = np.concatenate([np.zeros_like(change[:1]), change])
    return (change[..., 0] - change[..., 1]).mean(axis=-1), change[..., 0]


def summarise(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """``changes`` of every arm, then ``losses`` and ``predictors``."""
    looks = protocol.looks(config)
    rows = changes.rows(config, arrays, looks)
    epoch = arms.updates_of(config, 1)
    level = level_of(config, arrays)
    ratios, ends, matched = {}, {}, {}
    for name in protocol.names(config):
        row = {"table": "losses", "name": name, "level": level, "updates": epoch}
        k = looks[name].index(epoch)
        end = arrays[f"{name}_change"][:, k]
        margin = end[..., 0] - end[..., 1]
        for which in SETS:
            row |= about(f"{which}_chosen", config, mean_of, of_set(config, end[..., 0], which))
            row |= about(f"{which}_margin", config, mean_of, of_set(config, margin, which))
            right = (of_set(config, margin, which) > 0).astype(float)
            row |= about(f"{which}_right", config, mean_of, right)
        curves = [curve(config, arrays, name, seed) for seed in range(config.seeds)]
        at = np.stack([changes.between(x, changes.reached(margin, level)) for margin, x in curves])
        row["reached"] = int((~np.isnan(at[:, 0])).sum())
        row |= about("matched", config, mean_of_known, at)
        if name in config.losses:
            ratios[name] = log_ratio(arrays[f"{name}_start"])
            along = log_ratio(arrays[f"{name}_pull"][:, :epoch].reshape(config.seeds, -1, 2))
            row |= {"log_r": _mean(ratios[name]), "log_r_along": _mean(along)}
            ends[name], matched[name] = (
                mean_of(of_set(config, end[..., 0], "unseen")),
                mean_of_known(at),
            )
        rows.append(row)
    for target, found in (("equal updates", ends), ("equal margin", matched)):
        x, y = (np.stack(list(d.values()), axis=1) for d in (ratios, found))
        each = [_ranked(*pair) for pair in zip(x, y, strict=True)]
        rows.append({"table": "predictors", "target": target, "rho_seeds": each})
    return rows


def _mean(x: np.ndarray) -> float:
    """Over seeds; infinite if one is."""
    with np.errstate(invalid="ignore"):
        return float(x.mean())


def _ranked(x: np.ndarray, y: np.ndarray) -> float:
    known = ~(np.isnan(x) | np.isnan(y))
    return float(spearman(x[known], y[known])) if known.sum() > 2 else float("nan")
