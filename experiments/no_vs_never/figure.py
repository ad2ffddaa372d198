"""One setting: trajectories, masses, predictions. Several: the map of when the chosen falls."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.no_vs_never import protocol
from experiments.no_vs_never.protocol import Cell, Config, answer_ids, meaning_ids
from experiments.protocol import inputs

COLOURS = {"chosen": "#1b6ca8", "rejected": "#777777", "same": "#67b7dc", "opposite": "#c8402f"}
OTHER = "#b9b9b9"


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """One setting: trajectories, masses and predictions. Several: the map of when it falls."""
    groups: dict[Cell, list[int]] = {}
    for i, cell in enumerate(protocol.cells(config)):
        if cell.train == "all":
            groups.setdefault(cell._replace(prompt=0), []).append(i)
    lines, columns = len(groups) / len(config.learning_rates), len(config.learning_rates)
    size = (15, 4.6) if len(groups) == 1 else (2.6 * columns + 1.4, 1.7 * lines + 0.9)
    figure = plt.figure(figsize=(size[0] + 4, size[1]), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(size[0], 4))
    left, right = halves
    (_draw_one if len(groups) == 1 else _draw_map)(left, config, arrays, groups)
    _draw_ends(right.subplots(), arrays, groups)
    return figure


def _draw_one(figure, config: Config, arrays, groups: Mapping[Cell, list[int]]) -> None:
    ((cell, at),) = groups.items()
    parts = _draw_words, _draw_masses, _draw_theory
    for panel, part in zip(figure.subplots(1, 3), parts, strict=True):
        part(panel, config, arrays, cell, at)
        panel.spines[["top", "right"]].set_visible(False)
    said = f"{cell.loss}, learning rate {cell.learning_rate:g}, {cell.sft_steps} supervised updates"
    figure.suptitle(f"{said}, {len(at)} prompts", fontsize=11)


def _draw_ends(axes, arrays, groups: Mapping[Cell, list[int]]) -> None:
    """Of every run, the chosen's log-probability at its end minus that at its start."""
    logp = arrays["logp"][:, :, 0]
    change = logp[:, -1] - logp[:, 0]
    for y, at in enumerate(groups.values()):
        colours = [COLOURS["opposite" if x < 0 else "chosen"] for x in change[at]]
        axes.scatter(change[at], [-y] * len(at), c=colours, s=18)
    axes.axvline(0, color="black", lw=0.8)
    names = [f"{c.pair} {c.loss}\nSFT {c.sft_steps}, lr {c.learning_rate:g}" for c in groups]
    axes.set_yticks([-y for y in range(len(groups))], names, fontsize=7)
    runs_ = [i for at in groups.values() for i in at]
    fell = f"{(change[runs_] < 0).sum()} of {len(runs_)} runs"
    axes.set_title(f"End minus start of the\nchosen (nats): below in {fell}", fontsize=9)
    axes.set_ylim(0.6 - len(groups), 0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _kinds(config: Config, cell: Cell) -> dict[int, str]:
    """Token to its side of this pair: chosen, rejected, same or opposite meaning."""
    tokenizer = inputs.subject(config, scan=False).tokenizer
    meanings = meaning_ids(tokenizer)
    sides = zip(("same", "opposite"), protocol.meanings_of(cell.pair), strict=True)
    kinds = {t: side for side, meaning in sides for t in meanings.get(meaning or "", [])}
    return kinds | dict(zip(answer_ids(cell.pair, tokenizer), ("chosen", "rejected"), strict=True))


def _band(axes, values: np.ndarray, **style) -> None:
    """Mean over runs, and the range from the lowest to the highest run."""
    steps, low, high = np.arange(values.shape[1]), values.min(axis=0), values.max(axis=0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.plot(steps, values.mean(axis=0), **style)


def _draw_words(axes, config: Config, arrays, cell: Cell, at: list[int]) -> None:
    tokenizer, kinds = inputs.subject(config, scan=False).tokenizer, _kinds(config, cell)
    watched = [t for ids in meaning_ids(tokenizer).values() for t in ids]
    p = arrays["watched"][at]  # [prompts steps watched]
    reach = p.mean(axis=0).max(axis=0)
    for j in [j for j in np.argsort(-reach) if reach[j] > 0.01][:7]:
        kind = kinds.get(watched[j], "")
        width = 2.4 if kind in ("chosen", "rejected") else 1.2
        text = tokenizer.decode([watched[j]])
        _band(axes, p[:, :, j], color=COLOURS.get(kind, OTHER), lw=width, label=f"{text!r} {kind}")
    if axes.lines:  # on a model that knows none of the words, there is nothing to name
        axes.legend(frameon=False, fontsize=8)
    axes.set(title=f"{cell.pair}: probability of the answers (mean, range)", xlabel="update")


def _draw_masses(axes, config: Config, arrays, cell: Cell, at: list[int]) -> None:
    p, mass = (x[at].mean(axis=0) for x in (np.exp(arrays["logp"]), arrays["mass"]))  # [steps 2]
    parts = {"chosen": p[:, 0], "same": mass[:, 0], "opposite": mass[:, 1], "rejected": p[:, 1]}
    names = "the chosen word", "other words of its meaning", "opposite meaning", "the rejected word"
    colours = [COLOURS[name] for name in parts]
    axes.stackplot(range(len(p)), list(parts.values()), labels=names, colors=colours)
    axes.legend(loc="lower right", frameon=True, framealpha=0.8, fontsize=8)
    axes.set(title="Where the probability is (mean)", xlabel="update", ylim=(0, 1))
    axes.set_xlim(0, len(p) - 1)


def _draw_theory(axes, config: Config, arrays, cell: Cell, at: list[int]) -> None:
    tokenizer, kinds = inputs.subject(config, scan=False).tokenizer, _kinds(config, cell)
    tokens, predicted = arrays["shown_token"][at[0]], arrays["shown_predicted"][at[0], 2]
    observed = arrays["shown_change"][at[0], 0]
    colours = [COLOURS.get(kinds.get(int(t), ""), OTHER) for t in tokens]
    axes.axline((0, 0), slope=1, color="#999999", lw=0.8, ls="--")
    axes.scatter(predicted, observed, c=colours, s=14, lw=0)
    for t, x, y in zip(tokens, predicted, observed, strict=True):
        if int(t) in kinds:
            axes.annotate(tokenizer.decode([int(t)]), (x, y), (3, 2), textcoords="offset points",
                          fontsize=7)  # fmt: skip
    rho = arrays["spearman"][at, 2, 0, 0].mean()
    axes.set(title=f"The first update: theory against outcome (Spearman {rho:.2f})",
             xlabel="predicted change of log-probability (nats)",
             ylabel="observed (nats), one point a token")  # fmt: skip


def _draw_map(figure, config: Config, arrays, groups: Mapping[Cell, list[int]]) -> None:
    lines = list(dict.fromkeys(cell._replace(learning_rate=0.0) for cell in groups))
    rates = config.learning_rates
    grid = figure.subplots(len(lines), len(rates), sharex=True, sharey=True, squeeze=False)
    for cell, at in groups.items():
        row, column = lines.index(cell._replace(learning_rate=0.0)), rates.index(cell.learning_rate)
        axes, logp = grid[row, column], arrays["logp"][at, :, 0]
        change = logp[:, -1] - logp[:, 0]
        axes.set_facecolor(plt.get_cmap("RdBu")(0.5 + np.clip(change.mean() / 30, -0.12, 0.12)))
        _band(axes, np.exp(logp), color=COLOURS["chosen"], lw=1.6)
        _band(axes, arrays["mass"][at, :, 1], color=COLOURS["opposite"], lw=1.2)
        fell = f"fell in {(change < 0).sum()}/{len(at)}"
        axes.set_title(f"{change.mean():+.1f} nats, {fell}", fontsize=8, pad=2)
        if column == 0:
            text = f"{cell.pair}\n{cell.loss}, SFT {cell.sft_steps}"
            axes.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
        if row == len(lines) - 1:
            axes.set_xlabel(f"update, lr {cell.learning_rate:g}", fontsize=8)
    grid[0, 0].set(ylim=(0, 1.02), xlim=(0, config.updates))
    figure.suptitle(
        "Probability of the chosen answer (blue) and of all words of the opposite meaning (red),\n"
        "mean and range over prompts; title and ground: change of the chosen's log-probability",
        fontsize=10,
    )
