"""The tables: what fell, who foresaw it, what it is made of, and where the mass went."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.forecast import protocol
from experiments.forecast.protocol import Config
from experiments.protocol import changes
from experiments.protocol.arms import ARMS
from experiments.protocol.changes import SETS, SIDES, about, of_set
from experiments.protocol.correlation import auc, partial_spearman, spearman
from experiments.protocol.intervals import mean_of
from experiments.protocol.kinds import KINDS
from jaxpref import diagnostics

Arrays = Mapping[str, np.ndarray]
EPOCH = "1 forward and backward a training pair"
FORECASTS = {  # of the change of both responses, in nats; what each costs, beside a JVP of a probe
    "gradient, plain": EPOCH,
    "metric, first order": EPOCH,
    "metric, with drag": EPOCH,
    "metric, model moved": EPOCH,
    "replay, first order": EPOCH,
    "replay, with drag": EPOCH,
    "replay, model moved": EPOCH,
}
ASTRAY = "a random direction"  # as far as the metric goes
FORWARD, NOTHING, OWN = "1 forward", "none", "1 forward and backward a response"
SIGNALS = {  # larger: a fall of the chosen response is expected
    **FORECASTS,
    "own Gram": OWN,
    "own Gram in the metric": OWN,
    "unembedding Gram (alpha-weighted)": FORWARD,
    "CHES": FORWARD,
    "CHES, length-normalised": FORWARD,
    "log-probability at the start": FORWARD,
    "log-probability a token": FORWARD,
    "length": NOTHING,
    ASTRAY: "1 JVP of a probe",
    "chance": NOTHING,
}
EXPLANATIONS = ("run's movement, first order", "run's movement, with drag")  # known afterwards


def forecasts(arrays: Arrays) -> dict[str, np.ndarray]:
    """Changes in nats that are expected, ``[seeds probes 2]``; explanations behind forecasts."""
    drag = lambda name: arrays[f"{name}_change"] - arrays[f"{name}_variance"] / 2  # noqa: E731
    found = [
        arrays["plain_change"], arrays["metric_change"], drag("metric"), arrays["metric_moved"],
        arrays["replay_change"], drag("replay"), arrays["replay_moved"],
        arrays["dpo_path_change"], drag("dpo_path"),
    ]  # fmt: skip
    return dict(zip((*FORECASTS, *EXPLANATIONS), found, strict=True))


def signals(config: Config, arrays: Arrays) -> dict[str, np.ndarray]:
    """`SIGNALS` and `EXPLANATIONS`, ``[seeds probes]``; NaN where one was not taken."""
    pull = config.beta / 2 * np.array([-1.0, 1.0])  # of DPO at the start
    logp, lengths = arrays["logp"][..., 0], arrays["lengths"][..., 0]
    chance = np.random.default_rng(0).random(logp.shape)
    expected = {name: -x[..., 0] for name, x in forecasts(arrays).items()}
    weighed, unknown = np.full_like(logp, np.nan), np.full((*logp.shape, 2), np.nan)
    astray = -arrays.get("astray_change", unknown)[..., 0]  # runs of before have none
    weighed[:, config.trained :] = (arrays["metric_gram"] @ pull)[..., 0]
    rest = [
        (arrays["gram"] @ pull)[..., 0], weighed,
        arrays["alpha_weighted_ches"], arrays["ches"], arrays["ches_length_normalised"],
        -logp, -logp / lengths, lengths, astray, chance,
    ]  # fmt: skip
    others = [name for name in SIGNALS if name not in FORECASTS]
    return {**expected, **dict(zip(others, rest, strict=True))}


def summarise(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """Rows of all tables; ``table`` says of which."""
    return [
        *changes.rows(config, arrays, {arm: protocol.looks(config, arm) for arm in ARMS}),
        *_told(config, arrays), *_sizes(config, arrays),
        *_shares(config, arrays), *_kinds(config, arrays), *_tokens(config, arrays),
    ]  # fmt: skip


def at_horizon(config: Config, arrays: Arrays, arm: str) -> np.ndarray:
    """Changes ``[seeds probes 2]`` under an arm after the epoch that is forecast."""
    there = protocol.looks(config, arm).index(protocol.horizon(config))
    return arrays[f"{arm}_change"][:, there]


def _told(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """How well each signal orders the falls of chosen responses, and says which fall."""
    rows, target = [], at_horizon(config, arrays, "dpo")[..., 0]
    for which in SETS:
        change = of_set(config, target, which)
        lengths = of_set(config, arrays["lengths"][..., 0], which)
        for name, signal in signals(config, arrays).items():
            score = of_set(config, signal, which)
            if np.isnan(score).any():
                continue
            row: dict[str, Any] = {"table": "signals", "set": which, "signal": name}
            row["cost"] = SIGNALS.get(name, "the run")
            row |= about("spearman", config, lambda s, c: spearman(s, -c), score, change)
            row |= about("auc", config, lambda s, c: auc(s, c < 0), score, change)
            given = partial_spearman(score, -change, lengths)
            row["given_length"] = float(np.mean(given))
            rows.append(row)
    return rows


def _sizes(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """Mean change of both responses, measured and forecast."""
    rows, measured = [], at_horizon(config, arrays, "dpo")
    for which in SETS:
        for i, side in enumerate(SIDES):
            true = of_set(config, measured, which)[..., i]
            for name, expected in {"measured": measured, **forecasts(arrays)}.items():
                row: dict[str, Any] = {"table": "sizes", "set": which, "side": side}
                row["forecast"] = name
                row |= about("mean", config, mean_of, of_set(config, expected, which)[..., i])
                row["of_measured"] = row["mean"] / float(true.mean())
                row["fell"] = float((of_set(config, expected, which)[..., i] < 0).mean())
                rows.append(row)
    return rows


def own_share(config: Config, arrays: Arrays, arm: str) -> np.ndarray:
    """What each probe's own pair pushes over the epoch, nats ``[seeds probes 2]``.

    Its pulls when it was shown, through its Gram in the metric of the run's optimizer. Unseen pairs
    push nothing; of trained ones it is known of the first few, and NaN of the others.
    """
    updates = protocol.horizon(config)
    found = np.zeros_like(at_horizon(config, arrays, arm))
    found[:, config.grams : config.trained] = np.nan
    for seed, rows in enumerate(arrays["rows"][:, : config.grams]):
        index = arrays[f"{arm}_index"][seed, :updates].reshape(-1)
        pull = arrays[f"{arm}_pull"][seed, :updates].reshape(-1, 2)
        for place, row in enumerate(rows):
            own = pull[index == row].sum(axis=0) / index.size
            found[seed, place] = -arrays[f"{arm}_path_gram"][seed, place] @ own
    return found


def shares(config: Config, arrays: Arrays, arm: str) -> dict[str, np.ndarray]:
    """The change ``[seeds probes 2]`` after the epoch, and what it is made of, in nats."""
    whole, own = at_horizon(config, arrays, arm), own_share(config, arrays, arm)
    first, drag = arrays[f"{arm}_path_change"], -arrays[f"{arm}_path_variance"] / 2
    return {"measured": whole, "others": first - own, "own": own, "drag": drag,
            "rest": whole - first - drag}  # fmt: skip


def _shares(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    rows = []
    for arm in ARMS:
        parts = shares(config, arrays, arm)
        for which in SETS:
            for i, side in enumerate(SIDES):
                row = {"table": "shares", "arm": arm, "set": which, "side": side}
                for name, x in parts.items():
                    some = of_set(config, x, which)[..., i]
                    some = some[:, : config.grams] if which == "trained" else some
                    row |= about(name, config, mean_of, some)
                rows.append(row)
    return rows


def by_kind(config: Config, arrays: Arrays, arm: str) -> dict[str, dict[str, np.ndarray]]:
    """Numbers of tokens ``[seeds unseen response]`` of each kind of response to unseen prompts."""
    names = (*diagnostics.TokenShifts._fields, "is_target")
    found = {
        side: {n: arrays[f"{arm}_{n}"][:, :, i] for n in names} for i, side in enumerate(SIDES)
    }
    for j, kind in enumerate(KINDS):
        x = {n: arrays[f"{arm}_kinds_{n}"] for n in names}
        shape = len(x["kl"]), len(KINDS) // 2, config.unseen, 2, -1
        found[kind] = {n: v.reshape(shape)[:, j // 2, :, j % 2] for n, v in x.items()}
    return found


def _kinds(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    rows = []
    for arm in ARMS:
        for kind, x in by_kind(config, arrays, arm).items():
            change = ((x["logp_after"] - x["logp_before"]) * x["is_target"]).sum(axis=-1)
            tokens = x["is_target"].sum(axis=-1)
            row = {"table": "kinds", "arm": arm, "kind": kind, "tokens": float(tokens.mean())}
            start = (x["logp_before"] * x["is_target"]).sum(axis=-1)
            row["start_a_token"] = float((start / tokens).mean())
            row |= about("change", config, mean_of, change)
            row |= about("a_token", config, mean_of, change / tokens)
            rows.append({**row, "fell": float((change < 0).mean())})
    return rows


def _tokens(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """Of all tokens of a kind: shifts of the greedy token, and where the mass went."""
    rows = []
    for arm in ARMS:
        for kind, x in by_kind(config, arrays, arm).items():
            real = x["is_target"].astype(bool)
            rank, change = x["new_top_rank"][real], (x["logp_after"] - x["logp_before"])[real]
            falls = (change < 0) & (x["rank_before"][real] > 1)
            greedy = np.exp(x["old_top_after"][real]) - np.exp(x["top_before"][real])
            rows.append({
                "table": "tokens", "arm": arm, "kind": kind, "tokens": int(real.sum()),
                "unshifted": float((rank == 1).mean()),
                "marginal": float(((rank > 1) & (rank <= 3)).mean()),
                "shifted": float((rank > 3).mean()),
                "greedy_probability": float(greedy.mean()),
                "greedy_where_others_fall": float(greedy[falls].mean()) if falls.any() else np.nan,
                "entropy": float((x["entropy_after"] - x["entropy_before"])[real].mean()),
                "kl": float(x["kl"][real].mean()),
            })  # fmt: skip
    return rows
