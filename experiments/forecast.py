"""What predicts displacement: signals known before training, against what training then did.

Claim:   Numbers known before training say which chosen responses will fall: the exact ones,
         gradient inner products, say it best, those of embeddings alone are cheaper.
Run:     python -m experiments.forecast
Takes:   about 20 minutes on 2 cores
Expect:  the exact effect of the first update forecasts one update nearly perfectly, and less the
         longer training goes on; of the rest it is measured which beat the length difference.
Source:  Razin et al. (2024), Section 5 and Figure 2, https://arxiv.org/abs/2410.08847; Yuan et al.
         (2024), https://arxiv.org/abs/2410.13828
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from experiments import common
from experiments.correlation import interval, partial_spearman, spearman
from jaxpref import diagnostics, embeddings, gradients, losses
from jaxpref.data import batches, files, preferences
from jaxpref.models import pretrained
from jaxpref.training.linearised import linearised

TEXT, FORWARD, GRAM = "none", "1 forward", "1 forward, 1 backward a response"
SIGNALS = {  # larger: a fall of the chosen response is expected; what each costs a pair
    "first update, pair alone": "1 forward, 1 backward, 1 JVP",
    "first update, all pairs": "1 forward, 1 backward, 1 JVP",
    "Gram, first-order change": GRAM,
    "Gram in the optimizer's metric": GRAM,
    "Gram, band margin": GRAM,
    "Gram, cosine": GRAM,
    "unembedding Gram (alpha-weighted)": FORWARD,
    "CHES": FORWARD,
    "CHES, length-normalised": FORWARD,
    "last hidden inner product": FORWARD,
    "edit similarity": TEXT,
    "length difference": TEXT,
    "chance": TEXT,
}
PROTOCOLS = ("alone", "together")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    optimizer: common.Optimizer = "adam"
    rate: float = 1e-6
    pairs: int = 24
    alone: tuple[int, ...] = (1, 10)
    """Updates after which a pair trained alone is looked at."""
    together: tuple[int, ...] = (1, 10, 50)
    """Updates after which pairs trained together are looked at."""
    batch: int = 4
    """Pairs of an update when they are trained together."""
    seeds: int = 1
    """Each draws other pairs, other batches."""
    beta: float = 0.1
    resamples: int = 2000
    """Of the bootstrap over pairs."""
    supervised: int = 0
    """Updates of Adam on the chosen responses of all pairs before, at `supervised_rate`."""
    supervised_rate: float = 1e-3
    limit: int = 64
    """Most tokens of prompt and response; longer prompts lose their beginning."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A JSONL file of pairs; by default the shipped ones."""


SMOKE = Config(pairs=4, alone=(1, 2), together=(1, 2), batch=2, resamples=50)


def load(config: Config) -> tuple[common.Subject, common.Problem]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    common.at_least(1, config, "pairs", "batch", "seeds", "resamples")
    for name in PROTOCOLS:
        if min(getattr(config, name), default=0) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected numbers of updates")
    texts = files.read_pairs(config.data, bad="drop") if config.data else preferences.load()
    if not config.batch <= config.pairs <= len(texts):
        raise ValueError(f"pairs: got {config.pairs}, expected {config.batch} to {len(texts)}")
    subject = common.open_model(config.model)
    return subject, common.problem(subject.policy, subject.tokenizer, texts, limit=config.limit)


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    subject, problem = load(config)
    return {"model": pretrained.hash_params(subject.params), "data": problem.digest}


class Programs(NamedTuple):
    """The compiled functions of a run."""

    pull: Any  # (logp, reference) -> [pairs 2]
    slope: Any  # (params, batch) -> gradient of the mean loss
    change: Any  # (params, arrays, tangent) -> (logp, change)
    grams: Any  # (params, arrays, metric) -> [pairs 2 2]
    hidden: Any  # (params, batch) -> Responses
    logp: Any  # (params, batch) -> [pairs 2]


def programs(config: Config, problem: common.Problem) -> Programs:
    """Compiled once a run."""

    def loss(logp, reference):
        return losses.dpo(logp, reference, beta=config.beta)

    def mean_loss(params, batch):
        return loss(problem.score(params, batch).logp, batch.reference).mean()

    def grams(params, arrays, metric):
        found = gradients.pair_grams(
            problem.logp, params, arrays, metric=metric, responses="together"
        )
        return found.gram

    return Programs(
        jax.jit(jax.grad(lambda logp, reference: loss(logp, reference).sum())),
        jax.jit(jax.grad(mean_loss)),
        jax.jit(functools.partial(common.logp_and_change, problem.logp)),
        jax.jit(grams),
        jax.jit(problem.hidden),
        jax.jit(lambda params, batch: problem.score(params, batch).logp),
    )


@functools.partial(jax.jit, static_argnames="name")
def _first_update(name: str, params, gradient):
    optimizer = common.unit_optimizer(name)
    state = optimizer.init(params)
    metric = linearised(optimizer, state, gradient, params, decay=common.DECAY[name]).metric
    return optimizer.update(gradient, state, params)[0], metric


def _rows(config: Config, problem: common.Problem, seed: int) -> np.ndarray:
    return batches.order(len(problem), config.pairs, seed, 0)


def text_signals(targets: np.ndarray, is_target: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """What the token ids alone say, and chance."""
    words = [
        [x[at] for x, at in zip(*pair, strict=True)]
        for pair in zip(targets, is_target, strict=True)
    ]
    return {
        "edit similarity": np.array([embeddings.edit_similarity(*pair) for pair in words]),
        "length difference": np.asarray(embeddings.length_difference(is_target.sum(axis=2))),
        "chance": np.random.default_rng(seed).random(len(targets)),
    }


def signals(config: Config, seed: int, problem, params, policy, run: Programs) -> dict[str, Any]:
    """``signals [signals pairs]`` in the order of `SIGNALS`; and ``gram``, ``logp`` beside them."""
    rows = _rows(config, problem, seed)
    batch, name = problem.rows(rows), config.optimizer
    logp = run.logp(params, batch)
    pull = run.pull(logp, batch.reference)
    update, metric = _first_update(name, params, run.slope(params, batch))
    together = run.change(params, batch[:3], update)[1]
    gram = run.grams(params, batch[:3], jax.tree.map(jnp.ones_like, metric))
    own = diagnostics.first_order_change(run.grams(params, batch[:3], metric), pull)
    alone = []
    for i in tqdm(rows, "first updates", leave=False):
        one = problem.rows([i])
        update, _ = _first_update(name, params, run.slope(params, one))
        alone.append(run.change(params, one[:3], update)[1][0, 0])
    found = run.hidden(params, batch)
    head = embeddings.unembedding_gram(
        found.hidden, found.targets, found.is_target, policy.unembedding(params)
    )
    plain = diagnostics.first_order_change(gram, pull)
    states = found.hidden, found.is_target
    values = {
        "first update, pair alone": -np.array(alone),
        "first update, all pairs": -together[:, 0],
        "Gram, first-order change": -plain[:, 0],
        "Gram in the optimizer's metric": -own[:, 0],
        "Gram, band margin": -diagnostics.band_margin(gram, pull),
        "Gram, cosine": diagnostics.cosine(gram),
        "unembedding Gram (alpha-weighted)": embeddings.alpha_weighted_ches(head),
        "CHES": embeddings.ches(*states),
        "CHES, length-normalised": embeddings.ches_length_normalised(*states),
        "last hidden inner product": embeddings.last_hidden_similarity(*states),
        **text_signals(np.asarray(found.targets), np.asarray(found.is_target), seed),
    }
    # Gradients at an obtuse angle have no edge to be near to: the farthest from a fall.
    stacked = np.stack([np.nan_to_num(np.asarray(values[n]), neginf=-1e30) for n in SIGNALS])
    return {"signals": stacked, "gram": gram, "logp": logp}


def train(config: Config, rows: np.ndarray, seed: int, problem, params, run: Programs,
          horizons: Sequence[int], batch: int) -> np.ndarray:  # fmt: skip
    """Changes of log-probabilities ``[horizons rows 2]``, in nats since the start."""
    start = run.logp(params, problem.rows(rows))
    moving = jax.tree.map(jnp.copy, params)
    state, found = common.unit_optimizer(config.optimizer).init(moving), []
    for number in range(max(horizons)):
        index = rows[batches.order(len(rows), batch, seed, number)]
        gradient = run.slope(moving, problem.rows(index))
        moving, state = common.apply_update(config.optimizer, moving, state, gradient, config.rate)
        if number + 1 in horizons:
            found.append(np.asarray(run.logp(moving, problem.rows(rows)) - start))
    return np.stack(found)


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """``signals [seeds signals pairs]``; ``alone``, ``together [seeds horizons pairs 2]``, nats."""
    subject, problem = load(config)

    def begin():
        params = common.supervise(
            problem, subject.params, optax.adam(config.supervised_rate),
            steps=config.supervised, batch=config.batch, seed=0,
        )  # fmt: skip
        ready = problem.with_reference(params)
        return ready, params, programs(config, ready)

    begun = functools.cache(begin)

    def kept(name: str, make: Callable[..., Mapping[str, Any]]) -> dict[str, np.ndarray]:
        return common.kept(folder, name, lambda: make(*begun()))

    seeds = []
    for seed in range(config.seeds):
        rows = _rows(config, problem, seed)

        def first(ready, params, compiled, seed=seed):
            return signals(config, seed, ready, params, subject.policy, compiled)

        def pair(i, ready, params, compiled):
            one = np.array([i])
            horizons = sorted(config.alone)
            return {"x": train(config, one, 0, ready, params, compiled, horizons, 1)}

        def every(ready, params, compiled, seed=seed, rows=rows):
            horizons = sorted(config.together)
            return {"x": train(config, rows, seed, ready, params, compiled, horizons, config.batch)}

        record = kept(f"{seed}_signals", first)
        alone = [
            kept(f"{seed}_alone_{i}", functools.partial(pair, i))["x"]
            for i in tqdm(rows, f"pairs alone, seed {seed}", unit="pair")
        ]
        record["alone"] = np.concatenate(alone, axis=1)
        record["together"] = kept(f"{seed}_together", every)["x"]
        seeds.append(record)
    return {name: np.stack([record[name] for record in seeds]) for name in seeds[0]}


def auc(score: np.ndarray, fell: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of the last axis: how often one that fell scores higher.

    NaN where all fell or none.
    """
    positive = fell.sum(axis=-1)
    both = positive * (fell.shape[-1] - positive)
    above = (stats.rankdata(score, axis=-1) * fell).sum(axis=-1) - positive * (positive + 1) / 2
    return np.where(both > 0, above / np.maximum(both, 1), np.nan)


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each protocol, number of updates and signal, over the pairs of all seeds."""
    rows = []
    columns = np.moveaxis(arrays["signals"], 1, 0).reshape(len(SIGNALS), -1)
    by = dict(zip(SIGNALS, columns, strict=True))
    for protocol in PROTOCOLS:
        for k, updates in enumerate(sorted(getattr(config, protocol))):
            change = arrays[protocol][:, k, :, 0].reshape(-1)
            fell = change < 0
            for name, score in by.items():
                rows.append(
                    {
                        "protocol": protocol,
                        "updates": updates,
                        "signal": name,
                        "cost": SIGNALS[name],
                        "fell": int(fell.sum()),
                        "of": len(fell),
                        "change": float(change.mean()),
                        "spearman": float(spearman(score, -change)),
                        "spearman_95": interval(spearman, (score, -change), config.resamples),
                        "given_length": float(
                            partial_spearman(score, -change, by["length difference"])
                        ),
                        "auc": float(auc(score, fell)),
                        "auc_95": interval(auc, (score, fell), config.resamples),
                    }
                )
    return rows


def report(config: Config, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and in words which signals forecast anything."""
    lines, words = [], []
    for protocol in PROTOCOLS:
        for updates in sorted(getattr(config, protocol)):
            some = [r for r in rows if (r["protocol"], r["updates"]) == (protocol, updates)]
            first = some[0]
            lines += [
                f"{protocol}, after {updates} updates of {config.optimizer} at {config.rate:g}:"
                f" {first['fell']} of {first['of']} chosen responses fell, mean change"
                f" {first['change']:+.4f} nats",
                f"{'signal':<34} {'Spearman (95 %)':>24} {'given length':>13} {'AUC (95 %)':>22}"
                "  cost a pair",
            ]
            for row in some:
                low, high = row["spearman_95"]
                area = "-" if row["auc"] != row["auc"] else "{:.2f} ({:.2f} to {:.2f})".format(
                    row["auc"], *row["auc_95"])  # fmt: skip
                lines.append(
                    f"{row['signal']:<34} {row['spearman']:>+7.2f} ({low:+.2f} to {high:+.2f})"
                    f" {row['given_length']:>+13.2f} {area:>22}  {row['cost']}"
                )
            lines.append("")
            words.append(_verdict(protocol, updates, some))
    return "\n".join([*lines, *words])


def _verdict(protocol: str, updates: int, rows: Sequence[Mapping[str, Any]]) -> str:
    told = [r for r in rows if r["spearman_95"][0] > 0]
    against = [r for r in rows if r["spearman_95"][1] < 0]
    best = sorted(told, key=lambda r: -r["spearman"])
    names = ", ".join(f"{r['signal']} ({r['spearman']:+.2f})" for r in best) or "no signal"
    said = f"{protocol}, {updates} updates: better than chance: {names}."
    if against:
        wrong = ", ".join(f"{r['signal']} ({r['spearman']:+.2f})" for r in against)
        said += f" The wrong way round: {wrong}."
    return said


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """Rank correlation of every signal with the fall, with its interval."""
    rows = summarise(config, arrays)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained", sharey=True)
    place = {name: -i for i, name in enumerate(SIGNALS)}
    colours = ("#1b6ca8", "#c8402f", "#777777", "#3c8d40")
    for panel, protocol in zip(axes, PROTOCOLS, strict=True):
        horizons = sorted(getattr(config, protocol))
        for k, (updates, colour) in enumerate(zip(horizons, colours, strict=False)):
            some = [r for r in rows if (r["protocol"], r["updates"]) == (protocol, updates)]
            y = [place[r["signal"]] + 0.22 * (len(horizons) / 2 - k) for r in some]
            panel.hlines(y, *np.array([r["spearman_95"] for r in some]).T, color=colour, lw=1)
            label = f"{updates} update" + "s" * (updates > 1)
            panel.plot([r["spearman"] for r in some], y, "o", ms=4, color=colour, label=label)
        panel.axvline(0, color="black", lw=0.6)
        panel.set_title(f"pairs trained {protocol}", fontsize=10)
        panel.set_xlabel("Spearman with the fall of the chosen (95 % interval over pairs)")
        panel.set_xlim(-1.05, 1.05)
        panel.legend(frameon=False, fontsize=8, loc="lower left")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(place.values()), list(place))
    return figure


def main() -> None:
    """The command line."""
    common.command(
        "forecast", Config, description=__doc__, hashes=hashes, run=run,
        summarise=summarise, report=report, draw=draw,
    )  # fmt: skip


if __name__ == "__main__":
    main()
