"""Losses agree with TRL 1.16.0 on random pairs, value and pulls; where they differ, it is asserted.

Its trainers take log-probabilities of tokens from the model, so a stand-in for the model is enough.
TRL 0.28.0, whose losses differ in places, has tests and an environment of its own. These
are run by `make parity-trl-1`.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from jaxpref import losses
from jaxpref.losses import __main__ as docs

PAIRS, TIME, PROMPT, EPSILON = 7, 12, 2, 0.1
DRAW = np.random.default_rng(0)
LENGTHS = DRAW.integers(3, TIME + 1, (PAIRS, 2))
IS_TARGET = np.arange(TIME) < LENGTHS[..., None]
TOKEN_REFERENCE = np.where(IS_TARGET, -3 * DRAW.random((PAIRS, 2, TIME)) - 1, 0)
TOKEN_LOGP = np.where(IS_TARGET, TOKEN_REFERENCE + DRAW.uniform(-1, 1, IS_TARGET.shape), 0)
COLLISION = np.where(IS_TARGET, -DRAW.random(IS_TARGET.shape), 0)  # log sum p^2
REFERENCE = TOKEN_REFERENCE.sum(-1)


def rows(x):
    """Of pairs, all chosen before all rejected."""
    return x.transpose(0, 1).flatten(0, 1)


def of_trainer(**settings):
    """What TRL's loss functions read of their trainer."""
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_weights": [1.0],
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "alpha": 0.0,
        "calculate_KL": True,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    return types.SimpleNamespace(
        accelerator=accelerator,
        args=types.SimpleNamespace(discopop_tau=0.05),
        model=types.SimpleNamespace(training=False),
        _metrics={"eval": collections.defaultdict(list)},
        _total_train_tokens=0,
        **{**defaults, **settings},
    )


def inputs(token_logp, is_target=IS_TARGET):
    """The model's outputs and the batch, for trainers that want both."""
    is_scored = rows(torch.tensor(is_target))
    is_completion = torch.nn.functional.pad(is_scored, (PROMPT, 0)).long()
    log_probs = torch.nn.functional.pad(rows(token_logp), (PROMPT - 1, 0))
    still = torch.zeros_like(log_probs).detach()
    outputs = types.SimpleNamespace(
        log_probs=log_probs, entropy=still, mean_logits=still, is_top1=still.bool()
    )
    return outputs, {"input_ids": 0 * is_completion, "completion_mask": is_completion}


def dpo(loss_type, token_logp, reference=REFERENCE, collision=None, **settings):
    """TRL's mean loss of the pairs."""
    is_target = IS_TARGET if len(token_logp) == PAIRS else np.ones(token_logp.shape, bool)
    outputs, batch = inputs(token_logp, is_target)
    if collision is not None:
        outputs.log_sum_sq_probs = inputs(torch.tensor(collision))[0].log_probs
    for side, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        batch[name] = torch.tensor(np.asarray(reference)[:, side], dtype=token_logp.dtype)
    trainer = of_trainer(loss_types=[loss_type], **settings)
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)


def cpo(loss_type, a, beta, **settings):
    trainer = of_trainer(loss_type=loss_type, beta=beta, **settings)
    return CPOTrainer.cpo_loss(trainer, *a.unbind(-1))[0].mean()


def summed(x):
    return x.sum(-1)


def by_token(x):
    return x.sum(-1) / torch.tensor(LENGTHS)


def compare(ours, theirs, rtol=1e-9):
    """The mean loss and its derivative by every token's log-probability."""
    value, slope = jax.jit(jax.value_and_grad(lambda x: ours(x).mean()))(jnp.asarray(TOKEN_LOGP))
    token_logp = torch.tensor(TOKEN_LOGP, requires_grad=True)
    expected = theirs(token_logp)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=rtol)
    scored = np.where(IS_TARGET, token_logp.grad, 0)
    np.testing.assert_allclose(jnp.where(IS_TARGET, slope, 0), scored, rtol=rtol, atol=1e-12)


SMOOTHED = {"label_smoothing": EPSILON}
N = jnp.asarray(LENGTHS, float)
PAIRWISE = {  # ours of sums (logp, reference), theirs of tokens
    "dpo": (losses.dpo, lambda x: dpo("sigmoid", x)),
    "robust_dpo": (
        lambda x, r: losses.robust_dpo(x, r, epsilon=EPSILON),
        lambda x: dpo("robust", x, **SMOOTHED),
    ),
    "hinge": (losses.hinge, lambda x: dpo("hinge", x)),
    "ipo_length_normalised": (
        lambda x, r: losses.ipo_length_normalised(x, r, N),
        lambda x: dpo("ipo", x),
    ),
    "ln_dpo": (
        lambda x, r: losses.ln_dpo(x, r, N, beta=0.1),
        lambda x: dpo("sigmoid_norm", x),
    ),
    "exo_pair": (
        lambda x, r: losses.exo_pair(x, r, epsilon=EPSILON),
        lambda x: dpo("exo_pair", x, **SMOOTHED),
    ),
    "nca_pair": (lambda x, r: losses.nca_pair(x, r, beta=0.1), lambda x: dpo("nca_pair", x)),
    "sppo": (lambda x, r: losses.sppo(x, r, beta=0.1), lambda x: dpo("sppo_hard", x)),
    "apo_zero": (losses.apo_zero, lambda x: dpo("apo_zero", x)),
    "apo_down": (losses.apo_down, lambda x: dpo("apo_down", x)),
    "discopop": (lambda x, r: losses.discopop(x, r, beta=0.1), lambda x: dpo("discopop", x)),
    "f_dpo_forward_kl": (
        losses.f_dpo_forward_kl,
        lambda x: dpo("sigmoid", x, f_divergence_type="forward_kl"),
    ),
    "f_dpo_jensen_shannon": (
        losses.f_dpo_jensen_shannon,
        lambda x: dpo("sigmoid", x, f_divergence_type="js_divergence"),
    ),
    "aot": (
        lambda x, r: losses.aot(x, r, beta=0.1, epsilon=EPSILON),
        lambda x: dpo("aot", x, **SMOOTHED),
    ),
    "aot_unpaired": (
        lambda x, r: losses.aot_unpaired(x, r, beta=0.1, epsilon=EPSILON),
        lambda x: dpo("aot_unpaired", x, **SMOOTHED),
    ),
    "bco": (  # there the sum over the pair, and no shift
        lambda x, r: losses.bco(x, r, jnp.array([[True, False]] * PAIRS), 0.0).sum(-1),
        lambda x: dpo("bco_pair", x),
    ),
    "cpo": (
        lambda x, r: losses.cpo(x, alpha=0),
        lambda x: cpo("sigmoid", summed(x), beta=0.1),
    ),
    "simpo": (
        lambda x, r: losses.simpo(x, N),
        lambda x: cpo("simpo", by_token(x), beta=2.0, simpo_gamma=0.5),
    ),
    "alphapo": (
        lambda x, r: losses.alphapo(x, N),
        lambda x: cpo("simpo", by_token(x), beta=2.5, simpo_gamma=0.1, alpha=0.25),
    ),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_value_and_pull_of_every_pair(name):
    ours, theirs = PAIRWISE[name]
    rtol = 1e-6 if name == "exo_pair" else 1e-9  # its log-labels are float32 there
    compare(lambda x: ours(x.sum(-1), jnp.asarray(REFERENCE)), theirs, rtol)


def test_ld_dpo():
    reference = losses.ld_logp(jnp.asarray(TOKEN_REFERENCE), IS_TARGET, alpha=0.3)
    compare(
        lambda x: losses.dpo(losses.ld_logp(x, IS_TARGET, alpha=0.3), reference),
        lambda x: dpo("sigmoid", x, reference, ld_alpha=0.3),
    )


def test_wpo_weights():
    collision = jnp.asarray(COLLISION.sum(-1))

    def ours(x):
        logp = x.sum(-1)
        return losses.wpo_weight(logp, collision, N) * losses.dpo(logp, jnp.asarray(REFERENCE))

    compare(ours, lambda x: dpo("sigmoid", x, collision=COLLISION, use_weighting=True))


def test_kto_and_its_baseline():
    desirable = np.array([[True, False]] * PAIRS)
    other = REFERENCE + DRAW.normal(size=REFERENCE.shape) + 0.5  # of mismatched completions
    baseline = losses.kto_baseline(jnp.asarray(other.ravel()), jnp.asarray(REFERENCE.ravel()))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}

    def theirs(token_logp):
        outputs, batch = inputs(token_logp)
        still = rows(torch.tensor(REFERENCE))
        batch |= {"label": rows(torch.tensor(desirable)), "ref_logps": still, "ref_KL_logps": still}
        trainer = of_trainer(loss_type="kto", **weights)
        trainer._compute_kl_logps = lambda model, batch: rows(torch.tensor(other))
        return KTOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)

    def ours(x):
        return losses.kto(x.sum(-1), jnp.asarray(REFERENCE), desirable, baseline, **weights)

    assert baseline > 0
    compare(ours, theirs)


def test_orpo_is_their_term_and_the_likelihood():
    a = TOKEN_LOGP.sum(-1) / LENGTHS
    term = ORPOTrainer.odds_ratio_loss(of_trainer(beta=0.3), *torch.tensor(a).unbind(-1))[0]
    found = losses.orpo(jnp.asarray(TOKEN_LOGP.sum(-1)), N, lam=0.3)
    np.testing.assert_allclose(found, -a[:, 0] - term.numpy(), rtol=1e-5)  # theirs is float32


# --- where they differ ----------------------------------------------------------------------------


def ours_of(loss, **arguments):
    return float(loss(jnp.asarray(TOKEN_LOGP.sum(-1)), jnp.asarray(REFERENCE), **arguments).mean())


def test_smoothed_labels_of_dpo_are_ignored_there():
    there = dpo("sigmoid", torch.tensor(TOKEN_LOGP), **SMOOTHED).item()
    np.testing.assert_allclose(there, ours_of(losses.dpo), rtol=1e-9)
    assert abs(there - ours_of(losses.cdpo, epsilon=EPSILON)) > 1e-3


def test_ipo_is_not_of_sums_there():
    there = dpo("ipo", torch.tensor(TOKEN_LOGP)).item()
    assert abs(there - ours_of(losses.ipo)) > 0.1


def test_exo_without_smoothing_is_infinite_there():
    """Which is why its trainer refuses it, when it is made."""
    assert dpo("exo_pair", torch.tensor(TOKEN_LOGP)).item() == np.inf
    assert np.isfinite(ours_of(losses.exo_pair))


def test_the_alpha_divergence_takes_one_less_alpha_and_stops_pulling_at_an_exponent_of_80():
    def pull_there(logp):  # in float32, the widest type that this divergence accepts there
        token_logp = torch.tensor(logp[..., None], dtype=torch.float32, requires_grad=True)
        settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
        dpo("sigmoid", token_logp, np.zeros_like(logp), **settings).backward()
        return token_logp.grad[..., 0].numpy()

    def pull_here(logp):
        x = jnp.asarray(logp, jnp.float32)
        return jax.grad(lambda x: losses.f_dpo_alpha(x, jnp.zeros_like(x), alpha=0.3).mean())(x)

    near, far = np.array([[-2.0, -1.0], [-1.0, -3.0]]), np.array([[-300.0, -1.0]])
    np.testing.assert_allclose(pull_here(near), pull_there(near), rtol=1e-5)
    assert pull_there(far)[0, 0] == 0
    assert pull_here(far)[0, 0] < -1e30


def test_discopop_of_pairs_far_wrong_is_not_a_number_there():
    far = torch.tensor([[[-1000.0], [-1.0]]], dtype=torch.float32)
    assert dpo("discopop", far, np.zeros((1, 2))).isnan()
    here = losses.discopop(jnp.array([[-1000.0, -1.0]]), jnp.zeros((1, 2)))
    np.testing.assert_allclose(here, 0.05 * 999, rtol=1e-6)


def test_the_likelihood_term_is_a_mean_over_the_tokens_of_the_batch_there():
    there = dpo("sft", torch.tensor(TOKEN_LOGP)).item()
    chosen = TOKEN_LOGP[:, 0].sum(-1)
    np.testing.assert_allclose(there, -chosen.sum() / LENGTHS[:, 0].sum(), rtol=1e-9)
    here = losses.sft_token_mean(jnp.asarray(chosen), N[:, 0]).mean()
    assert abs(there - here) > 1e-3


def test_the_page_has_a_row_for_each_comparison():
    more = {"cdpo", "f_dpo_alpha", "ipo", "kto", "ld_logp", "orpo", "sft_token_mean", "wpo_weight"}
    assert {*PAIRWISE, *more} == set(docs.COMPARED["TRL 1.16.0"])
