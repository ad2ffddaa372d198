"""Losses agree with TRL 0.28.0 on random pairs, value and pulls; where they differ, it is asserted.

TRL 0.28.0 is the last version whose losses are functions of log-probabilities. It needs an older
transformers than the other comparisons, so it has an environment of its own: `make parity-trl-0`.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_config import FDivergenceType

from jaxpref import losses
from jaxpref.losses import __main__ as docs

PAIRS, EPSILON = 7, 0.1
DRAW = np.random.default_rng(0)
REFERENCE = -30 * DRAW.random((PAIRS, 2)) - 2
LOGP = REFERENCE + np.minimum(3 * DRAW.normal(size=(PAIRS, 2)), 1.5)
LENGTHS = DRAW.integers(3, 20, (PAIRS, 2)).astype(float)


def of_trainer(beta, **settings):
    """What TRL's loss functions read of their trainer."""
    defaults = {
        "label_smoothing": 0.0,
        "reference_free": False,
        "f_divergence_type": FDivergenceType.REVERSE_KL,
        "f_divergence_params": None,
        "alpha": 0.0,
    }
    args = types.SimpleNamespace(discopop_tau=0.05)
    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    return types.SimpleNamespace(
        beta=beta, args=args, accelerator=accelerator, **{**defaults, **settings}
    )


def dpo(loss_type, logp, reference=REFERENCE, beta=0.1, **settings):
    """TRL's loss of each pair."""
    inputs = [*logp.unbind(-1), *torch.tensor(reference, dtype=logp.dtype).unbind(-1)]
    return DPOTrainer.dpo_loss(of_trainer(beta, **settings), *inputs, loss_type=loss_type)[0]


def by_token(x):
    return x / torch.tensor(LENGTHS)


def cpo(loss_type, logp, beta, **settings):
    trainer = of_trainer(beta, loss_type=loss_type, **settings)
    return CPOTrainer.cpo_loss(trainer, *logp.unbind(-1))[0]


SMOOTHED = {"label_smoothing": EPSILON}
ALPHA = {"f_divergence_params": {"alpha_divergence_coef": 0.3}}
PAIRWISE = {  # ours of (logp, reference, lengths), theirs of logp
    "dpo": (lambda x, r, n: losses.dpo(x, r), lambda x: dpo("sigmoid", x)),
    "cdpo": (
        lambda x, r, n: losses.cdpo(x, r, epsilon=EPSILON),
        lambda x: dpo("sigmoid", x, **SMOOTHED),
    ),
    "robust_dpo": (
        lambda x, r, n: losses.robust_dpo(x, r, epsilon=EPSILON),
        lambda x: dpo("robust", x, **SMOOTHED),
    ),
    "hinge": (lambda x, r, n: losses.hinge(x, r), lambda x: dpo("hinge", x)),
    "ipo": (lambda x, r, n: losses.ipo(x, r), lambda x: dpo("ipo", x)),
    "ipo_length_normalised": (
        lambda x, r, n: losses.ipo_length_normalised(x, r, n),
        lambda x: dpo("ipo", by_token(x), REFERENCE / LENGTHS),
    ),
    "exo_pair": (
        lambda x, r, n: losses.exo_pair(x, r, epsilon=EPSILON),
        lambda x: dpo("exo_pair", x, **SMOOTHED),
    ),
    "nca_pair": (lambda x, r, n: losses.nca_pair(x, r, beta=0.1), lambda x: dpo("nca_pair", x)),
    "sppo": (lambda x, r, n: losses.sppo(x, r, beta=0.1), lambda x: dpo("sppo_hard", x)),
    "apo_zero": (lambda x, r, n: losses.apo_zero(x, r), lambda x: dpo("apo_zero", x)),
    "apo_down": (lambda x, r, n: losses.apo_down(x, r), lambda x: dpo("apo_down", x)),
    "discopop": (lambda x, r, n: losses.discopop(x, r, beta=0.1), lambda x: dpo("discopop", x)),
    "f_dpo_jensen_shannon": (
        lambda x, r, n: losses.f_dpo_jensen_shannon(x, r),
        lambda x: dpo("sigmoid", x, f_divergence_type=FDivergenceType.JS_DIVERGENCE),
    ),
    "f_dpo_alpha": (
        lambda x, r, n: losses.f_dpo_alpha(x, r, alpha=0.3),
        lambda x: dpo("sigmoid", x, f_divergence_type=FDivergenceType.ALPHA_DIVERGENCE, **ALPHA),
    ),
    "f_dpo_forward_kl": (  # their default coefficient is 1
        lambda x, r, n: losses.f_dpo_forward_kl(x, r),
        lambda x: dpo("sigmoid", x, f_divergence_type=FDivergenceType.ALPHA_DIVERGENCE),
    ),
    "cpo": (lambda x, r, n: losses.cpo(x, alpha=0), lambda x: cpo("sigmoid", x, beta=0.1)),
    "simpo": (
        lambda x, r, n: losses.simpo(x, n),
        lambda x: cpo("simpo", by_token(x), beta=2.0, simpo_gamma=0.5),
    ),
    "alphapo": (
        lambda x, r, n: losses.alphapo(x, n),
        lambda x: cpo("simpo", by_token(x), beta=2.5, simpo_gamma=0.1, alpha=0.25),
    ),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_value_and_pull_of_every_pair(name):
    ours, theirs = PAIRWISE[name]
    data = jnp.asarray(REFERENCE), jnp.asarray(LENGTHS)
    value, back = jax.vjp(lambda x: ours(x, *data), jnp.asarray(LOGP))
    logp = torch.tensor(LOGP, requires_grad=True)
    expected = theirs(logp)
    expected.sum().backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-9)
    np.testing.assert_allclose(back(jnp.ones(PAIRS))[0], logp.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_losses_of_a_batch_but_for_the_order(name):
    def ours(x):
        return getattr(losses, name)(x, jnp.asarray(REFERENCE), beta=0.1, epsilon=EPSILON)

    value, back = jax.vjp(ours, jnp.asarray(LOGP))
    logp = torch.tensor(LOGP, requires_grad=True)
    expected = dpo(name, logp, **SMOOTHED)
    expected.sum().backward()
    np.testing.assert_allclose(np.sort(value), np.sort(expected.detach()), rtol=1e-9)
    np.testing.assert_allclose(back(jnp.ones(PAIRS))[0], logp.grad, rtol=1e-9)


def test_orpo_is_their_term_and_the_likelihood():
    a = LOGP / LENGTHS
    term = ORPOTrainer.odds_ratio_loss(of_trainer(0.3), *torch.tensor(a).unbind(-1))[0]
    found = losses.orpo(jnp.asarray(LOGP), jnp.asarray(LENGTHS), lam=0.3)
    np.testing.assert_allclose(found, -a[:, 0] - term.numpy(), rtol=1e-5)  # theirs is float32


# --- where they differ ----------------------------------------------------------------------------


def test_a_divergence_named_by_a_string_is_silently_the_reverse_kl():
    logp = torch.tensor(LOGP)
    named = dpo("sigmoid", logp, f_divergence_type="js_divergence")
    np.testing.assert_array_equal(named, dpo("sigmoid", logp))
    ours = losses.f_dpo_jensen_shannon(jnp.asarray(LOGP), jnp.asarray(REFERENCE))
    assert np.abs(np.asarray(ours) - named.numpy()).max() > 0.01


def test_exo_without_smoothing_takes_a_thousandth():
    found = losses.exo_pair(jnp.asarray(LOGP), jnp.asarray(REFERENCE), epsilon=1e-3)
    np.testing.assert_allclose(found, dpo("exo_pair", torch.tensor(LOGP)), rtol=1e-9)


def test_discopop_of_pairs_far_wrong_is_not_a_number_there():
    logp, reference = np.array([[-1000.0, -1.0]]), np.zeros((1, 2))
    there = dpo("discopop", torch.tensor(logp, dtype=torch.float32), reference)
    assert torch.isnan(there).all()
    here = losses.discopop(jnp.asarray(logp, jnp.float32), jnp.asarray(reference, jnp.float32))
    np.testing.assert_allclose(here, 0.05 * 999, rtol=1e-6)


def test_the_page_has_a_row_for_each_comparison():
    assert {*PAIRWISE, "aot", "aot_unpaired", "orpo"} == set(docs.COMPARED["TRL 0.28.0"])
