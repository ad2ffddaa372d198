"""Claim: trained to prefer *No* over *Never*, a language model may raise *Yes*.

A margin loss fixes only the difference of two log-probabilities. Where the rest of the probability
goes is a matter of geometry, and what gains may mean the opposite. Before training, three
predictions of it are made: the ranking by ``<W_z, W_chosen - W_rejected>``, the exact rate of
gradient flow, and the exact first-order effect of the optimizer's first update.

Protocol: a yes-or-no question about one statement, answered by one token. Optional supervised
phase on all statements, then 100 updates of a margin loss on one prompt; each seed is another
prompt. Numbers are taken before each update, from the full next-token distribution. The controls,
the unembedding alone and a free table of logits, are trained to the whole model's margin.

Run:     python -m experiments.no_vs_never --name mine
Takes:   7 minutes on 2 cores
Expect:  No rises from 0.11 to 0.79 and is displaced in no run; after 25 updates 17 % of the gained
         probability is on words of the opposite meaning (Yes +0.10); in the controls, at the same
         margin, no other word gains on another.
Source:  Razin, Malladi, Bhaskar, Chen, Arora, Hanin 2024, Section 3, Theorems 4 and 5, Tables 1
         to 6 and 13, https://arxiv.org/abs/2410.08847
Read by: notebooks/no_vs_never.ipynb
"""

from experiments.no_vs_never.figure import draw as draw
from experiments.no_vs_never.measure import run as run
from experiments.no_vs_never.protocol import SMOKE as SMOKE
from experiments.no_vs_never.protocol import Config as Config
from experiments.no_vs_never.protocol import cells as cells
from experiments.no_vs_never.protocol import hashes as hashes
from experiments.no_vs_never.report import metrics as metrics
from experiments.no_vs_never.report import report as report
from experiments.no_vs_never.report import summarise as summarise
