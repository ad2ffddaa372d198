"""All losses of pairs' log-probabilities on the same pairs, each at the learning rate it chose.

Claim:   Which responses a loss raises and lowers can be told before training, from its pull and the
         Gram matrix of the pairs at the start.
Run:     python -m experiments.loss_comparison
Takes:   about 40 minutes on 2 cores
Expect:  losses with a likelihood term raise the chosen, losses of the rejected alone lower both; at
         so few updates all losses of pull ratio 1 do nearly the same.
Source:  the formulas of `jaxpref.losses`; prediction: Yuan et al. (2024), Section 3,
         https://arxiv.org/abs/2410.13828

Every loss starts from the same parameters and sees the same batches in the same order, at each rate
of a grid. Validation pairs choose its rate: most implicit rewards in the right order, then the
largest mean of log σ of the log-ratio margin. Test pairs decide nothing.

Hyperparameters are the catalogue's defaults. Each loss is divided by the root mean square of its
pulls at the start, of all training pairs as one batch. Besides log-probabilities and lengths:
rewards and win probabilities are 1 and 0; a list is the pair; the reference is PoFT's one aligned
model. Statistics are of the update's own batch: KTO's baseline is the mean log-ratio of its
responses, BCO's shift their mean reward, FLAT's probability the mean over responses of each one's
geometric mean over its tokens. SFT, PoFT and DCO read the chosen responses alone, NPO the rejected.
Left out: what reads single tokens, features or kernels, and KLDO's moving average
(`jaxpref.training.objectives.EXCLUDED`).

Predictions are those of plain gradients. Training is by Adam, whose metric differs.
"""

from experiments.loss_comparison.figure import draw as draw
from experiments.loss_comparison.measure import run as run
from experiments.loss_comparison.protocol import SMOKE as SMOKE
from experiments.loss_comparison.protocol import Config as Config
from experiments.loss_comparison.protocol import load as load
from experiments.loss_comparison.report import report as report
from experiments.loss_comparison.summary import summarise as summarise
