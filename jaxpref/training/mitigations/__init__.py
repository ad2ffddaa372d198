r"""Ways to keep the chosen response from falling with the rejected one.

Most change only how hard a loss pulls at the two log-probabilities of a pair. They need the pair's
``gram [*pairs 2 2]`` of `jaxpref.gradients.pair_grams` and cost no gradient for each pair:

==================  ==========================================  ===========================
function            guarantee, one pair, gradient descent       new pulls
==================  ==========================================  ===========================
`normalised_pull`   chosen up, rejected down                    ``s / |g|``
`calibrated_pull`   chosen up, rejected down                    same product, ratio ``q``
`pcgrad_pull`       chosen up, rejected down                    both larger
`projected_pull`    chosen up as if alone; rejected may rise    larger for the chosen
`losses.dpo_shift`  none; reads no Gram                         smaller for the rejected
==================  ==========================================  ===========================

The guarantees are of first order: for a small enough step of plain gradient descent on this pair
alone. A batch adds what the other pairs do to this one, and Adam bends the step; with the Gram
under an optimizer's metric (`jaxpref.training.linearised`) they hold for the part of the step that
this pair's gradient makes.

In a training step the Gram comes with the scores, of parameters that no gradient enters::

    def score(params, batch):
        still = jax.lax.stop_gradient(params)
        gram = gradients.pair_grams(logp_fn, still, batch.responses).gram
        return Scores(logp_of(params, batch), gram)

    def loss(scores, batch):
        return with_pull(
            lambda logp: losses.dpo(logp, batch.reference, beta=0.1),
            scores.logp,
            lambda pull: normalised_pull(scores.gram, -pull[..., 0]),
        )

    step = make_step(score, loss, optimizer)

A likelihood term needs nothing of this room: it is a sum of losses, which pulls harder at the
chosen response, ``r = 1 + weight / (β σ(-β(u_w - u_l)))``.

>>> import jax, jax.numpy as jnp
>>> from jaxpref import losses
>>> logp = reference = jnp.array([-3.0, -5.0])
>>> loss = lambda x: losses.dpo(x, reference, beta=0.1) + 0.2 * losses.sft(x[..., 0])
>>> jax.grad(loss)(logp).round(3).tolist()  # of DPO alone: -0.05, 0.05
[-0.25, 0.05]

`sparse_dpo` changes which tokens a loss reads instead.
"""

from jaxpref.losses import _shapes
from jaxpref.training.mitigations.masks import contrast_mask as contrast_mask
from jaxpref.training.mitigations.masks import learned_mask as learned_mask
from jaxpref.training.mitigations.masks import masked_log_ratio as masked_log_ratio
from jaxpref.training.mitigations.masks import sparse_dpo as sparse_dpo
from jaxpref.training.mitigations.pulls import normalised_gradient as normalised_gradient
from jaxpref.training.mitigations.pulls import normalised_pull as normalised_pull
from jaxpref.training.mitigations.pulls import pcgrad_pull as pcgrad_pull
from jaxpref.training.mitigations.pulls import projected_pull as projected_pull
from jaxpref.training.mitigations.pulls import with_pull as with_pull
from jaxpref.training.mitigations.reward_calibration import Calibration as Calibration
from jaxpref.training.mitigations.reward_calibration import calibrated_pull as calibrated_pull
from jaxpref.training.mitigations.reward_calibration import calibration as calibration
from jaxpref.training.mitigations.reward_calibration import smoothed as smoothed

_shapes.hold(__name__)
