"""Predicted against measured: what one step, and ten, do to every log-probability.

Claim:   To first order, an optimizer's step changes each log-probability by the inner product of
         its gradient with the step. For a small enough learning rate nothing else matters, whatever
         the optimizer, its momentum and its clipping; above some learning rate the theory ends.
Run:     python -m experiments.first_order
Takes:   about 25 minutes on 2 cores, 13 GB of memory
Expect:  after one step the points lie on the diagonal over several decades of the learning rate;
         after ten steps, predicted from the first gradient alone, the range is shorter. A pair's
         own Gram matrix, without its neighbours in the batch, predicts less.
Source:  Yuan et al. (2024), Section 3, https://arxiv.org/abs/2410.13828
"""

from experiments.first_order.measure import run as run
from experiments.first_order.protocol import SMOKE as SMOKE
from experiments.first_order.protocol import Config as Config
from experiments.first_order.protocol import load as load
from experiments.first_order.report import draw as draw
from experiments.first_order.report import report as report
from experiments.first_order.report import summarise as summarise
