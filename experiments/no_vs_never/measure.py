"""One run, and all of them: what theory says beforehand, then what happens."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.no_vs_never import control, protocol
from experiments.no_vs_never.protocol import LIKELY, LOOKS, PREDICTIONS, SFT_LABELS, Cell, Config
from experiments.protocol import inputs, running
from jaxpref import diagnostics, embeddings, gradients, losses
from jaxpref.data import batches
from jaxpref.models.decoder import Policy
from jaxpref.training import optimizers, step


class Prompt(NamedTuple):
    """Questions with answers of one token: a pair of them, or one in the supervised phase."""

    tokens: jax.Array  # [batch time], padded on the right
    length: jax.Array  # [batch]
    answers: jax.Array  # [batch answers], token ids, chosen first
    hidden: Any = None  # [1 width], what a control reads; it is not trained
    reference: Any = None  # [1 2], nats


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


def logp_of(train: str, policy) -> Callable[[Any, Prompt], jax.Array]:
    """``(what is trained, prompts) -> [batch vocab]``, log-probabilities of the next token."""

    def whole(params, batch):
        logits = next_token_hidden(policy, params, batch) @ policy.unembedding(params).T
        return jax.nn.log_softmax(logits)

    return whole if train == "all" else lambda rows, b: jax.nn.log_softmax(b.hidden @ rows.T)


def of_answers(logp: jax.Array, batch: Prompt) -> jax.Array:
    """Log-probabilities ``[batch answers]`` of the answers."""
    return jnp.take_along_axis(logp, batch.answers, axis=1)


def _trained(train: str, policy, params, prompt: Prompt) -> tuple[Any, Prompt]:
    """The parameters that are trained, a copy because a step donates them, and what they read.

    A free table of logits is an unembedding of width 1 that reads the number one.
    """
    if train == "all":
        return jax.tree.map(jnp.copy, params), prompt
    rows = jnp.copy(policy.unembedding(params))
    if train == "unembedding":
        return rows, prompt
    return rows @ prompt.hidden.T, prompt._replace(hidden=jnp.ones((1, 1), rows.dtype))


@functools.cache
def _loss(name: str, beta: float, tau: float) -> Callable:
    """The named loss of ``(logp, reference)``, its hyperparameters bound."""
    return {
        "dpo": functools.partial(losses.dpo, beta=beta),
        "ipo": functools.partial(losses.ipo, tau=tau),
        "hinge": functools.partial(losses.hinge, beta=beta),
    }[name]


def _rmsprop(decay: float, learning_rate: float | jax.Array) -> optax.GradientTransformation:
    # The learning rate lies in the optimizer's state: one compiled step serves all of them.
    of_rate = optax.inject_hyperparams(optimizers.torch_rmsprop)
    return of_rate(learning_rate=learning_rate, decay=decay)


def _labels(config: Config, tokenizer) -> np.ndarray:
    """One answer token a statement, against the behaviour it describes, drawn uniformly."""
    known = {
        side: [ids[0] for word in words if len(ids := tokenizer.encode(word)) == 1]
        for side, words in SFT_LABELS.items()
    }
    rng = np.random.default_rng(config.seed)
    sides = [s.answer.strip() for s in protocol.load_questions(config)]
    return np.array([rng.choice(known[side]) for side in sides], np.int32)


@functools.lru_cache(maxsize=3)
def supervised(config: Config, steps: int, folder: Path | None = None) -> Any:
    """Parameters after `steps` updates on the statements' labels; kept in `folder` if given."""
    params = inputs.subject(config, scan=False).params
    if steps == 0:
        return params

    def make() -> dict[str, Any]:
        return {str(i): x for i, x in enumerate(jax.tree.leaves(_supervise(config, steps)))}

    kept, (leaves, structure) = running.kept(folder, f"sft-{steps}", make), jax.tree.flatten(params)
    return structure.unflatten(jnp.asarray(kept[str(i)]) for i in range(len(leaves)))


def _supervise(config: Config, steps: int) -> Any:
    policy, params, tokenizer, *_ = inputs.subject(config, scan=False)
    questions, labels = protocol.load_questions(config), _labels(config, tokenizer)
    optimizer = _rmsprop(config.decay, config.sft_learning_rate)
    loss = lambda logp, batch: -of_answers(logp, batch)[:, 0]  # noqa: E731
    update = step.make_step(logp_of("all", policy), loss, optimizer)
    state = step.init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(0))
    bar = tqdm(range(steps), "supervised phase", unit="update")
    for i in bar:
        rows = batches.order(len(questions), config.sft_batch, seed=config.seed, step=i)
        asked = _padded([questions[r].question for r in rows], tokenizer, multiple=16)
        state, metrics, _ = update(state, Prompt(*map(jnp.asarray, (*asked, labels[rows, None]))))
        bar.set_postfix(loss=f"{metrics['loss']:.2f}")
    return state.params


@functools.cache
def _compiled(policy: Policy, train: str, loss: Callable, decay: float):
    """Update, log-probabilities, predictions; jitted once for all runs that share the settings."""
    logp, optimizer = logp_of(train, policy), _rmsprop(decay, 0.0)

    def margin_loss(every, batch):
        return loss(of_answers(every, batch), batch.reference)

    foreseen = functools.partial(_predictions, logp, margin_loss, decay)
    return step.make_step(logp, margin_loss, optimizer), jax.jit(logp), jax.jit(foreseen)


@functools.cache
def _reader(policy: Policy):
    return jax.jit(functools.partial(next_token_hidden, policy))


def train_cell(
    config: Config, cell: Cell, folder: Path | None = None, margin: float = 0.0
) -> dict[str, np.ndarray]:
    """One run from its supervised start: what theory says, then what happens; arrays by name.

    Axis ``steps`` is ``updates + 1``: before each update, and after the last. From a loss that is
    not finite on they are NaN. A control has to gain this `margin`, nats.
    """
    policy, _, tokenizer, *_ = inputs.subject(config, scan=False)
    params = supervised(config, cell.sft_steps, folder)
    row = protocol.prompt_rows(config, cell.pair)[cell.prompt]
    asked = _padded([protocol.load_questions(config)[row].question], tokenizer, multiple=8)
    words = protocol.answer_ids(cell.pair, tokenizer)
    tokens, length = map(jnp.asarray, asked)
    prompt = Prompt(tokens, length, jnp.array([words], jnp.int32))
    prompt = prompt._replace(hidden=_reader(policy)(params, prompt))
    unembedding, hidden = policy.unembedding(params), prompt.hidden[0]
    direction, terms, geometry = _closed_forms(unembedding, hidden, *words)
    loss = _loss(cell.loss, config.beta, config.tau)
    update, logp, foreseen = _compiled(policy, cell.train, loss, config.decay)

    # The reference is the start itself, through the same code path: the first log-ratios are zero.
    theta, prompt = _trained(cell.train, policy, params, prompt)
    prompt = prompt._replace(reference=of_answers(logp(theta, prompt), prompt))
    rate = cell.learning_rate * (0.1 if cell.loss == "ipo" else 1.0)
    if cell.train != "all":
        rate = control.matched_rate(loss, config.updates, config.decay, prompt.hidden[0], margin)
    predicted = foreseen(theta, prompt, jnp.float32(rate)) | {"direction": direction}

    state = step.init_state(theta, _rmsprop(config.decay, rate), key=jax.random.key(0))
    losses_, every = [], []
    alone = multiprocessing.parent_process() is None
    for _ in tqdm(range(config.updates + 1), "updates", leave=False, disable=not alone):
        # The last of them is thrown away: only its scores, taken before it, are wanted.
        state, metrics, logps = update(state, prompt)
        losses_.append(float(metrics["loss"]))
        known = np.isfinite(losses_[-1])
        every.append(np.where(known, logps[0], np.float32(np.nan)))
    what = {"row": row, "rate": rate, "loss": losses_, "rate_terms": terms, "geometry": geometry}
    happened = _what_happened(config, np.stack(every), cell, jax.device_get(predicted), tokenizer)
    return {name: np.array(value) for name, value in what.items()} | happened


def _predictions(
    logp: Callable, loss: Callable, decay: float, theta: Any, prompt: Prompt, rate: jax.Array
) -> dict[str, jax.Array]:
    """First-order change of every token's log-probability."""

    def push(tangent: Any) -> jax.Array:
        return gradients.directional(lambda p: logp(p, prompt)[0], theta, tangent)[1]

    gradient = jax.grad(lambda p: loss(logp(p, prompt), prompt).sum())(theta)
    optimizer = _rmsprop(decay, rate)
    first_update, _ = optimizer.update(gradient, optimizer.init(theta), theta)
    return {"flow": push(jax.tree.map(jnp.negative, gradient)), "update": push(first_update)}


@jax.jit
def _closed_forms(unembedding: jax.Array, hidden: jax.Array, chosen: int, rejected: int):
    """From the unembedding and the state alone: the direction, the rate's terms, its geometry."""
    words = {"chosen": chosen, "rejected": rejected}
    terms = embeddings.chosen_terms(unembedding, hidden, **words)
    geometry = embeddings.direction_geometry(unembedding, **words)
    return embeddings.unembedding_direction(unembedding, **words), terms, geometry


_spearman = jax.jit(diagnostics.spearman)
_share_of_gain = jax.jit(diagnostics.share_of_gain)


def _what_happened(
    config: Config, logp: np.ndarray, cell: Cell, predicted: Mapping[str, np.ndarray], tokenizer
) -> dict[str, np.ndarray]:
    """The essentials of the distributions ``logp [steps vocab]`` of one run."""
    p, pair = np.exp(logp), list(protocol.answer_ids(cell.pair, tokenizer))
    meanings = protocol.meaning_ids(tokenizer)
    looks, gains = [k for k in LOOKS if k <= config.updates], protocol.gains_after(config)
    sides = zip(("same", "opposite"), protocol.meanings_of(cell.pair), strict=True)
    members = {side: [t for t in meanings.get(meaning or "", []) if t not in pair]
               for side, meaning in sides}  # fmt: skip
    share = [
        [_share_of_gain(p[0], p[k], np.isin(np.arange(p.shape[1]), ids)) for k in gains]
        for ids in members.values()
    ]
    others = np.setdiff1d(np.arange(p.shape[1]), pair)
    likely = others[np.argsort(-p[0, others], kind="stable")[:LIKELY]]
    agreement = [
        [[_spearman(predicted[name][t], (logp[k] - logp[0])[t]) for t in (others, likely)]
         for k in looks] for name in PREDICTIONS
    ]  # fmt: skip
    top = np.stack([np.argsort(p[0] - p[k], kind="stable")[:3] for k in gains])
    return {
        "logp": logp[:, pair],
        "entropy": -(p * logp).sum(axis=1),
        "top": p.argmax(axis=1),
        "watched": p[:, [t for ids in meanings.values() for t in ids]],
        "mass": np.stack([p[:, ids].sum(axis=1) for ids in members.values()], axis=1),
        "share": np.array(share),
        "gained_token": top,
        "gained": np.take_along_axis(p[gains] - p[0], top, axis=1),
        "spearman": np.array(agreement),
        "shown_token": likely,
        "shown_predicted": np.stack([predicted[name][likely] for name in PREDICTIONS]),
        "shown_change": (logp[looks] - logp[0])[:, likely],
    }


def _setting(config: Config, whole: Cell, folder: Path | None) -> list[dict[str, np.ndarray]]:
    """The records of the whole model and of its controls, read if `folder` has them."""

    def kept(cell: Cell, margin: float = 0.0) -> dict[str, np.ndarray]:
        make = functools.partial(train_cell, config, cell, folder, margin)
        return running.kept(folder, cell.part, make)

    first = kept(whole)
    margin = float(np.subtract(*(first["logp"][-1] - first["logp"][0])))
    return [first if t == "all" else kept(whole._replace(train=t), margin) for t in config.train]


def _pin(free: multiprocessing.Queue) -> None:
    """Give this process a share of the cores before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free.get())


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Callable]:
    """The `map` of so many processes."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    free = context.Queue()
    for i in range(workers):
        free.put(set(cores[i::workers]) or set(cores))
    with concurrent.futures.ProcessPoolExecutor(workers, context, _pin, (free,)) as pool:
        yield pool.map


def run(config: Config, folder: Path | None = None, *, workers: int = 1) -> dict[str, np.ndarray]:
    """Measures every cell: arrays by name, their first axis in the order of `protocol.cells`.

    With a `folder` finished cells are kept there and read back. `workers` are processes that share
    the settings, each with cores of its own.
    """
    for steps in sorted(set(config.sft_steps)):  # with all cores, before they are shared out
        supervised(config, steps, folder)
    todo = protocol.cells(dataclasses.replace(config, train=("all",)))
    with _pool(workers) as each:
        groups = each(functools.partial(_setting, config, folder=folder), todo)
        records = [record for group in tqdm(groups, "settings", len(todo)) for record in group]
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
