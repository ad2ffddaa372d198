"""The numbers of the table, the table, and the verdict in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.no_vs_never.protocol import GAINS, LOOKS, PREDICTIONS, Config, cells, tokenizer_of
from jaxpref import diagnostics


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each combination of settings, over its prompts: the numbers of the table."""
    tokenizer = tokenizer_of(config)
    todo, rows = cells(config), []
    for key in dict.fromkeys(cell._replace(prompt=0) for cell in todo):
        at = [i for i, cell in enumerate(todo) if cell._replace(prompt=0) == key]
        logp, loss = arrays["logp"][at, :, 0], arrays["loss"][at]
        p = np.exp(logp)
        drop = diagnostics.largest_drop(jnp.asarray(p))
        rows.append(
            key._asdict()
            | {
                "prompts": len(at),
                "start": _mean_sd(p[:, 0]),
                "peak": _mean_sd(drop.peak),
                "trough": _mean_sd(drop.trough),
                "end": _mean_sd(p[:, -1]),
                "drop": _mean_sd(drop.drop),
                "change_nats": _mean_sd(logp[:, -1] - logp[:, 0]),
                "ended_below_start": int((logp[:, -1] < logp[:, 0]).sum()),
                "ever_below_start": int((logp.min(axis=1) < logp[:, 0]).sum()),
                "loss_rises": int((np.diff(loss, axis=1) > 0).sum(axis=1).max()),
                "runs_without_rise": int((np.diff(loss, axis=1) <= 0).all(axis=1).sum()),
                "share_same": arrays["share"][at, 0].mean(axis=0).tolist(),
                "share_opposite": arrays["share"][at, 1].mean(axis=0).tolist(),
                "gains": _gains(arrays, at, tokenizer),
                "rate_terms": arrays["rate_terms"][at].mean(axis=0).tolist(),
                "geometry": arrays["geometry"][at].mean(axis=0).tolist(),
                "spearman": arrays["spearman"][at].mean(axis=0).tolist(),
            }
        )
    return rows


def _mean_sd(x) -> list[float]:
    """Mean and spread over prompts (standard deviation, 0 for one prompt)."""
    x = np.asarray(x)
    return [float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else 0.0]


def _gains(arrays, at: list[int], tokenizer) -> list[list[list]]:
    """For each look the tokens in some run's three largest gains: ``[text, mean gain, runs]``."""
    looks = []
    for k in range(arrays["gained"].shape[1]):
        found: dict[int, list[float]] = {}
        for i in at:
            for token, gain in zip(
                arrays["gained_token"][i, k], arrays["gained"][i, k], strict=True
            ):
                if gain >= 0.01:
                    found.setdefault(int(token), []).append(float(gain))
        ordered = sorted(found.items(), key=lambda item: -sum(item[1]))[:4]
        looks.append([[tokenizer.decode([t]), float(np.mean(g)), len(g)] for t, g in ordered])
    return looks


def table(rows: Sequence[Mapping[str, Any]], config: Config) -> str:
    """The summary as text: means over prompts, of probabilities with the spread in brackets."""
    return "\n".join(line for row in rows for line in _lines(row, config))


def _lines(r: Mapping[str, Any], config: Config) -> list[str]:
    n, gains = r["prompts"], [k for k in GAINS if k <= config.updates]
    start, end = ("{:.3f} ({:.3f})".format(*r[name]) for name in ("start", "end"))
    lines = [
        f"{r['pair']}, {r['loss']}, lr {r['learning_rate']:g}, {r['sft_steps']} supervised updates,"
        f" trained: {r['train']}, {n} prompts",
        f"  p(chosen): start {start}, peak {r['peak'][0]:.3f}, later trough {r['trough'][0]:.3f},"
        f" end {end}; largest drop {r['drop'][0]:.3f}",
        f"  ends below its start (displaced) in {r['ended_below_start']} of {n} runs, is below at"
        f" some step in {r['ever_below_start']}; the loss rose in {n - r['runs_without_rise']}",
    ]
    for k, same, opposite, tokens in zip(
        gains, r["share_same"], r["share_opposite"], r["gains"], strict=True
    ):
        most = ", ".join(f"{text!r} {gain:+.3f} ({runs}/{n})" for text, gain, runs in tokens)
        lines.append(
            f"  after {k:3d} updates, of the gained probability {opposite:4.0%} to the opposite"
            f" meaning, {same:3.0%} to other words of the same; most: {most or 'none by 0.01'}"
        )
    return lines + (_theory(r, config) if r["train"] == "all" else [])


def _theory(r: Mapping[str, Any], config: Config) -> list[str]:
    looks = [k for k in LOOKS if k <= config.updates]
    magnitude, similarity, others = r["rate_terms"]
    lines = [
        "  W_chosen - W_rejected: {:.2f} along W_chosen, {:.2f} across".format(*r["geometry"]),
        f"  Theorem 4, rate of the chosen per unit of -l': {magnitude:.2f} (magnitudes)"
        f" {similarity:+.2f} (similarity of the two) {others:+.2f} (other tokens)",
    ]
    for name, by_look in zip(PREDICTIONS, r["spearman"], strict=True):
        ranks = (
            f"{k}: {all_:.2f} / {likely:.2f}"
            for k, (all_, likely) in zip(looks, by_look, strict=True)
        )
        lines.append(f"  Spearman of {PREDICTIONS[name]} with the change after {', '.join(ranks)}")
    return lines


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """In words, what held and what did not."""
    real = [r for r in rows if r["train"] == "all"]
    control = [r for r in rows if r["train"] != "all"]
    runs_, fell = sum(r["prompts"] for r in real), sum(r["ended_below_start"] for r in real)
    shares = [max(r["share_opposite"], default=0.0) for r in real]
    lines = []
    if real:
        worst = real[int(np.argmax(shares))]
        lines.append(
            f"Displacement (Definition 1): the chosen answer ended below its start in {fell} of"
            f" {runs_} runs"
            + (": the claim's strong form does not hold here." if not fell else ".")
        )
        held = max(shares) >= 0.1
        lines.append(
            f"Mass to the opposite meaning: at most {max(shares):.0%} of what was gained"
            f" ({worst['pair']}, {worst['loss']}, lr {worst['learning_rate']:g}): "
            + ("the headline holds." if held else "the headline does not hold here (under 10 %).")
        )
    if control:
        fell = sum(r["ended_below_start"] for r in control)
        lines.append(
            f"Controls (unembedding only, tabular): displaced in {fell} of"
            f" {sum(r['prompts'] for r in control)} runs; theory says none."
        )
    return "\n".join(lines)
