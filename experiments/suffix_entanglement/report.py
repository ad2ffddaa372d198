"""The tables, in words whether the claim held, and the figure."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.protocol import changes
from experiments.protocol.arms import ARMS
from experiments.protocol.figures import band, courses
from experiments.protocol.intervals import mean_of
from experiments.protocol.tables import percent, spread, table
from experiments.suffix_entanglement.protocol import Config, looks, sets_of
from jaxpref import diagnostics
from jaxpref.diagnostics import Regime

Rows = Sequence[Mapping[str, Any]]
SHADES = {"single": "#8fbce0", "short": "#e8a33d", "long": "#c8402f", "data": "#3a3a3a"}
CASES = (Regime.IDEAL, Regime.BOTH_DOWN, Regime.BOTH_UP)


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Rows of all tables; ``table`` says of which, ``text`` of which set."""
    numbers, rows, cosines, falls = looks(config), [], {}, {}
    for text in sets_of(config):
        own = {k.removeprefix(f"{text}_"): x for k, x in arrays.items()}
        word = {f"{n}_change": own[f"{n}_differing"] - own["differing"][:, None] for n in ARMS}
        word["lengths"] = np.ones_like(own["lengths"])
        for what, some in (("response", own), ("differing token", own | word)):
            found = changes.rows(config, some, dict.fromkeys(ARMS, numbers))
            rows += [{"text": text, "of": what, **row} for row in found]
        gram = np.concatenate([own["gram"][:, None], own["dpo_gram"]], axis=1)
        pull = np.broadcast_to(np.array([-1, 1], gram.dtype), gram.shape[:-1])  # of DPO: equal
        cosine, regime = np.asarray(diagnostics.cosine(gram)), diagnostics.regime(gram, pull)
        for k, number in enumerate([0, *numbers]):
            row = {"table": "gradients", "text": text, "updates": number}
            row |= {case.name.lower(): float((regime[:, k] == case).mean()) for case in CASES}
            rows.append(row | changes.about("cosine", config, mean_of, cosine[:, k]))
        cosines[text] = cosine
        beyond = {c: own[f"{c}_change"][:, -1] - own["dpo_change"][:, -1] for c in changes.CONTROLS}
        falls[text] = {c: changes.of_set(config, x, "unseen")[..., 0] for c, x in beyond.items()}
    return rows + [
        {"table": "claims", "claim": claim, **changes.about("value", config, mean_of, x)}
        for claim, x in claims([t for t in falls if t != "data"], cosines, falls).items()
    ]


def claims(
    texts: Sequence[str],
    cosine: Mapping[str, np.ndarray],
    fall: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What the paper says, each as numbers of pairs whose mean is above zero where it holds.

    The sets have the same sentences in the same parts, and are compared pair by pair.

    Args:
        texts: Sets, in the order of their lengths.
        cosine: Of each, ``[seeds looks grams]``, the first look before training.
        fall: Of its unseen chosen responses, beyond each control ``[seeds unseen]``, nats.
    """
    said = {}
    if "single" in texts:
        said["single: the gradients point apart before training"] = -cosine["single"][:, 0]
    for less, more in itertools.pairwise(texts):
        aligned = cosine[more] - cosine[less]
        said[f"{more}: a larger cosine than {less} before training"] = aligned[:, 0]
        said[f"{more}: a larger cosine than {less} at the end"] = aligned[:, -1]
        for control, words in changes.CONTROLS.items():
            claim = f"{more}: unseen chosen responses fall further than {less}, beyond {words}"
            said[claim] = fall[more][control] - fall[less][control]
    return said


def report(config: Config, rows: Rows) -> str:
    """All tables, each with a line of what it is, then the verdict."""
    end = looks(config)[-1]
    last = [r for r in rows if r["table"] == "changes" and r["updates"] == end]
    whole, word = ([r for r in last if r["of"] == of] for of in ("response", "differing token"))
    said = [f"change of log-probability in {end} updates, nats (95 % over seeds and pairs),"
            f" {config.seeds} seeds x {config.unseen} unseen pairs"]  # fmt: skip
    for text in sets_of(config):
        said += [f"{text}:", changes.shown([r for r in whole if r["text"] == text])]
    word = [{**r, "arm": f"{r['text']}: {r['arm']}"} for r in word if r["set"] == "unseen"]
    head = ["text, updates of DPO", "cosine", "ideal", "both down", "both up"]
    lines = [[f"{r['text']}, {r['updates']}", spread(r, "cosine"),
              *(percent(r[case.name.lower()]) for case in CASES)]
             for r in rows if r["table"] == "gradients"]  # fmt: skip
    verdict = [
        f"{r['text']}: DPO moves unseen chosen responses by {_fate(config, r)};"
        f" their differing token by {_fate(config, w)}."
        for r, w in zip(
            [r for r in whole if (r["arm"], r["set"]) == ("dpo", "unseen")],
            [w for w in word if w["arm"].endswith(": dpo")], strict=True,
        )
    ]  # fmt: skip
    for r in (r for r in rows if r["table"] == "claims"):
        low, high = r["value_95"]
        known = r["value"] == r["value"]  # no seed diverged
        found = "holds" if known and low > 0 else "FAILS" if known and high < 0 else "is open"
        verdict.append(f"{found}: {r['claim']}: {spread(r, 'value')}.")
    return "\n\n".join([
        *said, "the differing token alone:", changes.shown(word),
        f"gradients of {config.grams} unseen pairs a seed, and which way one small step of gradient"
        " descent on the pair alone would move both:",
        table(head, lines), changes.verdict(config, "\n".join(verdict)),
    ])  # fmt: skip


def _fate(config: Config, row: Mapping[str, Any]) -> str:
    if row["diverged"]:
        return f"an unknown amount ({row['diverged']} of {config.seeds} seeds diverged)"
    low, high = row["chosen_95"]
    found = "displaced" if changes.displaced(row) else (
        "below the start, not below both controls" if high < 0 else
        "above the start" if low > 0 else "no certain change")  # fmt: skip
    return f"{spread(row, 'chosen')} nats, {found}"


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """A panel for each set, with 95 % bands over seeds and pairs; then the cosines."""
    rows, texts = summarise(config, arrays), sets_of(config)
    wide = len(texts) + 1
    figure, axes = plt.subplots(1, wide, figsize=(4.3 * wide, 4), layout="constrained")
    for panel, text in zip(axes, texts, strict=False):
        own = {of: [r for r in rows if (r.get("text"), r.get("of")) == (text, of)]
               for of in ("response", "differing token")}  # fmt: skip
        courses(panel, own["response"], "unseen")
        courses(panel, own["differing token"], "unseen", ("dpo",), ":", ", the differing token")
        panel.set(title=f"{text}: unseen chosen responses")
    axes[0].legend(fontsize=8)
    for text in texts:
        some = [r for r in rows if (r["table"], r.get("text")) == ("gradients", text)]
        band(axes[-1], some, "cosine", SHADES[text], text)
    axes[-1].axhline(0, color="black", lw=0.6)
    axes[-1].set(title="unseen pairs: cosine of the two gradients", ylim=(-1.05, 1.05),
                 xlabel="updates")  # fmt: skip
    axes[-1].legend(fontsize=8)
    return figure
