"""The methods: a loss of token log-probabilities each, and what becomes of its pull."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from experiments.mitigations.protocol import Config
from jaxpref import losses
from jaxpref.training import mitigations


class Seen(NamedTuple):
    """What a method knows of a batch, ``[pairs 2 ...]``."""

    token_logp: Array
    token_reference: Array
    is_target: Array
    contrast: Array  # of `mitigations.contrast_mask`
    gram: Array


def pull_methods(config: Config) -> dict[str, tuple[Callable, Callable]]:
    """The loss, and what becomes of its pull: ``(gram, pull) -> pull``."""
    beta = config.beta

    def dpo(logp, reference):
        return losses.dpo(logp, reference, beta=beta)

    def kept(gram, pull):
        return pull

    return {
        "dpo": (dpo, kept),
        "dpo + sft": (
            lambda x, ref: dpo(x, ref) + config.sft_weight * losses.sft(x[..., 0]),
            kept,
        ),
        "dpo_shift": (lambda x, ref: losses.dpo_shift(x, ref, beta=beta, shift=config.shift), kept),
        "dpop": (lambda x, ref: losses.dpop(x, ref, beta=beta), kept),
        "normalised": (dpo, lambda gram, pull: mitigations.normalised_pull(gram, -pull[..., 0])),
        "calibrated": (
            dpo,
            lambda gram, pull: mitigations.calibrated_pull(
                pull, mitigations.calibration(gram, pull)
            ),
        ),
        "projected": (dpo, mitigations.projected_pull),
        "pcgrad": (dpo, mitigations.pcgrad_pull),
    }


READ_GRAM = ("normalised", "calibrated", "projected", "pcgrad")
MASKS = ("contrast mask", "learned mask")


def loss_of(config: Config, method: str, seen: Seen, logits: Array) -> Array:
    """The loss of each pair as a function of token log-probabilities and mask logits."""
    if method in MASKS:
        learned = method == "learned mask"
        mask = mitigations.learned_mask(logits, seen.is_target) if learned else seen.contrast
        price = config.price if learned else 0.0
        mask = mask.astype(seen.token_logp.dtype)
        return mitigations.sparse_dpo(
            seen.token_logp, seen.token_reference, mask, beta=config.beta, lam=price
        )
    loss, change = pull_methods(config)[method]
    logp, reference = (
        jnp.where(seen.is_target, x, jnp.zeros_like(x)).sum(axis=-1)
        for x in (seen.token_logp, seen.token_reference)
    )
    return mitigations.with_pull(
        lambda x: loss(x, reference), logp, functools.partial(change, seen.gram)
    )
