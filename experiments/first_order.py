"""Predicted against measured: what one step, and ten, do to every log-probability.

Claim:   To first order, an optimizer's step changes each log-probability by the inner product of
         its gradient with the step. For a small enough learning rate nothing else matters, whatever
         the optimizer, its momentum and its clipping; above some learning rate the theory ends.
Run:     python -m experiments.first_order
Takes:   about 25 minutes on 2 cores
Expect:  after one step the points lie on the diagonal over several decades of the learning rate;
         after ten steps, predicted from the first gradient alone, the range is shorter. A pair's
         own Gram matrix, without its neighbours in the batch, predicts less.
Source:  Yuan et al. (2024), Section 3, https://arxiv.org/abs/2410.13828
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments import common
from jaxpref import diagnostics, gradients, losses
from jaxpref.data import batches, files, preferences
from jaxpref.models import pretrained
from jaxpref.training.linearised import linearised
from jaxpref.training.step import tree_norm

HOLDS = 0.9  # R^2 below this: the theory has stopped holding


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    optimizers: tuple[common.Optimizer, ...] = ("sgd", "rmsprop", "adam")
    clips: tuple[float, ...] = (math.inf, 1.0)
    """Largest norm of the gradient; inf does not clip."""
    sgd_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Learning rates of plain gradient descent."""
    rmsprop_rates: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4)
    adam_rates: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4)
    pairs: int = 4
    """In the batch that is trained on."""
    others: int = 12
    """Further pairs that are only looked at."""
    steps: int = 10
    """Of the longer prediction, all on the same batch."""
    warm: int = 2
    """Updates on other batches before, at the smallest learning rate: they fill the state."""
    seeds: int = 2
    """Each draws other pairs."""
    beta: float = 0.1
    limit: int = 64
    """Most tokens of prompt and response; longer prompts lose their beginning."""
    supervised: int = 0
    """Updates of Adam on the chosen responses before, at `supervised_rate`."""
    supervised_rate: float = 1e-3
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A JSONL file of pairs; by default the shipped ones."""


SMOKE = Config(
    optimizers=("sgd", "adam"), clips=(1.0,), sgd_rates=(1e-5,), adam_rates=(1e-6,),
    pairs=2, others=1, steps=2, warm=1, seeds=1,
)  # fmt: skip


class Part(NamedTuple):
    """One optimizer, with or without clipping, on one draw of pairs."""

    seed: int
    optimizer: str
    clip: float


def parts(config: Config) -> list[Part]:
    """All of them, in the order of the arrays."""
    return [
        Part(*x) for x in itertools.product(range(config.seeds), config.optimizers, config.clips)
    ]


def rates_of(config: Config, optimizer: str) -> tuple[float, ...]:
    """The learning rates of an optimizer, sorted."""
    return tuple(sorted(getattr(config, f"{optimizer}_rates")))


def load(config: Config) -> tuple[common.Subject, common.Problem]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    common.at_least(1, config, "pairs", "steps", "seeds")
    counts = {len(rates_of(config, name)) for name in config.optimizers}
    if len(counts) != 1:
        raise ValueError(f"rates: got {sorted(counts)} learning rates, expected as many for each")
    texts = files.read_pairs(config.data) if config.data else preferences.load()
    drawn = config.pairs * (1 + config.warm) + config.others
    if drawn > len(texts):
        raise ValueError(f"pairs: a run draws {drawn}, expected at most the {len(texts)} there are")
    subject = common.open_model(config.model)
    return subject, common.problem(subject.policy, subject.tokenizer, texts, limit=config.limit)


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    subject, problem = load(config)
    return {"model": pretrained.hash_params(subject.params), "data": problem.digest}


class Programs(NamedTuple):
    """The compiled functions that all parts of a run share."""

    slope: Any  # (params, batch, clip) -> (pull, gradient of the mean loss clipped, factor)
    logp: Any  # (params, batch) -> [pairs 2]
    change: Any  # (params, arrays, tangent) -> (logp, change)
    grams: Any  # (params, arrays, metric) -> [pairs 2 2]


def programs(config: Config, problem: common.Problem) -> Programs:
    """Compiled once a run: the optimizer is applied outside of them."""

    def loss(logp, batch):
        return losses.dpo(logp, batch.reference, beta=config.beta)

    @jax.jit
    def slope(params, batch, clip):
        logp, back = jax.vjp(lambda p: problem.score(p, batch).logp, params)
        pull = jax.grad(lambda x: loss(x, batch).sum())(logp)
        (gradient,) = back(pull / len(pull))
        factor = jnp.minimum(1.0, clip / tree_norm(gradient))
        return pull, jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient), factor

    @jax.jit
    def grams(params, arrays, metric):
        return gradients.pair_grams(
            problem.logp, params, arrays, metric=metric, responses="together"
        ).gram

    return Programs(
        slope,
        jax.jit(lambda params, batch: problem.score(params, batch).logp),
        jax.jit(functools.partial(common.logp_and_change, problem.logp)),
        grams,
    )


@functools.partial(jax.jit, static_argnames=("name", "steps"))
def _frozen(name: str, steps: int, params, state, gradient):
    """Sum of so many updates, all of the same gradient, at learning rate 1."""

    def one(_, carry):
        total, state = carry
        update, state = common.unit_optimizer(name).update(gradient, state, params)
        return jax.tree.map(jnp.add, total, update), state

    zero = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, steps, one, (zero, state))[0]


@functools.partial(jax.jit, static_argnames="name")
def _linearised(name: str, params, state, gradient):
    return linearised(
        common.unit_optimizer(name), state, gradient, params, decay=common.DECAY[name]
    )


@jax.jit
def _moved(params, rate, direction):
    return jax.tree.map(lambda p, u: p + jnp.asarray(rate, u.dtype) * u, params, direction)


def measure(config: Config, part: Part, problem, params, run: Programs) -> dict[str, Any]:
    """Predictions and measurements of one part.

    Returns:
        ``total``, ``own``, ``frozen``: predicted changes per unit of learning rate by one step, by
        one step of the pair alone, and by all steps, ``[probes 2]`` (``own``: ``[pairs 2]``).
        ``measured``: nats, ``[one or all steps, rates, probes, 2]``.
    """
    n, rates = config.pairs, rates_of(config, part.optimizer)
    drawn = batches.order(len(problem), n * (1 + config.warm) + config.others, part.seed, 0)
    trained, probes = drawn[:n], drawn[: n + config.others]
    clip = jnp.float32(part.clip)
    params, state = (
        jax.tree.map(jnp.copy, params),
        common.unit_optimizer(part.optimizer).init(params),
    )
    for at in range(config.warm):
        begin = len(probes) + at * n
        _, gradient, _ = run.slope(params, problem.rows(drawn[begin : begin + n]), clip)
        params, state = common.apply_update(
            part.optimizer, params, state, gradient, jnp.float32(rates[0])
        )

    batch, seen = problem.rows(trained), problem.rows(probes)
    pull, gradient, factor = run.slope(params, batch, clip)
    metric, carried = _linearised(part.optimizer, params, state, gradient)
    update = jax.tree.map(lambda c, d, g: c - d * g, carried, metric, gradient)
    arrays = seen[:3]
    start, total = run.change(params, arrays, update)
    _, momentum = run.change(params, batch[:3], carried)
    gram = run.grams(params, batch[:3], metric)
    own = momentum + diagnostics.first_order_change(gram, pull) * factor / n
    frozen = run.change(
        params, arrays, _frozen(part.optimizer, config.steps, params, state, gradient)
    )[1]
    after = np.zeros((2, len(rates), *start.shape))
    for i, rate in enumerate(rates):
        size = jnp.float32(rate)
        after[0, i] = run.logp(_moved(params, size, update), seen)
        moving, kept = (jax.tree.map(jnp.copy, x) for x in (params, state))
        for _ in range(config.steps):
            _, slope, _ = run.slope(moving, batch, clip)
            moving, kept = common.apply_update(part.optimizer, moving, kept, slope, size)
        after[1, i] = run.logp(moving, seen)
    before = np.asarray(run.logp(params, seen))
    return {
        "total": total,
        "own": own,
        "frozen": frozen,
        "gram": gram,
        "pull": pull,
        "factor": factor,
        "measured": after - before,
    }


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Arrays of `measure` with a leading axis ``parts``, in the order of `parts`."""
    subject, problem = load(config)
    todo = parts(config)

    def begin() -> tuple[Any, common.Problem, Programs]:
        params = common.supervise(
            problem,
            subject.params,
            optax.adam(config.supervised_rate),
            steps=config.supervised,
            batch=config.pairs,
            seed=0,
        )
        ready = problem.with_reference(params)
        return params, ready, programs(config, ready)

    begun = functools.cache(begin)  # not for a run that is only read back

    def make(part: Part) -> dict[str, Any]:
        params, ready, compiled = begun()
        return measure(config, part, ready, params, compiled)

    bar, records = tqdm(todo, "parts", unit="part"), []
    for part in bar:
        bar.set_description(f"{part.optimizer}, clip {part.clip:g}, seed {part.seed}")
        name = f"{part.seed}_{part.optimizer}_{part.clip:g}"
        records.append(common.kept(folder, name, functools.partial(make, part)))
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def r_squared(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Share of the measured variation that the prediction itself explains: nothing is fitted."""
    left = ((measured - predicted) ** 2).sum()
    return float(1 - left / ((measured - measured.mean()) ** 2).sum())


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Pearson's, of all log-probabilities: what is left when the scale is not asked for."""
    return float(np.corrcoef(predicted.ravel(), measured.ravel())[0, 1])


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each optimizer, clipping and learning rate, over all seeds."""
    todo, n, rows = parts(config), config.pairs, []
    for optimizer, clip in itertools.product(config.optimizers, config.clips):
        at = [i for i, part in enumerate(todo) if (part.optimizer, part.clip) == (optimizer, clip)]
        for j, rate in enumerate(rates_of(config, optimizer)):
            one, many = arrays["measured"][at, 0, j], arrays["measured"][at, 1, j]
            total, frozen = rate * arrays["total"][at], rate * arrays["frozen"][at]
            rows.append(
                {
                    "optimizer": optimizer,
                    "clip": clip,
                    "rate": rate,
                    "predicted_nats": float(np.abs(total[:, :n]).mean()),
                    "one": r_squared(total[:, :n], one[:, :n]),
                    "one_seeds": [
                        r_squared(a, b) for a, b in zip(total[:, :n], one[:, :n], strict=True)
                    ],
                    "others": r_squared(total[:, n:], one[:, n:]) if config.others else math.nan,
                    "own": r_squared(rate * arrays["own"][at], one[:, :n]),
                    "own_correlation": correlation(arrays["own"][at], one[:, :n]),
                    "signs": float((np.sign(total) == np.sign(one)).mean()),
                    "many": r_squared(frozen[:, :n], many[:, :n]),
                    "many_nats": float(np.abs(many[:, :n]).mean()),
                }
            )
    return rows


def ends(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """The smallest learning rate from which on the theory does not hold; None if it always does."""
    failing = [row["rate"] for row in rows if not row[column] >= HOLDS]
    holding = [row["rate"] for row in rows if row[column] >= HOLDS]
    failing = [rate for rate in failing if not holding or rate > max(holding)]
    return min(failing) if failing else None


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and in words where the theory ends."""
    head = (
        f"R^2 of predicted against measured changes of log-probabilities, {config.seeds} seeds x"
        f" {config.pairs} pairs x 2 (no fit: 1 is exact, below 0 is worse than the mean)\n"
        "one step: pairs of the batch, pairs outside of it, and pairs of the batch from their own"
        " Gram alone\n(r: its correlation); "
        f"{config.steps} steps: from the first gradient; nats: mean change; signs: share right\n\n"
    )
    lines = [
        "optimizer  clip  rate      nats  one step   outside      own      r  signs"
        f" {config.steps:>3} steps     nats"
    ]
    for row in rows:
        lines.append(
            "{optimizer:<9} {clip:>5g} {rate:>5.0e} {predicted_nats:>9.4f} {one:>9.4f}"
            " {others:>9.4f} {own:>8.2f} {own_correlation:>6.2f} {signs:>6.2f} {many:>9.3f}"
            " {many_nats:>8.4f}".format(**row)
        )
    words = []
    for key, group in itertools.groupby(rows, key=lambda row: (row["optimizer"], row["clip"])):
        some = list(group)
        said = []
        for column, what in (("one", "one step"), ("many", f"{config.steps} steps")):
            end = ends(some, column)
            if not any(row[column] >= HOLDS for row in some):
                said.append(f"{what} at no learning rate tried")
            elif end is None:
                said.append(f"{what} at all learning rates up to {some[-1]['rate']:g}")
            else:
                said.append(f"{what} below {end:g}")
        clipped = "" if math.isinf(key[1]) else f", gradient clipped to {key[1]:g}"
        words.append(f"{key[0]}{clipped}: first-order theory holds (R^2 >= {HOLDS:g}) for "
                     + " and ".join(said) + ".")  # fmt: skip
    for optimizer, group in itertools.groupby(rows, key=lambda row: row["optimizer"]):
        some = list(group)
        words.append(
            f"{optimizer}: a pair's own Gram, without its neighbours in the batch, has an R^2 of at"
            f" most {max(row['own'] for row in some):.2f} and a correlation of at most"
            f" {max(row['own_correlation'] for row in some):.2f}."
        )
    words.append(
        "Where the changes are near the rounding of float32 log-probabilities (about 1e-5 nats),"
        " a small learning rate lowers R^2 too."
    )
    return head + "\n".join(lines) + "\n\n" + "\n".join(words)


COLOURS = {"chosen": "#1b6ca8", "rejected": "#777777"}


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Above: a point a response, at the largest rate that holds. Below: R^2 over rates."""
    rows, todo, n = summarise(config, arrays), parts(config), config.pairs
    count = len(config.optimizers)
    figure, axes = plt.subplots(
        2, count, figsize=(4.6 * count, 8), layout="constrained", squeeze=False
    )
    clip = config.clips[0]
    for k, optimizer in enumerate(config.optimizers):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        holding = [r["rate"] for r in mine if r["clip"] == clip and r["one"] >= HOLDS]
        rate = max(holding, default=rates_of(config, optimizer)[0])
        j = rates_of(config, optimizer).index(rate)
        at = [i for i, part in enumerate(todo) if (part.optimizer, part.clip) == (optimizer, clip)]
        panel = axes[0, k]
        for side, name in enumerate(COLOURS):
            x = rate * arrays["total"][at, :, side]
            y = arrays["measured"][at, 0, j, :, side]
            style = {"color": COLOURS[name], "s": 22}
            panel.scatter(x[:, :n], y[:, :n], label=f"{name}, in the batch", **style)
            if config.others:
                panel.scatter(
                    x[:, n:], y[:, n:], label=f"{name}, outside", facecolors="none",
                    edgecolors=COLOURS[name], s=22,
                )  # fmt: skip
        panel.axline((0, 0), slope=1, color="black", lw=0.8, zorder=0)
        clipped = "no clipping" if math.isinf(clip) else f"clipped to {clip:g}"
        panel.set_title(f"{optimizer}, one step at {rate:g}, {clipped}", fontsize=10)
        panel.set_xlabel("predicted change of log-probability (nats)")
        panel.set_ylabel("measured change (nats)")
        if k == 0:
            panel.legend(frameon=False, fontsize=8)
        _draw_reach(axes[1, k], config, mine, legend=k == 0)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_reach(panel, config: Config, rows: Sequence[Mapping[str, Any]], *, legend: bool) -> None:
    lines = (("one", "one step", "#1b6ca8"), ("many", f"{config.steps} steps", "#c8402f"),
             ("own_correlation", "one step, own Gram only (correlation)", "#777777"))  # fmt: skip
    for clip, dash in zip(config.clips, ("-", "--", ":", "-."), strict=False):
        some = [row for row in rows if row["clip"] == clip]
        for column, name, colour in lines:
            label = name if math.isinf(clip) else f"{name}, clipped to {clip:g}"
            panel.plot(
                [row["rate"] for row in some],
                np.clip([row[column] for row in some], -1, 1),
                dash, marker="o", ms=3, color=colour, label=label,
            )  # fmt: skip
    panel.axhline(HOLDS, color="black", lw=0.6)
    panel.set_xscale("log")
    panel.set_ylim(-1.05, 1.05)
    panel.set_xlabel("learning rate")
    panel.set_ylabel("R² of the prediction (below -1 drawn at -1)")
    if legend:
        panel.legend(frameon=False, fontsize=8, loc="lower left")


def main() -> None:
    """The command line."""
    common.command(
        "first_order",
        Config,
        description=__doc__,
        hashes=hashes,
        run=run,
        summarise=summarise,
        report=report,
        draw=draw,
    )


if __name__ == "__main__":
    main()
