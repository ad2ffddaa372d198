"""Every loss of the catalogue by its pull on the chosen and on the rejected response.

Claim:   Most losses do not push a pair's two responses equally hard, so what they do to each is no
         matter of the margin alone.
Run:     python -m experiments.loss_pulls
Takes:   a minute
Expect:  the functions of DPO's margin, and those of a margin of token means, push both equally, all
         others do not.
Source:  the formulas of `jaxpref.losses`; pulls decide what happens: Yuan et al. (2024), Section 3,
         https://arxiv.org/abs/2410.13828
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.protocol import running
from experiments.protocol.tables import table
from jaxpref.losses import __main__ as catalogue

CHOSEN, REJECTED, BOTH = "#1b6ca8", "#c8402f", "#6b3fa0"
COLUMNS = 8
ROOMS = (  # in this order; others after them
    "pairwise", "links", "f_dpo", "anchored", "reference_free", "logic", "listwise",
    "transport", "unpaired",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers; hyperparameters of the losses are their defaults."""

    nats: float = 100.0
    """How far a response moves up and down from where the policy is its reference."""
    points: int = 201
    logp: tuple[float, float] = (-120.0, -150.0)
    """Where it starts, chosen first."""
    lengths: tuple[int, int] = (80, 120)
    """Tokens of the two responses."""
    losses: tuple[str, ...] = ()
    """Names; by default all of the catalogue."""


SMOKE = Config(points=5, losses=("dpo", "simpo", "confpo", "aot", "kto"))


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """The arrays of a run: ``margin [points]``, and ``name [2 points 2]`` for every loss.

    The first axis says which response moves, the last is ``(d_w, d_l)``. The margin grows along the
    points: the chosen response rises, or the rejected one falls.
    """
    if config.points < 3 or max(config.logp) + config.nats > 0:
        raise ValueError(f"nats: got {config.nats}, expected log-probabilities to stay below 0")
    margin = np.linspace(-config.nats, config.nats, config.points, dtype=np.float32)
    moves = np.zeros((2, config.points, 2), np.float32)
    moves[0, :, 0], moves[1, :, 1] = margin, -margin
    reference = jnp.broadcast_to(jnp.array(config.logp, jnp.float32), moves.shape)
    points = reference + moves
    losses = _chosen(config)
    found = catalogue.values_and_pulls(losses, jnp.asarray(points), reference, config.lengths)
    return {"margin": margin, **{name: pulls for name, (_, pulls) in found.items()}}


def _chosen(config: Config) -> dict[str, Callable]:
    found = catalogue.catalogue()
    unknown = sorted(set(config.losses) - set(found))
    if unknown:
        raise ValueError(f"losses: got {unknown[0]}, expected names of the catalogue")
    return {name: found[name] for name in config.losses or found}


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each loss."""
    middle = config.points // 2
    rows = []
    for name, pulls in arrays.items():
        if name == "margin":
            continue
        equal = catalogue.equality(pulls.reshape(-1, 2), config.lengths)
        d_w, d_l = (float(x) + 0.0 for x in pulls[0, middle])  # no negative zero
        least, most = ((x + 0.0).tolist() for x in (pulls.min((0, 1)), pulls.max((0, 1))))
        rows.append(
            {"loss": name, "d_w": d_w, "d_l": d_l, "least": least, "most": most, "equal": equal}
        )
    return rows


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and in words how many push both responses equally."""
    head = ["loss", "d_w", "d_l", "range of d_w", "range of d_l", "equal"]
    lines = [[row["loss"], f"{row['d_w']:.4g}", f"{row['d_l']:.4g}",
              *(f"{low:.3g} to {high:.3g}" for low, high in zip(row["least"], row["most"],
                                                                strict=True)), row["equal"]]
             for row in rows]  # fmt: skip
    counts = {word: sum(r["equal"] == word for r in rows) for word in ("yes", "by token", "no")}
    held = "holds" if counts["no"] > len(rows) / 2 else "does not hold"
    return (
        f"{table(head, lines)}\n\nOf {len(rows)} losses {counts['yes']} push both responses equally"
        f" and {counts['by token']} do token by token; {counts['no']} do not. The claim {held}."
    )


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """A panel a loss, in the rooms' order."""
    found = _chosen(config)
    room = {name: loss.__module__.rpartition(".")[2] for name, loss in found.items()}
    order = {name: i for i, name in enumerate(ROOMS)}
    names = sorted(found, key=lambda name: (order.get(room[name], len(order)), room[name], name))
    rows = -(-len(names) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(2.1 * COLUMNS, 1.6 * rows + 0.6), layout="constrained"
    )
    equal = {row["loss"]: row["equal"] for row in summarise(config, arrays)}
    for panel, name in zip(axes.flat, names, strict=False):
        _panel(panel, arrays["margin"], arrays[name], both=equal[name] == "yes")
        panel.set_title(name.replace("generalised_cross_entropy", "gce"), fontsize=8, pad=2)
        panel.text(0.99, 0.99, room[name].replace("_", " "), transform=panel.transAxes,
                   fontsize=5.5, color="#888888", ha="right", va="top")  # fmt: skip
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    lines = {
        "$d_w$, raises the chosen": (CHOSEN, "-"),
        "$d_l$, lowers the rejected": (REJECTED, "-"),
        "$d_w = d_l$": (BOTH, "-"),
        "as the chosen rises": ("black", "-"),
        "as the rejected falls": ("black", (0, (3, 2))),
    }
    drawn = [Line2D([], [], color=c, ls=style, label=k) for k, (c, style) in lines.items()]
    figure.legend(handles=drawn, loc="outside upper center", ncols=len(drawn))
    figure.supxlabel(
        "change of the margin from where the policy is its reference, nats", fontsize=9
    )
    return figure


def _panel(panel: Axes, margin: np.ndarray, pulls: np.ndarray, *, both: bool) -> None:
    for moved, style in ((0, "-"), (1, (0, (3, 2)))):
        for which, colour in ((1, REJECTED), (0, CHOSEN)):
            if both:
                colour = BOTH
            panel.plot(margin, pulls[moved, :, which], color=colour, ls=style, lw=1.3)
    # What explodes is cut off: twelve times the largest pull within 3 % of the way.
    near = np.abs(pulls[:, np.abs(margin) <= 0.03 * margin[-1]]).max()
    low, high = max(pulls.min(), -12 * near), min(pulls.max(), 12 * near)
    low, high = min(low, 0.0), max(high, 0.0)
    room = max(0.08 * (high - low), 1e-9)
    panel.set_ylim(low - room, high + room)
    panel.axhline(0, color="black", lw=0.5)
    panel.axvline(0, color="black", lw=0.3, ls=":")
    panel.set_xticks([margin[0], 0, margin[-1]])
    panel.tick_params(labelsize=6, length=2, pad=1)
    panel.locator_params(axis="y", nbins=4)


def main() -> None:
    """The command line."""
    running.command(
        "loss_pulls", Config, description=__doc__, hashes=lambda config: {}, run=run,
        summarise=summarise, report=report, draw=draw,
    )  # fmt: skip


if __name__ == "__main__":
    main()
