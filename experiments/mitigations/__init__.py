"""Which methods keep chosen responses up that are not trained on, at the margin that DPO reaches.

Claim:   Losses and changes of pulls that were made against displacement keep chosen responses up
         where DPO lowers both, at no loss of margin.
Run:     python -m experiments.mitigations
Takes:   about an hour on 2 cores (an hour and a half beside other work)
Expect:  from a supervised start, on pairs with a long common suffix, DPO lowers both responses of
         unseen pairs. A pair's guarantee is of one step of gradient descent on that pair alone:
         whether it holds for Adam, batches and unseen pairs is what is measured.
Source:  Yuan et al. (2024), Section 5, https://arxiv.org/abs/2410.13828; DPO-positive (2024),
         https://arxiv.org/abs/2402.13228; DPO-Shift (2025), https://arxiv.org/abs/2502.07599; CPO
         (2024), https://arxiv.org/abs/2401.08417; Cal-DPO (2024),
         https://arxiv.org/abs/2412.14516; reward calibration (2026),
         https://arxiv.org/abs/2604.18239
"""

from experiments.mitigations.measure import run as run
from experiments.mitigations.protocol import SMOKE as SMOKE
from experiments.mitigations.protocol import Config as Config
from experiments.mitigations.protocol import load as load
from experiments.mitigations.report import draw as draw
from experiments.mitigations.report import report as report
from experiments.mitigations.summary import summarise as summarise
