"""What became of every loss at the rate it chose, and how well it could be foreseen."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.loss_comparison.protocol import Config, family, names, rows_of
from experiments.protocol import running
from jaxpref import diagnostics
from jaxpref.diagnostics import Regime

SHOWN = (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN, Regime.REVERSED)
DRAWS = 200  # of the bootstrap over training pairs


def chosen_rates(config: Config, arrays: running.Arrays) -> np.ndarray:
    """Number of the rate ``[losses seeds]`` that the validation pairs choose at the last look.

    The most log-ratio margins above 0; of equally many the largest mean of log σ of the margin; of
    equal means the smallest rate. A rate whose numbers are not finite is never chosen over others.
    """
    margin = _margins(arrays, rows_of(config, "validation"))[..., -1, :]  # [losses seeds rates n]
    right = (margin > 0).mean(axis=-1)
    with np.errstate(invalid="ignore"):
        likely = -np.logaddexp(0, -margin).mean(axis=-1)
    bad = ~np.isfinite(margin).all(axis=-1)
    right, likely = np.where(bad, -1.0, right), np.where(bad, -np.inf, likely)
    likely = np.where(right == right.max(axis=-1, keepdims=True), likely, -np.inf)
    return likely.argmax(axis=-1)


def _margins(arrays: running.Arrays, rows: slice) -> np.ndarray:
    moved = _moved(arrays)[..., rows, :]
    return moved[..., 0] - moved[..., 1]


def _moved(arrays: running.Arrays) -> np.ndarray:
    logp = arrays["logp"].astype(np.float64)
    return logp - logp[:, :, :, :1]


def at_choice(config: Config, arrays: running.Arrays, values: np.ndarray) -> np.ndarray:
    """``[losses seeds ...]`` of ``[losses seeds rates ...]``: at the rate that was chosen."""
    best = chosen_rates(config, arrays)
    best = best.reshape(*best.shape, *[1] * (values.ndim - 2))
    return np.take_along_axis(values, best, axis=2)[:, :, 0]


def courses(config: Config, arrays: running.Arrays) -> np.ndarray:
    """Changes since the start ``[losses seeds looks pairs 2]`` at the rate that was chosen."""
    return at_choice(config, arrays, _moved(arrays))


def regimes(change: np.ndarray) -> np.ndarray:
    """`Regime` of changes ``[*pairs 2]``; that of a change is the regime of a Gram of -1."""
    gram = np.broadcast_to(-np.eye(2), (*change.shape, 2))
    return np.asarray(diagnostics.regime(gram, change))


def predicted(config: Config, arrays: running.Arrays) -> dict[str, np.ndarray]:
    """First-order changes at the start, nats per unit of step ``[losses seeds pairs 2]``.

    ``all``: of training and test pairs, from their Gram with all training pairs; ``own``: of
    training pairs, each from its own Gram alone; ``ratio``: of training pairs, from the pulls
    alone, as if all gradients were as long and apart.
    """
    n = config.train
    found: dict[str, list] = {"all": [], "own": [], "ratio": list(-arrays["pull"].astype(float))}
    for pulls in arrays["pull"].astype(np.float64):
        every, own = [], []
        for gram, pull in zip(arrays["gram"].astype(np.float64), pulls, strict=True):
            still = np.zeros((config.test, 2))  # test pairs are pulled by nothing
            every.append(diagnostics.batch_change(gram, np.concatenate([pull, still])))
            alone = np.stack([gram[i, :, i] for i in range(n)])
            own.append(diagnostics.first_order_change(alone, pull))
        found["all"].append(np.stack(every))
        found["own"].append(np.stack(own))
    return {key: np.stack(values) for key, values in found.items()}


def share(change: np.ndarray) -> np.ndarray:
    """The chosen's part of what both move, with its sign, of means over pairs ``[... pairs 2]``.

    From -1, it alone moves and falls, to 1; it does not depend on how far the policy went.
    """
    mean = change.mean(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean[..., 0] / np.abs(mean).sum(axis=-1)


def summarise(config: Config, arrays: running.Arrays) -> list[dict[str, Any]]:
    """A row a loss, means over seeds; then a row for each predictor of the chosen's share."""
    fields = {**_measured(config, arrays), **_foreseen(config, arrays)}
    best, rows = chosen_rates(config, arrays), []
    for i, name in enumerate(names(config)):
        row: dict[str, Any] = {"kind": "loss", "name": name, "family": family(name)}
        row["rates"] = [config.rates[j] for j in best[i]]
        for field, values in fields.items():
            row[field] = _mean(values[i])
            row[f"{field}_sd"] = float(np.std(values[i], ddof=1)) if config.seeds > 1 else np.nan
        rows.append(row)
    return rows + _predictors(config, arrays)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _measured(config: Config, arrays: running.Arrays) -> dict[str, np.ndarray]:
    """Numbers ``[losses seeds]`` at the end of training with the chosen rate."""
    moved, found = courses(config, arrays)[:, :, -1], {}
    lengths = arrays["lengths"].astype(np.float64)
    logp = at_choice(config, arrays, arrays["logp"].astype(np.float64))[:, :, -1]
    entropy = at_choice(config, arrays, arrays["entropy"].astype(np.float64))
    for part in ("train", "test"):
        rows = rows_of(config, part)
        change, gained = moved[:, :, rows], np.subtract(*np.moveaxis(moved[:, :, rows], -1, 0))
        by_token = (change / lengths[:, rows]).mean(axis=2)
        found |= {
            f"{part}_chosen": change[..., 0].mean(axis=-1),
            f"{part}_rejected": change[..., 1].mean(axis=-1),
            f"{part}_chosen_token": by_token[..., 0],
            f"{part}_rejected_token": by_token[..., 1],
            f"{part}_margin": gained.mean(axis=-1),
            f"{part}_accuracy": (gained > 0).mean(axis=-1),
            f"{part}_plain": (logp[:, :, rows, 0] > logp[:, :, rows, 1]).mean(axis=-1),
            f"{part}_entropy": (entropy[:, :, -1, rows] - entropy[:, :, 0, rows]).mean(axis=(2, 3)),
        }
    return found | {"kl": at_choice(config, arrays, arrays["kl"])[:, :, -1].mean(axis=(2, 3))}


def _foreseen(config: Config, arrays: running.Arrays) -> dict[str, np.ndarray]:
    """Regimes of the training pairs, and the chosen's share of the change."""
    moved, change = courses(config, arrays)[:, :, -1], predicted(config, arrays)
    n, test = config.train, rows_of(config, "test")
    trained = {
        "measured": regimes(moved[:, :, :n]),
        **{kind: regimes(each[:, :, :n]) for kind, each in change.items()},
    }
    found = {
        f"{kind}_{regime.name.lower()}": (each == regime).mean(axis=-1)
        for kind, each in trained.items()
        for regime in SHOWN
    }
    for kind in change:
        found[f"agree_{kind}"] = (trained[kind] == trained["measured"]).mean(axis=-1)
    return found | {
        "share_measured": share(moved[:, :, :n]),
        "share_all": share(change["all"][:, :, :n]),
        "share_own": share(change["own"]),
        "share_test_measured": share(moved[:, :, test]),
        "share_test_all": share(change["all"][:, :, n:]),
        "sign_all": _same_sign(change["all"][:, :, :n], moved[:, :, :n]),
        "sign_own": _same_sign(change["own"], moved[:, :, :n]),
        "sign_test_all": _same_sign(change["all"][:, :, n:], moved[:, :, test]),
    }


def _same_sign(change: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Whether the mean chosen response goes the way that was predicted."""
    ways = [np.sign(x[..., 0].mean(axis=-1)) for x in (change, moved)]
    return (ways[0] == ways[1]).astype(np.float64)


PREDICTORS = {
    "all": "all pairs' Gram, training pairs",
    "own": "each pair's own Gram, training pairs",
    "ratio": "the pull ratio alone, training pairs",
    "up": "every loss raises the chosen, training pairs",
    "test": "Gram with the training pairs, test pairs",
    "test_ratio": "the pull ratio alone, test pairs",
    "test_up": "every loss raises the chosen, test pairs",
}


def _predictors(config: Config, arrays: running.Arrays) -> list[dict[str, Any]]:
    """Spearman's correlation over losses, of each seed, with the spread over resampled pairs.

    And ``signs``, the share of losses and seeds whose mean chosen response goes the way foreseen.
    """
    moved, change = courses(config, arrays)[:, :, -1], predicted(config, arrays)
    n, trained, tested = (
        config.train,
        moved[:, :, : config.train],
        moved[:, :, rows_of(config, "test")],
    )
    ratio = np.broadcast_to(change["ratio"].mean(axis=2, keepdims=True), tested.shape)
    both = {
        "all": (change["all"][:, :, :n], trained),
        "own": (change["own"], trained),
        "ratio": (change["ratio"], trained),
        "up": (np.ones_like(trained), trained),
        "test": (change["all"][:, :, n:], tested),
        "test_ratio": (ratio, tested),
        "test_up": (np.ones_like(tested), tested),
    }
    rows = []
    for name, (x, y) in both.items():
        seeds = [functools.partial(_rank, x[:, s], y[:, s]) for s in range(config.seeds)]
        drawn = np.concatenate([_resampled(one, x.shape[2]) for one in seeds])
        drawn = drawn[~np.isnan(drawn)]
        low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (np.nan, np.nan)
        each = [one(slice(None)) for one in seeds]
        rows.append(
            {"kind": "predictor", "name": name, "rho": _mean(np.array(each)), "rho_seeds": each,
             "low": float(low), "high": float(high), "signs": float(_same_sign(x, y).mean())}
        )  # fmt: skip
    return rows


def _rank(change: np.ndarray, moved: np.ndarray, pairs: Any) -> float:
    """Over losses, of changes ``[losses pairs 2]`` of some of the pairs."""
    x, y = share(change[:, pairs]), share(moved[:, pairs])
    known = np.isfinite(x) & np.isfinite(y)
    if known.sum() < 3:
        return float("nan")
    return float(diagnostics.spearman(jnp.asarray(x[known]), jnp.asarray(y[known])))


def _resampled(rank: Callable[[Any], float], pairs: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return np.array([rank(draw.integers(0, pairs, pairs)) for _ in range(DRAWS)])
