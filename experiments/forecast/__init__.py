"""Which responses fall when a model learns preferences, how far, who foresaw it, and why.

Claim:   Trained with a margin loss, chosen responses fall where they are not looked at: those of
         pairs never trained on. What lowers them are the other pairs, so the gradient of the whole
         preference set foresees it, and a pair's own gradients do not.
Run:     python -m experiments.forecast
Takes:   about 40 minutes a seed on 2 cores, with 192 pairs
Expect:  the mean of unseen chosen responses falls below its start and below both controls; the
         model moved once along the set's gradients falls as far.
Source:  Yuan et al. (2024), https://arxiv.org/abs/2410.13828; Razin et al. (2024),
         https://arxiv.org/abs/2410.08847; Ren and Sutherland (2024),
         https://arxiv.org/abs/2407.10490
"""

from experiments.forecast.figure import draw as draw
from experiments.forecast.measure import run as run
from experiments.forecast.protocol import SMOKE as SMOKE
from experiments.forecast.protocol import Config as Config
from experiments.forecast.protocol import load as load
from experiments.forecast.report import report as report
from experiments.forecast.summary import summarise as summarise
