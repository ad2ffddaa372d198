"""Which losses keep the chosen response up, and whether their pull ratio says so beforehand.

Claim:   A margin loss raises the chosen response of a pair where its pull ratio r = d_w / d_l
         exceeds the lower edge of the pair's band. So losses that pull harder on the chosen, by a
         likelihood term or by length, keep it up, and those of ratio 1 let it fall.
Run:     python -m experiments.entanglement_dynamics
Takes:   about 20 minutes on 2 cores
Expect:  DPO and IPO lose chosen log-probability where rejected gradients are longer; losses of a
         larger ratio do not; the order of the losses follows the ratio, its size does not.
Source:  Yuan et al. (2024), Figures 1 and 2, Table 2, https://arxiv.org/abs/2410.13828

Every loss starts from the same parameters and sees the same batches in the same order. Losses are
compared after equally many updates and at equal margin. Each loss is divided by the root mean
square of its pulls at the start: a constant, so no ratio changes; the first update of Adam and
RMSprop would be the same without it, that of SGD would not.
"""

from experiments.entanglement_dynamics.figure import draw as draw
from experiments.entanglement_dynamics.measure import Programs as Programs
from experiments.entanglement_dynamics.measure import Start as Start
from experiments.entanglement_dynamics.measure import branches as branches
from experiments.entanglement_dynamics.measure import measure as measure
from experiments.entanglement_dynamics.measure import measure_start as measure_start
from experiments.entanglement_dynamics.measure import programs as programs
from experiments.entanglement_dynamics.measure import pull_of as pull_of
from experiments.entanglement_dynamics.measure import pulls as pulls
from experiments.entanglement_dynamics.measure import run as run
from experiments.entanglement_dynamics.measure import train as train
from experiments.entanglement_dynamics.protocol import LOSSES as LOSSES
from experiments.entanglement_dynamics.protocol import OPTIMIZERS as OPTIMIZERS
from experiments.entanglement_dynamics.protocol import SMOKE as SMOKE
from experiments.entanglement_dynamics.protocol import Config as Config
from experiments.entanglement_dynamics.protocol import hashes as hashes
from experiments.entanglement_dynamics.protocol import load as load
from experiments.entanglement_dynamics.protocol import look_steps as look_steps
from experiments.entanglement_dynamics.report import report as report
from experiments.entanglement_dynamics.summary import PREDICTORS as PREDICTORS
from experiments.entanglement_dynamics.summary import TARGETS as TARGETS
from experiments.entanglement_dynamics.summary import at_margin as at_margin
from experiments.entanglement_dynamics.summary import changes as changes
from experiments.entanglement_dynamics.summary import level_of as level_of
from experiments.entanglement_dynamics.summary import log_ratio as log_ratio
from experiments.entanglement_dynamics.summary import measured as measured
from experiments.entanglement_dynamics.summary import median as median
from experiments.entanglement_dynamics.summary import rank as rank
from experiments.entanglement_dynamics.summary import summarise as summarise
