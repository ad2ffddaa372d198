"""Which losses lower chosen responses that are not trained on, and what the pull ratio says.

Claim:   A margin loss that pulls both responses equally hard lets chosen responses fall; losses
         that pull harder on the chosen, by a likelihood term or by length, keep them up.
Run:     python -m experiments.entanglement_dynamics
Takes:   about an hour on 2 cores for the shipped pairs (an estimate)
Expect:  on unseen pairs the losses of ratio 1 fall below both controls, those with a likelihood
         term do not; on trained pairs nearly all rise.
Source:  Yuan et al. (2024), Figures 1 and 2, Table 2, https://arxiv.org/abs/2410.13828

Every loss starts from the same parameters and sees the same batches in the same order; of Adam's
updates a loss's own scale drops out.
"""

from experiments.entanglement_dynamics.measure import run as run
from experiments.entanglement_dynamics.protocol import SMOKE as SMOKE
from experiments.entanglement_dynamics.protocol import Config as Config
from experiments.entanglement_dynamics.protocol import load as load
from experiments.entanglement_dynamics.report import draw as draw
from experiments.entanglement_dynamics.report import report as report
from experiments.entanglement_dynamics.summary import summarise as summarise
