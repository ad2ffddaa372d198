"""Which score orders a data set by displacement: subsets at its percentiles, trained one by one.

Claim:   Trained on pairs of a higher CHES percentile, the chosen response's log-probability rises
         less or falls; edit distance and last hidden states do not order it.
Run:     python -m experiments.ches_percentiles
Takes:   about 50 minutes on 2 cores for 80 trainings of 12 pairs of up to 96 tokens
Expect:  CHES orders sums of log-probabilities much as the length difference does, a control that
         the paper lacks; whether anything is left of it at equal lengths is what is measured.
Source:  Razin et al. (2024), Section 5 and Figure 2, https://arxiv.org/abs/2410.08847
"""

from experiments.ches_percentiles.figure import draw as draw
from experiments.ches_percentiles.measure import run as run
from experiments.ches_percentiles.protocol import SMOKE as SMOKE
from experiments.ches_percentiles.protocol import Config as Config
from experiments.ches_percentiles.protocol import hashes as hashes
from experiments.ches_percentiles.protocol import quantile_slice as quantile_slice
from experiments.ches_percentiles.report import report as report
from experiments.ches_percentiles.summary import metrics as metrics
from experiments.ches_percentiles.summary import summarise as summarise
