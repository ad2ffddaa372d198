"""Claim: trained to prefer *No* over *Never*, a language model may raise *Yes*.

A margin loss fixes only the difference of two log-probabilities. Where the rest of the probability
goes is decided by geometry: the tokens whose unembeddings lie along ``W_chosen - W_rejected`` gain,
whatever they mean.

Protocol: a yes-or-no question about one statement, answered by one token. Optional supervised
phase on all statements, then 100 updates of a margin loss on one prompt; each seed is another
prompt. Numbers are taken before each update, from the full next-token distribution.

Run:     python -m experiments.no_vs_never --name mine
Takes:   DEMO_TAKES
Expect:  EXPECT
Source:  Razin, Malladi, Bhaskar, Chen, Arora, Hanin 2024, Section 3, Theorems 4 and 5, Tables 1
         to 6 and 13, https://arxiv.org/abs/2410.08847
Read by: notebooks/no_vs_never.ipynb
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxpref import diagnostics, embeddings, gradients, losses, runs
from jaxpref.data import batches, statements
from jaxpref.models import pretrained
from jaxpref.training import optimizers, step

Train = Literal["all", "unembedding", "tabular"]
Loss = Literal["dpo", "ipo", "hinge", "slic_hf", "sppo"]


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers. Settings with several values are run in all combinations."""

    pairs: tuple[str, ...] = ("No>Never",)
    """Preferred and dispreferred answer, joined by ``>``; each must be one token."""
    losses: tuple[Loss, ...] = ("dpo",)
    sft_steps: tuple[int, ...] = (16,)
    """Supervised updates before the margin loss; 0 is the model as it comes."""
    learning_rates: tuple[float, ...] = (3e-7,)
    """Of the margin loss; IPO's is a tenth of it, as in the paper."""
    train: tuple[Train, ...] = ("all", "unembedding", "tabular")
    """What is trained. The last two are controls in which theory allows no displacement."""
    prompts: int = 3
    """Number of seeds; each picks another prompt."""
    updates: int = 100
    beta: float = 0.1
    """Of DPO, hinge and SPPO, per nat."""
    tau: float = 0.01
    """Of IPO: its target margin is ``1 / (2 tau)`` nats."""
    sft_learning_rate: float = 3e-6
    sft_batch: int = 32
    decay: float = 0.99
    """Of RMSprop's running mean of squared gradients."""
    seed: int = 0
    data: str | None = None
    """A JSONL file of statements (persona format too); by default the shipped ones."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file; by default SmolLM2-135M-Instruct."""


# Small enough for a test: two updates of the real model on one prompt.
SMOKE = Config(sft_steps=(1,), sft_batch=2, prompts=1, updates=2)

# Which words mean the same. A gain of a token outside the table is unclassified.
MEANINGS = {
    "affirm": "yes yeah yep yup sure certainly absolutely definitely indeed agreed true".split(),
    "deny": "no nope nah never not none hardly disagree false".split(),
}
SFT_LABELS = {  # by the answer that agrees with the behaviour; drawn from those that are one token
    "Yes": ("No", "Never", "Maybe", "Perhaps"),
    "No": ("Yes", "Yeah", "Sure", "Certainly", "Absolutely"),
}
# Rows of the paper's ten seeds among the 500 statements of either answer in its persona file.
PAPER_PROMPTS = (396, 74, 319, 427, 62, 397, 182, 78, 398, 148)
LOOKS = (1, 5, 25)  # updates after which predictions are held against what happened
GAINS = (5, 25, 100)  # updates after which the largest gains are listed
LIKELY = 500  # tokens, the likeliest at the start, that are ranked apart and drawn
PREDICTIONS = {
    "direction": "<W_z, W_chosen - W_rejected> (Theorem 5)",
    "flow": "the exact rate of gradient flow",
    "update": "the exact first-order effect of the first update",
}


class Cell(NamedTuple):
    """One training run."""

    prompt: int
    sft_steps: int
    pair: str
    loss: str
    learning_rate: float
    train: str

    @property
    def file(self) -> str:
        """Name of the file that keeps its record."""
        return "_".join(str(x) for x in self).replace(">", "-over-") + ".npz"


class Prompt(NamedTuple):
    """A batch of one pair of one-token answers to one question."""

    tokens: jax.Array  # [1 time], padded on the right
    length: jax.Array  # [1]
    hidden: jax.Array  # [1 width], the untrained state that reads the next token
    answers: jax.Array  # [1 2], token ids, chosen first
    reference: jax.Array  # [1 2], nats


class Labelled(NamedTuple):
    """A batch of questions with one-token answers, for the supervised phase."""

    tokens: jax.Array  # [batch time], padded on the right
    length: jax.Array  # [batch]
    answers: jax.Array  # [batch 1], token ids


class NextToken(NamedTuple):
    """What a policy says of the next token."""

    logp: jax.Array  # [batch answers], nats
    every: jax.Array  # [batch vocab], nats


def cells(config: Config) -> list[Cell]:
    """Every combination, one prompt after the other: a run that is stopped has whole sets of fewer prompts."""
    grid = itertools.product(
        range(config.prompts),
        config.sft_steps,
        config.pairs,
        config.losses,
        config.learning_rates,
        config.train,
    )
    return [Cell(*values) for values in grid]


# Models and words -------------------------------------------------------------------------------


@functools.cache
def _model(path: str | None) -> pretrained.Pretrained:
    return pretrained.load(path) if path else pretrained.smollm2()


@functools.cache
def _questions(path: str | None) -> list[statements.Statement]:
    return statements.load(path)


def _digest(records: Sequence[statements.Statement]) -> str:
    return hashlib.sha256(repr(records).encode()).hexdigest()


def _padded(
    questions: Sequence[str], tokenizer, *, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[questions time]`` on multiples of a length, so that few shapes are compiled."""
    ids = [tokenizer.encode(question + "\n") for question in questions]
    lengths = np.array([len(i) for i in ids])
    tokens = np.zeros((len(ids), -(-lengths.max() // multiple) * multiple), np.int32)
    for row, i in zip(tokens, ids, strict=True):
        row[: len(i)] = i
    return tokens, lengths


def _answers(pair: str, tokenizer) -> tuple[int, int]:
    chosen, separator, rejected = pair.partition(">")
    if not (chosen and separator and rejected):
        raise ValueError(f"pairs: got {pair!r}, expected two words such as No>Never")
    return tokenizer.single_token(chosen), tokenizer.single_token(rejected)


def meaning_ids(tokenizer) -> dict[str, list[int]]:
    """Single tokens of each meaning: the words of `MEANINGS`, any case, with or without a space."""
    vocabulary = {}
    for meaning, words in MEANINGS.items():
        cased = [form for word in words for form in (word, word.capitalize(), word.upper())]
        pieces = [tokenizer.encode(space + word) for word in cased for space in ("", " ")]
        vocabulary[meaning] = sorted({piece[0] for piece in pieces if len(piece) == 1})
    return vocabulary


def _sides(pair: str) -> tuple[str | None, str | None]:
    """Meaning of the chosen word, and its opposite; None where the table does not know it."""
    word = pair.partition(">")[0].lower()
    same = next((m for m, words in MEANINGS.items() if word in words), None)
    return same, {"affirm": "deny", "deny": "affirm"}.get(same or "")


# What is trained --------------------------------------------------------------------------------


def next_token_hidden(policy, params, batch) -> jax.Array:
    """State ``[batch width]`` after the last token of each right-padded prompt."""
    hidden = policy.hidden(params, batch.tokens)
    return jnp.take_along_axis(hidden, (batch.length - 1)[:, None, None], axis=1)[:, 0]


def next_token_logp(policy, params, batch) -> jax.Array:
    """Log-probabilities ``[batch vocab]`` of the next token under the whole model."""
    logits = next_token_hidden(policy, params, batch) @ policy.unembedding(params).T
    return jax.nn.log_softmax(logits)


def _trained(train: str, policy, params, hidden) -> Any:
    """The parameters that are trained: a copy, because a step donates them."""
    if train == "all":
        return jax.tree.map(jnp.copy, params)
    unembedding = jnp.copy(policy.unembedding(params))
    return unembedding if train == "unembedding" else hidden @ unembedding.T


def _logp_of(train: str, policy) -> Callable[[Any, Prompt], jax.Array]:
    """``(what is trained, prompt) -> [1 vocab]``."""
    return {
        "all": functools.partial(next_token_logp, policy),
        "unembedding": lambda W, batch: jax.nn.log_softmax(batch.hidden @ W.T),
        "tabular": lambda logits, batch: jax.nn.log_softmax(logits),
    }[train]


def _margin_loss(config: Config, name: str) -> Callable:
    """The named loss of ``(scores, batch)``, its hyperparameters bound."""
    return {
        "dpo": lambda s, b: losses.dpo(s.logp, b.reference, beta=config.beta),
        "ipo": lambda s, b: losses.ipo(s.logp, b.reference, tau=config.tau),
        "hinge": lambda s, b: losses.hinge(s.logp, b.reference, beta=config.beta),
        "sppo": lambda s, b: losses.sppo(s.logp, b.reference, beta=config.beta),
        "slic_hf": lambda s, b: losses.slic_hf(s.logp, delta=1.0, lam=0.1),
    }[name]


def _score(logp_of: Callable) -> Callable:
    def score(params, batch):
        every = logp_of(params, batch)
        return NextToken(jnp.take_along_axis(every, batch.answers, axis=1), every)

    return score


def _rmsprop(config: Config, learning_rate: float) -> optax.GradientTransformation:
    # The learning rate lies in the optimizer's state: one compiled step serves all of them.
    return optax.inject_hyperparams(optimizers.torch_rmsprop)(
        learning_rate=learning_rate, decay=config.decay
    )


# The supervised phase ---------------------------------------------------------------------------


def _labels(config: Config, tokenizer) -> np.ndarray:
    """One answer token a statement, against the behaviour it describes, drawn uniformly."""
    known = {
        side: [ids[0] for word in words if len(ids := tokenizer.encode(word)) == 1]
        for side, words in SFT_LABELS.items()
    }
    rng = np.random.default_rng(config.seed)
    sides = [s.answer.strip() for s in _questions(config.data)]
    return np.array([rng.choice(known[side]) for side in sides], np.int32)


@functools.lru_cache(maxsize=3)
def supervised(config: Config, steps: int, folder: Path | None = None) -> Any:
    """Parameters after `steps` updates on the statements' labels; kept in `folder` if given."""
    policy, params, *_ = model = _model(config.model)
    kept = folder / f"sft-{steps}.npz" if folder else None
    if steps == 0:
        return params
    leaves, structure = jax.tree.flatten(params)
    if kept and kept.exists():
        with np.load(kept) as file:
            return structure.unflatten(jnp.asarray(file[str(i)]) for i in range(len(leaves)))
    questions, labels = _questions(config.data), _labels(config, model.tokenizer)
    optimizer = _rmsprop(config, config.sft_learning_rate)
    update = step.make_step(
        _score(functools.partial(next_token_logp, policy)),
        lambda scores, _: -scores.logp[:, 0],
        optimizer,
    )
    state = step.init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(0))
    bar = tqdm(range(steps), "supervised phase", unit="update")
    for i in bar:
        rows = batches.order(len(questions), config.sft_batch, seed=config.seed, step=i)
        asked = _padded([questions[r].question for r in rows], model.tokenizer, multiple=16)
        state, metrics, _ = update(state, Labelled(*map(jnp.asarray, (*asked, labels[rows, None]))))
        bar.set_postfix(loss=f"{metrics['loss']:.2f}")
    if kept:
        runs.save_arrays(kept, {str(i): x for i, x in enumerate(jax.tree.leaves(state.params))})
    return state.params


# One run ----------------------------------------------------------------------------------------


@functools.cache
def _compiled(config: Config, train: str, loss: str):
    """Update, slope of the loss, and push-forward of a direction, each jitted once a kind."""
    logp_of, optimizer = _logp_of(train, _model(config.model).policy), _rmsprop(config, 0.0)
    score, margin = _score(logp_of), _margin_loss(config, loss)
    slope = jax.jit(jax.grad(lambda params, batch: margin(score(params, batch), batch).sum()))
    push = jax.jit(
        lambda params, batch, tangent: gradients.directional(
            lambda p: logp_of(p, batch)[0], params, tangent
        )[1]
    )
    return step.make_step(score, margin, optimizer), slope, push


def _prompt(config: Config, cell: Cell, params) -> tuple[Prompt, int]:
    """The question of this seed, and its row: one whose usual answer the training works against."""
    policy, tokenizer = _model(config.model).policy, _model(config.model).tokenizer
    records = _questions(config.data)
    usual = " No" if _sides(cell.pair)[0] == "affirm" else " Yes"
    rows = [i for i, s in enumerate(records) if s.answer == usual]
    if len(rows) == 500:  # the persona file: the paper's own prompts
        order = np.array(PAPER_PROMPTS)
    else:
        order = np.random.default_rng(config.seed).permutation(len(rows))
    if cell.prompt >= len(order):
        raise ValueError(f"prompts: got {config.prompts}, expected at most {len(order)}")
    row = rows[order[cell.prompt]]
    tokens, length = map(jnp.asarray, _padded([records[row].question], tokenizer, multiple=8))
    answers = jnp.array([_answers(cell.pair, tokenizer)], jnp.int32)
    empty = Prompt(tokens, length, jnp.zeros(()), answers, jnp.zeros(()))
    hidden = jax.jit(functools.partial(next_token_hidden, policy))(params, empty)
    return empty._replace(hidden=hidden), row


def train_cell(config: Config, cell: Cell, folder: Path | None = None) -> dict[str, np.ndarray]:
    """One run from its supervised start: what theory says, then what happens.

    Returns:
        Arrays by name. Axis ``steps`` is ``updates + 1``: before each update, and after the last.
    """
    policy, tokenizer = _model(config.model).policy, _model(config.model).tokenizer
    params = supervised(config, cell.sft_steps, folder)
    prompt, row = _prompt(config, cell, params)
    chosen, rejected = _answers(cell.pair, tokenizer)
    update, slope, push = _compiled(config, cell.train, cell.loss)
    rate = cell.learning_rate * (0.1 if cell.loss == "ipo" else 1.0)
    optimizer = _rmsprop(config, rate)

    # The reference is the start itself, through the same code path: the first log-ratios are zero.
    theta = _trained(cell.train, policy, params, prompt.hidden)
    start = jax.jit(_logp_of(cell.train, policy))(theta, prompt)
    prompt = prompt._replace(reference=jnp.take_along_axis(start, prompt.answers, axis=1))
    unembedding = policy.unembedding(params)
    words = {"chosen": chosen, "rejected": rejected}
    gradient = slope(theta, prompt)
    first_update, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    predicted = {
        "direction": embeddings.unembedding_direction(unembedding, **words),
        "flow": push(theta, prompt, jax.tree.map(jnp.negative, gradient)),
        "update": push(theta, prompt, first_update),
    }
    terms = embeddings.chosen_terms(unembedding, prompt.hidden[0], **words)
    geometry = embeddings.direction_geometry(unembedding, **words)

    state = step.init_state(theta, optimizer, key=jax.random.key(0))
    losses_, every = [], []
    for _ in range(config.updates + 1):  # the last update is thrown away
        state, metrics, scores = update(state, prompt)
        losses_.append(metrics["loss"])
        every.append(np.asarray(scores.every[0]))
    return {
        "row": np.array(row),
        "loss": np.array(losses_),
        "rate_terms": np.array(terms),
        "geometry": np.array(geometry),
        **_what_happened(np.stack(every), cell, jax.device_get(predicted), tokenizer),
    }


def _what_happened(
    logp: np.ndarray, cell: Cell, predicted: Mapping[str, np.ndarray], tokenizer
) -> dict[str, np.ndarray]:
    """The essentials of the distributions ``logp [steps vocab]`` of one run."""
    p, pair = np.exp(logp), list(_answers(cell.pair, tokenizer))
    meanings, (same, opposite) = meaning_ids(tokenizer), _sides(cell.pair)
    last = len(p) - 1
    looks, gains = ([k for k in steps if k <= last] for steps in (LOOKS, GAINS))
    members = {
        side: [t for t in meanings.get(meaning or "", []) if t not in pair]
        for side, meaning in (("same", same), ("opposite", opposite))
    }
    share = [
        diagnostics.share_of_gain(p[0], p[k], np.isin(np.arange(p.shape[1]), members[side]))
        for side in ("same", "opposite")
        for k in gains
    ]
    others = np.setdiff1d(np.arange(p.shape[1]), pair)
    likely = others[np.argsort(-p[0, others], kind="stable")[:LIKELY]]
    agreement = [
        diagnostics.spearman(predicted[name][ids], (logp[k] - logp[0])[ids])
        for name in PREDICTIONS
        for k in looks
        for ids in (others, likely)
    ]
    top = np.array([np.argsort(p[0] - p[k], kind="stable")[:3] for k in gains]).reshape(-1, 3)
    return {
        "logp": logp[:, pair],
        "entropy": -(p * logp).sum(axis=1),
        "top": p.argmax(axis=1),
        "watched": p[:, [t for ids in meanings.values() for t in ids]],
        "mass": np.stack([p[:, ids].sum(axis=1) for ids in members.values()], axis=1),
        "share": np.array(share).reshape(2, len(gains)),
        "gained_token": top,
        "gained": np.take_along_axis(p[gains] - p[0], top, axis=1),
        "spearman": np.array(agreement).reshape(len(PREDICTIONS), len(looks), 2),
        "shown_token": likely,
        "shown_predicted": np.stack([predicted[name][likely] for name in PREDICTIONS]),
        "shown_change": (logp[looks] - logp[0])[:, likely],
    }


# All runs ---------------------------------------------------------------------------------------


def _kept_cell(config: Config, cell: Cell, folder: Path | None) -> dict[str, np.ndarray]:
    """The record of a run: read if `folder` has it, else made and kept there."""
    file = folder / "cells" / cell.file if folder else None
    if file and file.exists():
        with np.load(file) as arrays:
            return dict(arrays)
    record = train_cell(config, cell, folder)
    if file:
        file.parent.mkdir(exist_ok=True)
        runs.save_arrays(file, record)
    return record


def _pin(free: multiprocessing.Queue) -> None:
    """Give this process a share of the cores before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free.get())


def run(config: Config, folder: Path | None = None, *, workers: int = 1) -> dict[str, np.ndarray]:
    """Measures every cell.

    Args:
        config: What to run.
        folder: Where finished cells are kept and read back; nothing is written without it.

    Returns:
        Arrays by name with a leading axis ``cells`` in the order of `cells(config)`.
    """
    todo = cells(config)
    bar = tqdm(total=len(todo), desc="runs", unit="run")
    if workers == 1:
        records = []
        for cell in todo:
            supervised(config, cell.sft_steps, folder)
            bar.set_description(f"{cell.pair} {cell.train} {cell.prompt + 1}/{config.prompts}")
            records.append(_kept_cell(config, cell, folder))
            bar.update()
    else:
        records = _in_parallel(config, todo, folder, workers, bar)
    bar.close()
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _in_parallel(config: Config, todo, folder, workers: int, bar) -> list[dict[str, np.ndarray]]:
    for steps in sorted(set(config.sft_steps)):  # with all cores, before they are shared out
        supervised(config, steps, folder)
    context = multiprocessing.get_context("spawn")
    cores, free = sorted(os.sched_getaffinity(0)), context.Queue()
    for i in range(workers):
        free.put(set(cores[i::workers]) or set(cores))
    with concurrent.futures.ProcessPoolExecutor(workers, context, _pin, (free,)) as pool:
        futures = [pool.submit(_kept_cell, config, cell, folder) for cell in todo]
        for future in concurrent.futures.as_completed(futures):
            future.result()
            bar.update()
    return [future.result() for future in futures]


# What is shown ----------------------------------------------------------------------------------


def summarise(config: Config, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each combination of settings, over its prompts: the numbers of the table."""
    tokenizer = _model(config.model).tokenizer
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
    """The summary as text: probabilities are means over prompts, spread in brackets."""
    gains = [k for k in GAINS if k <= config.updates]
    looks = [k for k in LOOKS if k <= config.updates]
    lines = []
    for r in rows:
        n, at = r["prompts"], f"lr {r['learning_rate']:g}, {r['sft_steps']} supervised updates"
        lines += [
            f"{r['pair']}, {r['loss']}, {at}, trained: {r['train']}, {n} prompts",
            "  p(chosen)  start {:.3f} ({:.3f})  peak {:.3f}  later trough {:.3f}  end {:.3f} ({:.3f})".format(
                *r["start"], r["peak"][0], r["trough"][0], *r["end"]
            ),
            f"  displaced (ends below its start) in {r['ended_below_start']} of {n}; below it at some"
            f" step in {r['ever_below_start']}; largest drop {r['drop'][0]:.3f};"
            f" loss rose in {n - r['runs_without_rise']} of {n} runs",
        ]
        for i, k in enumerate(gains):
            tokens = ", ".join(f"{t!r} {g:+.3f} ({m}/{n})" for t, g, m in r["gains"][i])
            lines.append(
                f"  after {k:3d} updates: {r['share_opposite'][i]:4.0%} of the gained probability to"
                f" the opposite meaning, {r['share_same'][i]:4.0%} to other words of the same;"
                f" most: {tokens or 'none by 0.01'}"
            )
        if r["train"] == "all":
            along, across = r["geometry"]
            lines.append(
                f"  W_chosen - W_rejected: {along:.2f} along W_chosen, {across:.2f} across"
            )
            for name, by_look in zip(PREDICTIONS, r["spearman"], strict=True):
                text = ", ".join(
                    f"{k}: {every:.2f} / {likely:.2f}"
                    for k, (every, likely) in zip(looks, by_look, strict=True)
                )
                lines.append(f"  Spearman of {PREDICTIONS[name]} with the change after {text}")
    return "\n".join(lines)


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


COLOURS = {"chosen": "#1b6ca8", "rejected": "#777777", "same": "#67b7dc", "opposite": "#c8402f"}
OTHER = "#b9b9b9"


def draw(config: Config, arrays: Mapping[str, np.ndarray]) -> Figure:
    """One setting: trajectories, masses and predictions. Several: the map of when it falls."""
    groups: dict[Cell, list[int]] = {}
    for i, cell in enumerate(cells(config)):
        if cell.train == "all":
            groups.setdefault(cell._replace(prompt=0), []).append(i)
    if len(groups) > 1:
        return _draw_map(config, arrays, groups)
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for (cell, at), panel in zip([*groups.items()] * 3, range(3), strict=True):
        (_draw_words, _draw_masses, _draw_theory)[panel](panels[panel], config, arrays, cell, at)
        panels[panel].spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{cell.loss}, learning rate {cell.learning_rate:g}, {cell.sft_steps} supervised updates,"
        f" {len(at)} prompts",
        fontsize=11,
    )
    return figure


def _kinds(config: Config, cell: Cell) -> dict[int, str]:
    """Token to its side of this pair: chosen, rejected, same or opposite meaning."""
    tokenizer = _model(config.model).tokenizer
    meanings, sides = (
        meaning_ids(tokenizer),
        zip(("same", "opposite"), _sides(cell.pair), strict=True),
    )
    kinds = {t: side for side, meaning in sides for t in meanings.get(meaning or "", [])}
    return kinds | dict(zip(_answers(cell.pair, tokenizer), ("chosen", "rejected"), strict=True))


def _band(axes, values: np.ndarray, **style) -> None:
    """Mean over runs, and the range from the lowest to the highest run."""
    steps, low, high = np.arange(values.shape[1]), values.min(axis=0), values.max(axis=0)
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, lw=0)
    axes.plot(steps, values.mean(axis=0), **style)


def _draw_words(axes, config: Config, arrays, cell: Cell, at: list[int]) -> None:
    tokenizer, kinds = _model(config.model).tokenizer, _kinds(config, cell)
    watched = [t for ids in meaning_ids(tokenizer).values() for t in ids]
    p = arrays["watched"][at]  # [prompts steps watched]
    reach = p.mean(axis=0).max(axis=0)
    for j in [j for j in np.argsort(-reach) if reach[j] > 0.01][:7]:
        kind = kinds.get(watched[j], "")
        width = 2.4 if kind in ("chosen", "rejected") else 1.4
        text = tokenizer.decode([watched[j]])
        _band(axes, p[:, :, j], color=COLOURS.get(kind, OTHER), lw=width, label=f"{text!r} {kind}")
    axes.legend(frameon=False, fontsize=8)
    axes.set(title=f"{cell.pair}: probability of the answers (mean, range)", xlabel="update")


def _draw_masses(axes, config: Config, arrays, cell: Cell, at: list[int]) -> None:
    p = np.exp(arrays["logp"][at]).mean(axis=0)  # [steps 2]
    mass = arrays["mass"][at].mean(axis=0)
    parts = {"chosen": p[:, 0], "same": mass[:, 0], "opposite": mass[:, 1], "rejected": p[:, 1]}
    names = [
        "the chosen word",
        "other words of its meaning",
        "opposite meaning",
        "the rejected word",
    ]
    axes.stackplot(
        np.arange(len(p)), list(parts.values()), labels=names, colors=[COLOURS[k] for k in parts]
    )
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.set(title="Where the probability is (mean)", xlabel="update", ylim=(0, 1))
    axes.set_xlim(0, len(p) - 1)


def _draw_theory(axes, config: Config, arrays, cell: Cell, at: list[int]) -> None:
    tokenizer, kinds = _model(config.model).tokenizer, _kinds(config, cell)
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
    axes.set(
        title=f"The first update: theory against outcome (Spearman {rho:.2f})",
        xlabel="predicted change of log-probability (nats)",
        ylabel="observed (nats), one point a token",
    )


def _draw_map(config: Config, arrays, groups: Mapping[Cell, list[int]]) -> Figure:
    lines = list(dict.fromkeys(cell._replace(learning_rate=0.0) for cell in groups))
    rates = config.learning_rates
    size = (2.6 * len(rates) + 1.4, 1.7 * len(lines) + 0.9)
    figure, grid = plt.subplots(
        len(lines), len(rates), figsize=size, sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for cell, at in groups.items():
        row, column = lines.index(cell._replace(learning_rate=0.0)), rates.index(cell.learning_rate)
        axes, logp = grid[row, column], arrays["logp"][at, :, 0]
        change = logp[:, -1] - logp[:, 0]
        axes.set_facecolor(plt.get_cmap("RdBu")(0.5 + np.clip(change.mean() / 8, -0.35, 0.35)))
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
    return figure


# From the command line --------------------------------------------------------------------------


def _validate(config: Config) -> None:
    """Every error that the settings can have, before any time is spent."""
    tokenizer = _model(config.model).tokenizer
    for name in ("prompts", "updates", "sft_batch"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for name in ("beta", "tau", *("learning_rates", "sft_learning_rate")):
        for value in np.atleast_1d(getattr(config, name)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected a positive number")
    if min(config.sft_steps) < 0:
        raise ValueError(f"sft_steps: got {min(config.sft_steps)}, expected 0 or more")
    for pair in config.pairs:
        chosen, rejected = _answers(pair, tokenizer)
        if chosen == rejected:
            raise ValueError(f"pairs: {pair!r} prefers a word to itself")


def _metrics(config: Config, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A line for each update of each cell, numbered through."""
    steps = itertools.count()
    for i, cell in enumerate(cells(config)):
        for update, (loss, logp) in enumerate(
            zip(arrays["loss"][i], arrays["logp"][i], strict=True)
        ):
            yield {
                "step": next(steps),
                **cell._asdict(),
                "update": update,
                "loss": float(loss),
                "logp_chosen": float(logp[0]),
                "logp_rejected": float(logp[1]),
                "entropy": float(arrays["entropy"][i][update]),
                "top": int(arrays["top"][i][update]),
            }


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the run goes, and how."""

    config: tyro.conf.OmitArgPrefixes[Config] = Config()
    name: str = "mine"
    """Folder under runs/no_vs_never."""
    resume: bool = False
    """Continue a run that was stopped, from its finished cells; its settings must be the same."""
    workers: int = 1
    """Processes that share the cells, each with its own cores. Two are faster than one on CPU."""
    wandb: Literal["off", "offline", "online"] = "off"


def main() -> None:
    """Runs, saves, prints the table and the verdict, and draws the figure."""
    options = tyro.cli(Options, description=__doc__)
    config = options.config
    try:
        _validate(config)
        run_folder = runs.create(
            "no_vs_never",
            options.name,
            dataclasses.asdict(config),
            resume=options.resume,
            provenance={
                "model": pretrained.hash_params(_model(config.model).params),
                "data": _digest(_questions(config.data)),
            },
            wandb=options.wandb,
        )
        arrays = run(config, run_folder.path, workers=options.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"no_vs_never: {error}")
    rows = summarise(config, arrays)
    run_folder.save(arrays=arrays, summary={"rows": rows}, metrics=_metrics(config, arrays))
    figure = draw(config, arrays)
    print(table(rows, config), verdict(rows), sep="\n\n")
    print(f"\nfigure: {run_folder.save_figure(figure)}")


if __name__ == "__main__":
    main()
