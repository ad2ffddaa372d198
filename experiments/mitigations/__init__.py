"""What keeps the chosen response up: mitigations of entanglement against plain DPO.

Claim:   Pulls moved to the middle of a pair's band (normalised, calibrated) or projected keep the
         chosen response from falling with the rejected one, at the same margin.
Run:     python -m experiments.mitigations
Takes:   about 20 minutes on 2 cores
Expect:  a pair's guarantee is of one step of gradient descent on that pair alone. Whether it
         survives batches, many steps and pairs that were not trained on is what is measured.
Source:  Yuan et al. (2024), Section 5, https://arxiv.org/abs/2410.13828; reward calibration (2026),
         https://arxiv.org/abs/2604.18239; DPO-Shift (2025), https://arxiv.org/abs/2502.07599
"""

from experiments.mitigations.figure import draw as draw
from experiments.mitigations.measure import run as run
from experiments.mitigations.protocol import SMOKE as SMOKE
from experiments.mitigations.protocol import Config as Config
from experiments.mitigations.protocol import looks as looks
from experiments.mitigations.protocol import parts as parts
from experiments.mitigations.start import hashes as hashes
from experiments.mitigations.summary import report as report
from experiments.mitigations.summary import summarise as summarise
