"""Where all parts of a run begin: model, pairs, compiled functions, the reference."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common
from experiments.mitigations.methods import MASKS, pull_methods
from experiments.mitigations.protocol import Config
from jaxpref import gradients, logprobs
from jaxpref.data import batches, files, sentiment
from jaxpref.training import mitigations


def load(config: Config) -> tuple[common.Subject, common.Problem]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    common.at_least(1, config, "pairs", "batch", "updates", "every", "seeds", "limit")
    common.at_least(0, config, "supervised", "sft_weight", "price")
    common.above(0, config, "length", "adam_rate", "beta", "mask_rate", "supervised_rate")
    known = (*pull_methods(config), *MASKS)
    for method in config.methods:
        if method not in known:
            raise ValueError(f"methods: got {method!r}, expected some of {', '.join(known)}")
    if not config.methods or not config.optimizers:
        raise ValueError("methods, optimizers: got none of one, expected one or more")
    found = _texts(config)
    if 2 * config.pairs > len(found.rows):
        raise ValueError(
            f"pairs: got {config.pairs} and as many held out, expected {len(found.rows)} in all"
        )
    batches.steps_per_epoch(config.pairs, config.batch)
    if config.pairs % config.batch:
        raise ValueError(f"batch: got {config.batch}, expected a divisor of {config.pairs} pairs")
    subject = common.open_model(config.model)
    return subject, common.problem_of(config, subject, found, least=2 * config.pairs)


def _texts(config: Config) -> files.Found:
    kinds: dict[str, sentiment.Kind] = {"single": "single", "short": "short", "long": "long"}
    if config.data in kinds:
        made = sentiment.pairs(kinds[config.data], 2 * config.pairs * config.seeds, seed=0)
        return files.Found(made, [])
    shipped = config.data == "preferences"
    return common.read(dataclasses.replace(config, data="") if shipped else config)


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    return common.hashes(*load(config))


class Programs(NamedTuple):
    """The compiled functions that all parts of a run share."""

    tokens: Any  # (params, batch) -> (token log-probabilities, is_target, targets)
    grams: Any  # (params, arrays) -> [pairs 2 2]
    back: Any  # (params, batch, pull of each token) -> gradient of the mean loss
    divergence: Any  # (params, reference params, batch) -> mean nats a token


def programs(problem: common.Problem, policy) -> Programs:
    """Compiled once a run; what differs between methods is between them, and small."""

    def tokens(params, batch):
        found = problem.hidden(params, batch)
        head = policy.unembedding(params)
        return logprobs.token_logprobs_chunked(found.hidden, head, found.targets), found

    @jax.jit
    def seen(params, batch):
        logp, found = tokens(params, batch)
        return logp, found.is_target, found.targets

    @jax.jit
    def back(params, batch, pull):
        _, pullback = jax.vjp(lambda p: tokens(p, batch)[0], params)
        return pullback(pull / len(pull))[0]

    @jax.jit
    def divergence(params, reference, batch):
        ours, theirs = problem.hidden(params, batch), problem.hidden(reference, batch)
        heads = policy.unembedding(params), policy.unembedding(reference)
        each = logprobs.token_kl(ours.hidden, heads[0], theirs.hidden, heads[1])
        kept = jnp.where(ours.is_target, each, jnp.zeros_like(each))
        return kept.sum() / ours.is_target.sum()

    @jax.jit
    def grams(params, arrays):
        return gradients.pair_grams(problem.logp, params, arrays, responses="together").gram

    return Programs(seen, grams, back, divergence)


class Start(NamedTuple):
    """Where all runs of an experiment begin."""

    problem: common.Problem
    params: Any
    token_reference: np.ndarray  # [rows 2 response]
    is_target: np.ndarray
    contrast: np.ndarray


def begin(config: Config, subject, problem, run: Programs) -> Start:
    """The supervised phase, and the reference log-probability of every token."""
    params = common.supervise(
        problem, subject.params, optax.adam(config.supervised_rate),
        steps=config.supervised, batch=config.batch, seed=0,
    )  # fmt: skip
    reference = mask = words = None
    for seed in range(config.seeds):
        rows = rows_of(config, problem, seed)
        # In the batches of the looks: through one program, the first differences are exactly zero.
        for index in rows.reshape(-1, config.batch):
            found = [np.asarray(x) for x in run.tokens(params, problem.rows(index))]
            if reference is None:
                shapes = [np.zeros((len(problem), *x.shape[1:]), x.dtype) for x in found]
                reference, mask, words = shapes
            reference[index], mask[index], words[index] = found  # pyright: ignore[reportOptionalSubscript]
    contrast = mitigations.contrast_mask(words, mask)  # pyright: ignore[reportArgumentType]
    return Start(problem, params, reference, mask, contrast)  # pyright: ignore[reportArgumentType]


def rows_of(config: Config, problem, seed: int) -> np.ndarray:
    """Rows of a seed: first those trained on, then those held out."""
    return batches.order(len(problem), 2 * config.pairs, seed, 0)
