"""How much training it takes until unseen chosen responses fall: a map of the dose.

Claim:   The fall of unseen chosen responses is a matter of dose: of the learning rate, the updates,
         and of how well the start was taught.
Run:     python -m experiments.dose --model small
Takes:   about an hour on 2 cores for the small model
Expect:  no fall at the low end, a fall below both controls from some dose on, and more of it the
         more is trained.
Source:  ours; the protocols of Razin et al. (2024), https://arxiv.org/abs/2410.08847, and Yuan et
         al. (2024), https://arxiv.org/abs/2410.13828, differ in just these three.
"""

from experiments.dose.measure import run as run
from experiments.dose.protocol import SMOKE as SMOKE
from experiments.dose.protocol import Config as Config
from experiments.dose.protocol import load as load
from experiments.dose.report import draw as draw
from experiments.dose.report import report as report
from experiments.dose.report import summarise as summarise
