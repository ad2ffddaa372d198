"""Whether training on pairs of high CHES lowers chosen responses, of these pairs and of others.

Claim:   Of subsets around percentiles of a score, training on those of higher CHES raises the
         chosen response less, and on the highest lowers it; edit distance and last hidden states
         do not order it so.
Run:     python -m experiments.ches_percentiles
Takes:   about an hour on 2 cores (an estimate)
Expect:  trained chosen responses rise less the higher the CHES, much as by the length difference;
         what unseen ones do hardly depends on the subset.
Source:  Razin et al. (2024), Section 5 and Figure 2, https://arxiv.org/abs/2410.08847

Unlike there, every subset is also trained with labels by coin and by supervision alone, lengths and
chance choose subsets too, and pairs that were not trained on are measured beside those that were.
"""

from experiments.ches_percentiles.measure import run as run
from experiments.ches_percentiles.protocol import SMOKE as SMOKE
from experiments.ches_percentiles.protocol import Config as Config
from experiments.ches_percentiles.protocol import load as load
from experiments.ches_percentiles.protocol import quantile_slice as quantile_slice
from experiments.ches_percentiles.report import draw as draw
from experiments.ches_percentiles.report import report as report
from experiments.ches_percentiles.report import summarise as summarise
