"""One run, and all of them: what theory says beforehand, then what happens."""

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.no_vs_never.protocol import (
    GAINS,
    LIKELY,
    LOOKS,
    PAPER_PROMPTS,
    PREDICTIONS,
    SFT_LABELS,
    Cell,
    Config,
    answer_ids,
    cells,
    load_model,
    load_questions,
    meaning_ids,
    meanings_of,
    tokenizer_of,
)
from jaxpref import diagnostics, embeddings, gradients, losses, runs
from jaxpref.data import batches
from jaxpref.training import optimizers, step


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


def _padded(questions: Sequence[str], tokenizer, *, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[questions time]`` on multiples of a length, so that few shapes are compiled."""
    ids = [tokenizer.encode(question + "\n") for question in questions]
    lengths = np.array([len(i) for i in ids])
    tokens = np.zeros((len(ids), -(-lengths.max() // multiple) * multiple), np.int32)
    for row, i in zip(tokens, ids, strict=True):
        row[: len(i)] = i
    return tokens, lengths


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


def _margin_loss(name: str, beta: float, tau: float) -> Callable:
    """The named loss of ``(scores, batch)``, its hyperparameters bound."""
    return {
        "dpo": lambda s, b: losses.dpo(s.logp, b.reference, beta=beta),
        "ipo": lambda s, b: losses.ipo(s.logp, b.reference, tau=tau),
        "hinge": lambda s, b: losses.hinge(s.logp, b.reference, beta=beta),
        "sppo": lambda s, b: losses.sppo(s.logp, b.reference, beta=beta),
        "slic_hf": lambda s, b: losses.slic_hf(s.logp, delta=1.0, lam=0.1),
    }[name]


def _score(logp_of: Callable) -> Callable:
    def score(params, batch):
        every = logp_of(params, batch)
        return NextToken(jnp.take_along_axis(every, batch.answers, axis=1), every)

    return score


def _rmsprop(decay: float, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    # The learning rate lies in the optimizer's state: one compiled step serves all of them.
    return optax.inject_hyperparams(optimizers.torch_rmsprop)(
        learning_rate=learning_rate, decay=decay
    )


def _labels(config: Config, tokenizer) -> np.ndarray:
    """One answer token a statement, against the behaviour it describes, drawn uniformly."""
    known = {
        side: [ids[0] for word in words if len(ids := tokenizer.encode(word)) == 1]
        for side, words in SFT_LABELS.items()
    }
    rng = np.random.default_rng(config.seed)
    sides = [s.answer.strip() for s in load_questions(config)]
    return np.array([rng.choice(known[side]) for side in sides], np.int32)


# The settings that decide the supervised phase: configurations that share them share its end.
_SUPERVISED = ("model", "data", "bad", "seed", "sft_learning_rate", "sft_batch", "decay")


def supervised(config: Config, steps: int, folder: Path | None = None) -> Any:
    """Parameters after `steps` updates on the statements' labels; kept in `folder` if given."""
    read = {name: getattr(config, name) for name in _SUPERVISED}
    return _supervised(Config(**read), steps, folder)


@functools.lru_cache(maxsize=3)
def _supervised(config: Config, steps: int, folder: Path | None) -> Any:
    policy, params, *_ = load_model(config.model)
    tokenizer = tokenizer_of(config)
    kept = folder / f"sft-{steps}.npz" if folder else None
    if steps == 0:
        return params
    leaves, structure = jax.tree.flatten(params)
    if kept and kept.exists():
        with np.load(kept) as file:
            return structure.unflatten(jnp.asarray(file[str(i)]) for i in range(len(leaves)))
    questions, labels = load_questions(config), _labels(config, tokenizer)
    optimizer = _rmsprop(config.decay, config.sft_learning_rate)
    update = step.make_step(
        _score(functools.partial(next_token_logp, policy)),
        lambda scores, _: -scores.logp[:, 0],
        optimizer,
    )
    state = step.init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(0))
    bar = tqdm(range(steps), "supervised phase", unit="update")
    for i in bar:
        rows = batches.order(len(questions), config.sft_batch, seed=config.seed, step=i)
        asked = _padded([questions[r].question for r in rows], tokenizer, multiple=16)
        state, metrics, _ = update(state, Labelled(*map(jnp.asarray, (*asked, labels[rows, None]))))
        bar.set_postfix(loss=f"{metrics['loss']:.2f}")
    if kept:
        runs.save_arrays(kept, {str(i): x for i, x in enumerate(jax.tree.leaves(state.params))})
    return state.params


@functools.cache
def _compiled(model: str | None, train: str, loss: str, beta: float, tau: float, decay: float):
    """Update, log-probabilities, predictions; jitted once for all runs that share the settings."""
    logp_of, optimizer = _logp_of(train, load_model(model).policy), _rmsprop(decay, 0.0)
    score, margin = _score(logp_of), _margin_loss(loss, beta, tau)
    foreseen = functools.partial(_predictions, logp_of, score, margin, decay)
    return step.make_step(score, margin, optimizer), jax.jit(logp_of), jax.jit(foreseen)


@functools.cache
def _reader(path: str | None):
    return jax.jit(functools.partial(next_token_hidden, load_model(path).policy))


def prompt_rows(config: Config, pair: str) -> list[int]:
    """The seeds' statements: those whose usual answer the training works against, in order."""
    records = load_questions(config)
    usual = " No" if meanings_of(pair)[0] == "affirm" else " Yes"
    rows = [i for i, s in enumerate(records) if s.answer == usual]
    if len(rows) == 500:  # the persona file: the paper's own prompts
        order = np.array(PAPER_PROMPTS)
    else:
        order = np.random.default_rng(config.seed).permutation(len(rows))
    if config.prompts > len(order):
        raise ValueError(f"prompts: got {config.prompts}, expected at most {len(order)}")
    return [rows[i] for i in order[: config.prompts]]


def _prompt(config: Config, cell: Cell, params) -> tuple[Prompt, int]:
    """The question of this seed, and its row."""
    tokenizer, records = tokenizer_of(config), load_questions(config)
    row = prompt_rows(config, cell.pair)[cell.prompt]
    tokens, length = map(jnp.asarray, _padded([records[row].question], tokenizer, multiple=8))
    answers = jnp.array([answer_ids(cell.pair, tokenizer)], jnp.int32)
    empty = Prompt(tokens, length, jnp.zeros(()), answers, jnp.zeros(()))
    return empty._replace(hidden=_reader(config.model)(params, empty)), row


def train_cell(config: Config, cell: Cell, folder: Path | None = None) -> dict[str, np.ndarray]:
    """One run from its supervised start: what theory says, then what happens.

    Returns:
        Arrays by name. Axis ``steps`` is ``updates + 1``: before each update, and after the last.
    """
    policy, tokenizer = load_model(config.model).policy, tokenizer_of(config)
    params = supervised(config, cell.sft_steps, folder)
    prompt, row = _prompt(config, cell, params)
    chosen, rejected = answer_ids(cell.pair, tokenizer)
    fixed = config.beta, config.tau, config.decay
    update, logp, foreseen = _compiled(config.model, cell.train, cell.loss, *fixed)
    rate = cell.learning_rate * (0.1 if cell.loss == "ipo" else 1.0)
    optimizer = _rmsprop(config.decay, rate)

    # The reference is the start itself, through the same code path: the first log-ratios are zero.
    theta = _trained(cell.train, policy, params, prompt.hidden)
    start = jnp.take_along_axis(logp(theta, prompt), prompt.answers, axis=1)
    prompt = prompt._replace(reference=start)
    unembedding = policy.unembedding(params)
    predicted = foreseen(theta, prompt, jnp.float32(rate))
    closed = _closed_forms(unembedding, prompt.hidden[0], chosen, rejected)
    predicted["direction"], terms, geometry = closed

    state = step.init_state(theta, optimizer, key=jax.random.key(0))
    losses_, every = [], []
    alone = multiprocessing.parent_process() is None
    for _ in tqdm(range(config.updates + 1), "updates", leave=False, disable=not alone):
        # The last of them is thrown away: only its scores, taken before it, are wanted.
        state, metrics, scores = update(state, prompt)
        losses_.append(float(metrics["loss"]))
        if not np.isfinite(losses_[-1]):
            raise ValueError(f"{cell}: the loss is {losses_[-1]} at update {len(losses_) - 1}")
        every.append(np.asarray(scores.every[0]))
    return {
        "row": np.array(row),
        "loss": np.array(losses_),
        "rate_terms": np.array(terms),
        "geometry": np.array(geometry),
        **_what_happened(np.stack(every), cell, jax.device_get(predicted), tokenizer),
    }


def _predictions(
    logp_of: Callable, score: Callable, margin: Callable, decay: float,
    theta: Any, prompt: Prompt, rate: jax.Array,
) -> dict[str, jax.Array]:  # fmt: skip
    """First-order change of every token's log-probability."""

    def push(tangent: Any) -> jax.Array:
        return gradients.directional(lambda p: logp_of(p, prompt)[0], theta, tangent)[1]

    gradient = jax.grad(lambda p: margin(score(p, prompt), prompt).sum())(theta)
    optimizer = _rmsprop(decay, rate)
    first_update, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    return {"flow": push(jax.tree.map(jnp.negative, gradient)), "update": push(first_update)}


@jax.jit
def _closed_forms(unembedding: jax.Array, hidden: jax.Array, chosen: int, rejected: int):
    """From the unembedding and the state alone: the direction, the rate's terms, its geometry."""
    words = {"chosen": chosen, "rejected": rejected}
    return (
        embeddings.unembedding_direction(unembedding, **words),
        embeddings.chosen_terms(unembedding, hidden, **words),
        embeddings.direction_geometry(unembedding, **words),
    )


_spearman = jax.jit(diagnostics.spearman)
_share_of_gain = jax.jit(diagnostics.share_of_gain)


def _what_happened(
    logp: np.ndarray, cell: Cell, predicted: Mapping[str, np.ndarray], tokenizer
) -> dict[str, np.ndarray]:
    """The essentials of the distributions ``logp [steps vocab]`` of one run."""
    p, pair = np.exp(logp), list(answer_ids(cell.pair, tokenizer))
    meanings, (same, opposite) = meaning_ids(tokenizer), meanings_of(cell.pair)
    last = len(p) - 1
    looks, gains = ([k for k in steps if k <= last] for steps in (LOOKS, GAINS))
    members = {
        side: [t for t in meanings.get(meaning or "", []) if t not in pair]
        for side, meaning in (("same", same), ("opposite", opposite))
    }
    share = [
        _share_of_gain(p[0], p[k], np.isin(np.arange(p.shape[1]), members[side]))
        for side in ("same", "opposite")
        for k in gains
    ]
    others = np.setdiff1d(np.arange(p.shape[1]), pair)
    likely = others[np.argsort(-p[0, others], kind="stable")[:LIKELY]]
    agreement = [
        _spearman(predicted[name][ids], (logp[k] - logp[0])[ids])
        for name in PREDICTIONS
        for k in looks
        for ids in (others, likely)
    ]
    top = [np.argsort(p[0] - p[k], kind="stable")[:3] for k in gains]
    top = np.array(top, np.int64).reshape(-1, 3)  # in a run of under five updates: none
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


def kept_cell(config: Config, cell: Cell, folder: Path | None) -> dict[str, np.ndarray]:
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
        workers: Processes that share the cells, each with cores of its own.

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
            records.append(kept_cell(config, cell, folder))
            bar.update()
    else:
        records = _in_parallel(config, todo, folder, workers, bar)
    bar.close()
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


def _in_parallel(config: Config, todo, folder, workers: int, bar) -> list[dict[str, np.ndarray]]:
    for steps in sorted(set(config.sft_steps)):  # with all cores, before they are shared out
        supervised(config, steps, folder)
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    free = context.Queue()
    for i in range(workers):
        free.put(set(cores[i::workers]) or set(cores))
    with concurrent.futures.ProcessPoolExecutor(workers, context, _pin, (free,)) as pool:
        futures = [pool.submit(kept_cell, config, cell, folder) for cell in todo]
        for future in concurrent.futures.as_completed(futures):
            future.result()
            bar.update()
    return [future.result() for future in futures]
