"""What every subset did to trained and unseen pairs, whether a score ordered it, and the figure."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.ches_percentiles.protocol import SCORES, Config, looks, names
from experiments.protocol import changes
from experiments.protocol.changes import CONTROLS, SETS, about, of_set
from experiments.protocol.correlation import partial_spearman, spearman
from experiments.protocol.intervals import mean_of
from experiments.protocol.tables import spread, table

Arrays = Mapping[str, np.ndarray]
Row = Mapping[str, Any]
DROPS = ("drop", *(f"beyond_{control}" for control in CONTROLS))  # from lowest to highest


def subsets(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """Rows of `changes.rows` for every subset."""
    found, numbers = [], {name: looks(config) for name in names(config)}
    wanted = ["lengths", *(f"{n}_{what}" for n in numbers for what in ("change", "diverged"))]
    for i, j in np.ndindex(len(config.scores), len(config.percentiles)):
        subset = {"score": config.scores[i], "percentile": config.percentiles[j]}
        own = {name: arrays[name][:, i, j] for name in wanted}
        found += [{**subset, **row} for row in changes.rows(config, own, numbers)]
    return found


def courses(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """For each loss, score and set: whether the mean change falls as the percentile rises."""
    found = []
    for loss, score, which in itertools.product(config.losses, config.scores, SETS):
        at = config.scores.index(score)
        chosen = [arrays[f"{arm}_change"][:, at, :, 0, :, 0] for arm in (loss, *CONTROLS)]
        chosen = [of_set(config, x.swapaxes(1, 2), which) for x in chosen]
        means = chosen[0].mean(axis=1)  # [seeds percentiles]
        row: dict[str, Any] = {"table": "courses", "arm": loss, "score": score, "set": which}
        row["means"] = means.mean(axis=0).tolist()
        row["falls"] = bool((np.diff(means.mean(axis=0)) < 0).all())
        row["falls_seeds"] = int((np.diff(means) < 0).all(axis=1).sum())
        for name, other in zip(DROPS, (0, *chosen[1:]), strict=True):
            gap = chosen[0] - other
            row |= about(name, config, mean_of, gap[..., -1] - gap[..., 0])
        found.append(row)
    return found


def correlations(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """Of each score with the change of its subsets' trained chosen responses, under each arm.

    A pair that is in two subsets counts twice.
    """

    def flat(x):
        return x[..., : config.trained].reshape(config.seeds, -1)

    found = []
    for (i, score), arm in itertools.product(enumerate(config.scores), names(config)):
        change = flat(arrays[f"{arm}_change"][:, i, :, 0, :, 0])
        places, lengths = flat(arrays["places"][:, i]), arrays["lengths"][:, i]
        columns = np.take_along_axis(arrays["scores"][:, i], places, axis=1), change
        difference, chosen = flat(np.diff(lengths)[..., 0]), flat(lengths[..., 0])
        row = {"table": "correlations", "arm": arm, "score": score}
        row |= about("all", config, spearman, *columns)
        row |= about("given_difference", config, partial_spearman, *columns, difference)
        row |= about("given_length", config, partial_spearman, *columns, chosen)
        found.append(row)
    return found


def summarise(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """``changes`` of every subset, ``courses`` of every score, ``correlations`` over pairs."""
    return [*subsets(config, arrays), *courses(config, arrays), *correlations(config, arrays)]


def ordered(config: Config, row: Row) -> bool:
    """Whether a course falls at every step in every seed, and further than both controls'."""
    return row["falls_seeds"] == config.seeds and all(row[f"{name}_95"][1] < 0 for name in DROPS)


def report(config: Config, rows: Sequence[Row]) -> str:
    """The tables, and in words whether the claim held."""
    some = [r for r in rows if r["arm"] in config.losses]
    fell = [{**r, "arm": f"{r['arm']}, {_name(r)}"} for r in some if r["table"] == "changes"]
    head = ["loss, set, score", *map(str, config.percentiles), "falls at every step",
            "highest less lowest", *(f"beyond {words}" for words in CONTROLS.values())]  # fmt: skip
    lines = [
        [f"{r['arm']}, {r['set']}, {SCORES[r['score']]}", *(f"{x:+.2f}" for x in r["means"]),
         f"{'yes' if r['falls'] else 'no'}, in {r['falls_seeds']} of {config.seeds} seeds",
         *(spread(r, name) for name in DROPS)]
        for r in some if r["table"] == "courses"
    ]  # fmt: skip
    given = ("all", "given_difference", "given_length")
    told = [[f"{SCORES[r['score']]}, {r['arm']}", *(spread(r, name) for name in given)]
            for r in rows if r["table"] == "correlations"]  # fmt: skip
    return "\n\n".join([
        f"change of log-probability in {looks(config)[0]} updates of {config.optimizer} at"
        f" {config.rate:g}, nats (95 % over seeds and pairs); {config.seeds} seeds x subsets of"
        f" {config.subset} of {config.pairs} pairs, {config.unseen} unseen pairs:",
        changes.shown(fell),
        "mean change of the chosen response by percentile:", table(head, lines),
        "Spearman of score and change of the chosen response, over trained pairs:",
        table(["score, arm", "all", "given length difference", "given chosen length"], told),
        changes.verdict(config, "\n\n".join(
            _verdict(config, some, *x) for x in itertools.product(config.losses, SETS))),
    ])  # fmt: skip


def _name(row: Row) -> str:
    return f"{SCORES[row['score']]} {row['percentile']}"


def _verdict(config: Config, rows: Sequence[Row], loss: str, which: str) -> str:
    by = {name: [r for r in rows if (r["table"], r["arm"], r.get("set")) == (name, loss, which)]
          for name in ("changes", "courses")}  # fmt: skip
    fell = [_name(r) for r in by["changes"] if changes.displaced(r)]
    held = [SCORES[r["score"]] for r in by["courses"] if ordered(config, r)]
    said = (
        f"{loss}, {which} pairs: chosen responses are displaced, below their start and both"
        f" controls, by {len(fell)} of {len(by['changes'])} subsets ({', '.join(fell) or 'none'})."
        " Scores by which the change falls at every step in every seed, further than under both"
        f" controls: {', '.join(held) or 'none'}."
    )
    for last in [r for r in by["changes"] if r["score"] == "ches"][-1:]:
        holds = "holds" if SCORES["ches"] in held and _name(last) in fell else "does not hold"
        said += (
            f" That training on high CHES lowers chosen responses most {holds} here:"
            f" {spread(last, 'chosen')} nats by the highest subset."
        )
    return said


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """A line for each score, grey ones for the controls on its subsets; a row for each loss."""
    rows, high = subsets(config, arrays), len(config.losses)
    figure, axes = plt.subplots(high, 2, figsize=(13, 4.8 * high), layout="constrained",
                                squeeze=False)  # fmt: skip
    x, wide = np.array(config.percentiles, float), np.ptp(config.percentiles)
    for loss, line in zip(config.losses, axes, strict=True):
        for which, panel in zip(SETS, line, strict=True):
            for k, score in enumerate(config.scores):
                some = [r for r in rows if (r["score"], r["set"]) == (score, which)]
                by = {arm: [r for r in some if r["arm"] == arm] for arm in (loss, *CONTROLS)}
                for arm, style in zip(CONTROLS, (":", "--"), strict=True):
                    panel.plot(x, [r["chosen"] for r in by[arm]], style, color="#999999", lw=0.8,
                               label="" if k else CONTROLS[arm])  # fmt: skip
                places = x + (k - (len(config.scores) - 1) / 2) * 0.012 * wide
                panel.plot(places, [r["chosen"] for r in by[loss]], "o-", ms=4, color=f"C{k}",
                           label=SCORES[score])  # fmt: skip
                panel.vlines(places, *np.array([r["chosen_95"] for r in by[loss]]).T,
                             color=f"C{k}", lw=1)  # fmt: skip
            panel.axhline(0, color="black", lw=0.6)
            panel.set_xticks(config.percentiles)
            panel.set(title=f"{loss}: chosen responses of {which} pairs",
                      xlabel="percentile of the score that chose the trained pairs",
                      ylabel="change of log-probability (nats)")  # fmt: skip
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure
