"""Losses agree with tunix 0.1.7 on random pairs, value and pulls; differences are asserted.

Its loss reads log-probabilities from the model; a stand-in gives it ours. It wants other versions
of packages than TRL, so it has an environment of its own: `make parity-tunix`.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tunix.sft.dpo import dpo_trainer

from jaxpref import logprobs, losses
from jaxpref.losses import __main__ as docs

PAIRS, EPSILON = 7, 0.1
DRAW = np.random.default_rng(0)
REFERENCE = jnp.asarray(-30 * DRAW.random((PAIRS, 2)) - 2)
LOGP = REFERENCE + jnp.asarray(np.minimum(3 * DRAW.normal(size=(PAIRS, 2)), 1.5))
LENGTHS = DRAW.integers(3, 20, (PAIRS, 2))


@pytest.fixture
def theirs(monkeypatch):
    """tunix's mean loss of the pairs, given their log-probabilities."""

    def mean(logp, algorithm, *, lengths=LENGTHS, **settings):
        monkeypatch.setattr(dpo_trainer, "compute_logps", lambda *_, **__: (logp[:, 0], logp[:, 1]))
        mask = jnp.asarray(np.arange(lengths.max()) < lengths.T.reshape(-1, 1))
        example = types.SimpleNamespace(
            input_ids=None, positions=None, attention_mask=None, logits_to_keep=0, images=None,
            ref_chosen_logps=REFERENCE[:, 0], ref_rejected_logps=REFERENCE[:, 1],
            completion_mask=mask.astype(logp.dtype),
        )  # fmt: skip
        return dpo_trainer.dpo_loss_fn(None, example, algorithm, **settings)[0]

    return mean


def agree(ours, theirs):
    found = jax.value_and_grad(lambda x: ours(x).mean())(LOGP)
    expected = jax.value_and_grad(theirs)(LOGP)
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)


def test_dpo(theirs):
    agree(lambda x: losses.dpo(x, REFERENCE, beta=0.3), lambda x: theirs(x, "dpo", beta=0.3))


def test_cdpo(theirs):
    agree(
        lambda x: losses.cdpo(x, REFERENCE, epsilon=EPSILON),
        lambda x: theirs(x, "dpo", label_smoothing=EPSILON),
    )


def test_orpo_of_one_token(theirs):
    ones = np.ones_like(LENGTHS)
    agree(
        lambda x: losses.orpo(x, ones, lam=0.3),
        lambda x: theirs(x, "orpo", lengths=ones, lambda_orpo=0.3),
    )


# --- where they differ ----------------------------------------------------------------------------


def test_orpo_has_odds_of_sums_there(theirs):
    def ours(x):
        odds = losses.orpo(x, np.ones_like(LENGTHS)) + x[:, 0]
        return odds - x[:, 0] / jnp.asarray(LENGTHS[:, 0], x.dtype)

    agree(ours, lambda x: theirs(x, "orpo"))
    means = losses.orpo(LOGP, LENGTHS).mean()
    assert abs(means - theirs(LOGP, "orpo")) > 0.1


def test_orpo_of_a_certain_response_is_infinite_there(theirs):
    certain = LOGP.at[:, 1].set(-1e-20)
    assert jnp.isinf(theirs(certain, "orpo"))
    assert jnp.isfinite(losses.orpo(certain, LENGTHS)).all()


# --- its log-probabilities ------------------------------------------------------------------------


class Fixed(nnx.Module):
    """A model of these logits, whatever it reads."""

    def __init__(self, logits):
        self.logits = nnx.Param(logits)

    def __call__(self, *_, **__):
        return self.logits[...], None


def test_sums_of_response_tokens():
    prompt, time, vocabulary = 3, 9, 11
    logits = jnp.asarray(DRAW.normal(size=(2 * PAIRS, prompt + time, vocabulary)))
    tokens = jnp.asarray(DRAW.integers(0, vocabulary, logits.shape[:2]))
    mask = 1.0 * (np.arange(time) < DRAW.integers(1, time + 1, (2 * PAIRS, 1)))
    found = dpo_trainer.compute_logps(Fixed(logits), tokens, None, None, time, mask.astype("f4"))
    hidden, head = logits[:, prompt - 1 : -1], jnp.eye(vocabulary)
    each = logprobs.token_logprobs(hidden, head, tokens[:, prompt:])
    expected = (each * mask).sum(axis=-1)
    np.testing.assert_allclose(jnp.concatenate(found), expected, rtol=1e-5)  # theirs is float32


def test_the_page_has_a_row_for_each_comparison():
    assert set(docs.COMPARED["tunix 0.1.7"]) == {"dpo", "cdpo", "orpo"}
