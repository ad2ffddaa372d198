"""The tables in print, and in words what they say."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.forecast import protocol
from experiments.forecast.protocol import Config
from experiments.forecast.summary import FORECASTS
from experiments.protocol import changes
from experiments.protocol.changes import SETS
from experiments.protocol.tables import percent, spread, table

Rows = Sequence[Mapping[str, Any]]


def report(config: Config, rows: Rows) -> str:
    """All tables, each with a line of what it is, then the verdict."""
    by = {name: [r for r in rows if r["table"] == name] for name in dict.fromkeys(
        r["table"] for r in rows)}  # fmt: skip
    epoch = protocol.horizon(config)
    words = f"{config.seeds} seeds x {config.unseen} unseen pairs"
    return "\n\n".join([
        f"change of log-probability since the start, nats (95 % over seeds and pairs), {words}:",
        changes.shown(by["changes"]),
        f"who foresees which chosen responses fall in an epoch ({epoch} updates):",
        *(_told(by["signals"], which) for which in SETS),
        "mean change of the chosen response, forecast before training:",
        _sizes(by["sizes"]),
        f"what the change of the chosen response after {epoch} updates is made of, nats:",
        _shares(by["shares"]),
        "responses of other kinds to the unseen prompts, nats:",
        _kinds(by["kinds"]),
        "tokens of unseen responses: how far the greedy token was from the start's, and where mass"
        " went:",
        _tokens(by["tokens"]),
        changes.verdict(config, _verdict(config, by)),
    ])  # fmt: skip


def _told(rows: Rows, which: str) -> str:
    some = [r for r in rows if r["set"] == which]
    head = [f"{which}: signal", "rank correlation", "least seed", "given length",
            "area under ROC", "least seed", "cost"]  # fmt: skip
    return table(head, [
        [r["signal"], spread(r, "spearman"), f"{min(r['spearman_seeds']):+.2f}",
         f"{r['given_length']:+.2f}", spread(r, "auc", 3), f"{min(r['auc_seeds']):.3f}", r["cost"]]
        for r in some
    ])  # fmt: skip


def _sizes(rows: Rows) -> str:
    some = [r for r in rows if r["side"] == "chosen"]
    names = list(dict.fromkeys(r["forecast"] for r in some))
    by = {(r["set"], r["forecast"]): r for r in some}
    head = ["forecast", *(f"{s}: {what}" for s in SETS for what in ("mean", "of measured", "fell"))]
    return table(head, [
        [name, *(cell for s in SETS for r in [by[s, name]]
                 for cell in (spread(r, "mean"), percent(r["of_measured"]), percent(r["fell"])))]
        for name in names
    ])  # fmt: skip


def _shares(rows: Rows) -> str:
    names = ("measured", "others", "own", "drag", "rest")
    head = ["arm", "set", *names]
    return table(head, [[r["arm"], r["set"], *(spread(r, n) for n in names)]
                        for r in rows if r["side"] == "chosen"])  # fmt: skip


def _kinds(rows: Rows) -> str:
    head = ["response", "arm", "tokens", "start, a token", "change", "a token", "fell"]
    return table(head, [
        [r["kind"], r["arm"], f"{r['tokens']:.0f}", f"{r['start_a_token']:+.2f}",
         spread(r, "change"), spread(r, "a_token", 3), percent(r["fell"])]
        for r in sorted(rows, key=lambda r: list(dict.fromkeys(x["kind"] for x in rows)).index(
            r["kind"]))
    ])  # fmt: skip


def _tokens(rows: Rows) -> str:
    head = ["response", "arm", "unshifted", "marginal", "shifted", "greedy's probability",
            "where others fall", "entropy", "KL a token"]  # fmt: skip
    return table(head, [
        [r["kind"], r["arm"], *(f"{100 * r[n]:.1f} %" for n in head[2:5]),
         *(f"{r[n]:+.4f}" for n in ("greedy_probability", "greedy_where_others_fall", "entropy",
                                    "kl"))]
        for r in rows if r["kind"] in ("chosen", "rejected", "greedy")
    ])  # fmt: skip


def _verdict(config: Config, by: Mapping[str, Rows]) -> str:
    epoch = protocol.horizon(config)
    row = next(r for r in by["changes"] if (r["arm"], r["set"], r["updates"]) == (
        "dpo", "unseen", epoch))  # fmt: skip
    said = (
        f"After one epoch DPO has moved unseen chosen responses by {spread(row, 'chosen')} nats;"
        f" {percent(row['chosen_fell'])} fell. "
    )
    if changes.displaced(row):
        said += "That is displacement: the mean is below zero and below both controls."
    elif row["chosen_95"][1] < 0:
        said += "The mean is below zero, but not below both controls."
    else:
        said += "The mean is not below zero."
    told = [r for r in by["signals"] if r["set"] == "unseen" and r["signal"] in FORECASTS]
    best = max(told, key=lambda r: min(r["spearman_seeds"]))
    sizes = {r["forecast"]: r for r in by["sizes"] if (r["set"], r["side"]) == ("unseen", "chosen")}
    own = next(r for r in by["signals"] if (r["set"], r["signal"]) == ("unseen", "own Gram"))
    nearest = min((sizes[name] for name in FORECASTS), key=lambda row: abs(row["of_measured"] - 1))
    said += (
        f"\nBest forecast of who falls, by rank in its least seed: {best['signal']}, area under ROC"
        f" {best['auc']:.3f} (least seed {min(best['auc_seeds']):.3f}), rank correlation"
        f" {best['spearman']:+.2f} (least seed {min(best['spearman_seeds']):+.2f}). A pair's own"
        f" Gram: {own['auc']:.3f}, {own['spearman']:+.2f}."
        f"\nOf the mean fall it says {percent(sizes[best['signal']]['of_measured'])}; nearest is"
        f" {nearest['forecast']}, {percent(nearest['of_measured'])}."
    )
    share = next(r for r in by["shares"] if (r["arm"], r["set"], r["side"]) == (
        "dpo", "unseen", "chosen"))  # fmt: skip
    return said + (
        f"\nThe fall is made of {spread(share, 'others')} nats from other pairs and"
        f" {spread(share, 'drag')} of drag; {spread(share, 'rest')} is neither."
    )
