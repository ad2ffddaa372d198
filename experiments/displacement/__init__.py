"""Chosen responses that fall although they are preferred: foretold, then seen, in five minutes.

A small language model is taught a set of answers, then trained by DPO to prefer them to worse ones.
Before that training it is said of answers to other questions which of them will become less likely.

Claim:   Chosen responses that are not trained on fall, more than under continued supervision, and
         which of them fall is known from gradients before the first update.
Run:     python -m experiments.displacement
Takes:   5 minutes on 2 cores
Expect:  most unseen chosen responses fall and their mean is below zero; those of the control rise.
Source:  Yuan et al. (2024), https://arxiv.org/abs/2410.13828; Razin et al. (2024),
         https://arxiv.org/abs/2410.08847; in full with three seeds: experiments/forecast
"""

from experiments.displacement.measure import run as run
from experiments.displacement.protocol import SMOKE as SMOKE
from experiments.displacement.protocol import Config as Config
from experiments.displacement.protocol import load as load
from experiments.displacement.report import draw as draw
from experiments.displacement.report import report as report
from experiments.displacement.report import summarise as summarise
