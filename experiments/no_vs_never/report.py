"""The numbers of the table, the table, and the verdict in words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.no_vs_never.protocol import LOOKS, PREDICTIONS, Config, cells, gains_after
from experiments.protocol import inputs
from experiments.protocol.tables import judged
from jaxpref import diagnostics

Arrays = Mapping[str, np.ndarray]
Row = Mapping[str, Any]
NEAR = 0.02  # of the whole model's margin: a control further off proves nothing
CONTROLS = {"unembedding": "the unembedding alone", "tabular": "a free table of logits"}


def summarise(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """One row for each combination of settings, over its prompts: the numbers of the table."""
    tokenizer = inputs.subject(config, scan=False).tokenizer
    todo, rows = cells(config), []
    gained = arrays["logp"][:, -1] - arrays["logp"][:, 0]
    margin = gained[:, 0] - gained[:, 1]
    wanted = margin[[todo.index(cell._replace(train="all")) for cell in todo]]
    matched = np.abs(margin - wanted) <= NEAR * wanted
    for key in dict.fromkeys(cell._replace(prompt=0) for cell in todo):
        at = [i for i, cell in enumerate(todo) if cell._replace(prompt=0) == key]
        logp, loss = arrays["logp"][at, :, 0], arrays["loss"][at]
        p = np.exp(logp)
        means = ("share", "rate_terms", "geometry", "spearman")
        mean = {name: arrays[name][at].mean(axis=0).tolist() for name in means}
        others = arrays["shown_change"][at, -1]  # [prompts tokens]
        drop = diagnostics.largest_drop(jnp.asarray(p))
        rows.append({
            **key._asdict(),
            "prompts": len(at),
            "start": _mean_sd(p[:, 0]),
            "end": _mean_sd(p[:, -1]),
            **{name: _mean_sd(getattr(drop, name)) for name in ("peak", "trough", "drop")},
            "change_nats": gained[at, 0].tolist(),
            "margin": _mean_sd(margin[at]),
            "rates": [float(arrays["rate"][at].min()), float(arrays["rate"][at].max())],
            "matched": int(matched[at].sum()),
            "ended_below_start": int((gained[at, 0] < 0).sum()),
            "ever_below_start": int((logp < logp[:, :1]).any(axis=1).sum()),
            "diverged": int((~np.isfinite(loss)).any(axis=1).sum()),
            "loss_rises": int((np.diff(loss, axis=1) > 0).sum(axis=1).max()),
            "runs_without_rise": int((np.diff(loss, axis=1) <= 0).all(axis=1).sum()),
            "others": [float(others.mean()), float(np.ptp(others, axis=1).max())],
            "share_same": mean["share"][0],
            "share_opposite": mean["share"][1],
            "gains": _gains(arrays, at, tokenizer),
            **{name: mean[name] for name in ("rate_terms", "geometry", "spearman")},
        })  # fmt: skip
    return rows


def metrics(config: Config, arrays: Arrays) -> Iterator[dict[str, Any]]:
    """A line for each update of each cell."""
    for i, cell in enumerate(cells(config)):
        for update, (chosen, rejected) in enumerate(arrays["logp"][i]):
            yield {
                **cell._asdict(), "rate": float(arrays["rate"][i]), "update": update,
                "loss": float(arrays["loss"][i][update]), "logp_chosen": float(chosen),
                "logp_rejected": float(rejected), "entropy": float(arrays["entropy"][i][update]),
                "top": int(arrays["top"][i][update]),
            }  # fmt: skip


def _mean_sd(x) -> list[float]:
    """Mean and spread over prompts (standard deviation, 0 for one prompt)."""
    x = np.asarray(x)
    return [float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else 0.0]


def _gains(arrays: Arrays, at: list[int], tokenizer) -> list[list[list]]:
    """For each look the tokens in some run's three largest gains: ``[text, mean gain, runs]``."""
    looks = []
    for k in range(arrays["gained"].shape[1]):
        found: dict[int, list[float]] = {}
        for token, gain in zip(*(arrays[x][at, k].flat for x in ("gained_token", "gained")),
                               strict=True):  # fmt: skip
            if gain >= 0.01:
                found.setdefault(int(token), []).append(float(gain))
        ordered = sorted(found.items(), key=lambda item: -sum(item[1]))[:4]
        looks.append([[tokenizer.decode([t]), float(np.mean(g)), len(g)] for t, g in ordered])
    return looks


def report(config: Config, rows: Sequence[Row]) -> str:
    """Means over prompts, of probabilities with the spread in brackets; then what held."""
    lines = [line for row in rows for line in _lines(row, config)]
    return "\n".join([*lines, "", *_verdict(config, rows)])


def _setting(r: Row) -> str:
    return "{pair}, {loss}, lr {learning_rate:g}, {sft_steps} supervised updates".format_map(r)


def _lines(r: Row, config: Config) -> list[str]:
    n, (low, high), (others, apart) = r["prompts"], r["rates"], r["others"]
    start, end, margin = ("{:.3f} ({:.3f})".format(*r[x]) for x in ("start", "end", "margin"))
    lines = [
        f"{_setting(r)}, trained: {r['train']}, {n} prompts",
        f"  p(chosen): start {start}, peak {r['peak'][0]:.3f}, later trough {r['trough'][0]:.3f},"
        f" end {end}; largest drop {r['drop'][0]:.3f}",
        f"  ends below its start (displaced) in {r['ended_below_start']} of {n} runs, is below at"
        f" some step in {r['ever_below_start']}; the loss rose in {n - r['runs_without_rise']}"
        + (f", diverged in {r['diverged']}" if r["diverged"] else ""),
        f"  gains a margin of {margin} nats",
    ]
    if r["train"] != "all":
        look = [k for k in LOOKS if k <= config.updates][-1]
        lines[-1] += (
            f" at learning rates {low:.3g} to {high:.3g}, the whole model's within {NEAR:.0%} in"
            f" {r['matched']} of {n} runs\n  after {look} updates the likeliest other tokens have"
            f" moved by {others:+.3f} nats, all of them within {apart:.1g}"
        )
    for k, same, opposite, tokens in zip(
        gains_after(config), r["share_same"], r["share_opposite"], r["gains"], strict=True
    ):
        most = ", ".join(f"{text!r} {gain:+.3f} ({runs}/{n})" for text, gain, runs in tokens)
        lines.append(
            f"  after {k:3d} updates, of the gained probability {opposite:4.0%} to the opposite"
            f" meaning, {same:3.0%} to other words of the same; most: {most or 'none by 0.01'}"
        )
    return lines + (_theory(r, config) if r["train"] == "all" else [])


def _theory(r: Row, config: Config) -> list[str]:
    looks = [k for k in LOOKS if k <= config.updates]
    magnitude, similarity, others = r["rate_terms"]
    lines = [
        "  W_chosen - W_rejected: {:.2f} along W_chosen, {:.2f} across".format(*r["geometry"]),
        f"  Theorem 4, rate of the chosen per unit of -l': {magnitude:.2f} (magnitudes)"
        f" {similarity:+.2f} (similarity of the two) {others:+.2f} (other tokens)",
    ]
    for name, by_look in zip(PREDICTIONS, r["spearman"], strict=True):
        ranks = (f"{k}: {x:.2f} / {y:.2f}" for k, (x, y) in zip(looks, by_look, strict=True))
        lines.append(f"  Spearman of {PREDICTIONS[name]} with the change after {', '.join(ranks)}")
    return lines


def _verdict(config: Config, rows: Sequence[Row]) -> Iterator[str]:
    """In words, what held and what did not."""

    def count(name: str, some: Sequence[Row]) -> int:
        return sum(r[name] for r in some)

    def most(r: Row) -> float:
        return float(np.nan_to_num(r["share_opposite"]).max())

    def least(r: Row) -> float:
        return min((x for x in r["change_nats"] if np.isfinite(x)), default=np.inf)

    real = [r for r in rows if r["train"] == "all"]
    size = config.prompts, count("prompts", real)  # a prompt is a seed, and a pair in each setting
    fell, lowest = count("ended_below_start", real), min(real, key=least)
    yield (
        f"Displacement (Definition 1): the chosen answer ended below its start in {fell} of"
        f" {count('prompts', real)} runs of {config.updates} updates; the lowest end is"
        f" {least(lowest):+.2f} nats from its start ({_setting(lowest)})" + "."
    )
    worst = max(real, key=most)
    yield (
        f"Mass to the opposite meaning: at most {most(worst):.0%} of what was gained"
        f" ({_setting(worst)})."
    )
    for train, name in CONTROLS.items():
        some = [r for r in rows if r["train"] == train]
        if not some:
            continue
        rates, n = [x for r in some for x in r["rates"]], count("prompts", some)
        far = n - count("matched", some)
        yield (
            f"Control: {name}, at rates {min(rates):.3g} to {max(rates):.3g} with the same margin,"
            f" ended below its start in {count('ended_below_start', some)} of {n} runs; the"
            f" opposite meaning gets at most {max(map(most, some)):.0%} of what was gained."
            + (f" In {far} no rate reached the margin: they prove nothing." if far else "")
        )
    said = f"The headline {'holds' if most(worst) >= 0.1 else 'does not hold here (under 10 %)'}."
    yield judged(*size, said + " The claim's strong form does not hold here." * (not fell))
