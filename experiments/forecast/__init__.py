"""What predicts displacement: signals known before training, against what training then did.

Claim:   Numbers known before training say which chosen responses will fall: the exact ones,
         gradient inner products, say it best, those of embeddings alone are cheaper.
Run:     python -m experiments.forecast
Takes:   about 20 minutes on 2 cores
Expect:  the exact effect of the first update forecasts one update nearly perfectly, and less the
         longer training goes on; of the rest it is measured which beat the length difference.
Source:  Razin et al. (2024), Section 5 and Figure 2, https://arxiv.org/abs/2410.08847; Yuan et al.
         (2024), https://arxiv.org/abs/2410.13828
"""

from experiments.forecast.figure import draw as draw
from experiments.forecast.measure import Programs as Programs
from experiments.forecast.measure import programs as programs
from experiments.forecast.measure import run as run
from experiments.forecast.measure import signals as signals
from experiments.forecast.measure import text_signals as text_signals
from experiments.forecast.measure import train as train
from experiments.forecast.protocol import PROTOCOLS as PROTOCOLS
from experiments.forecast.protocol import SIGNALS as SIGNALS
from experiments.forecast.protocol import SMOKE as SMOKE
from experiments.forecast.protocol import Config as Config
from experiments.forecast.protocol import hashes as hashes
from experiments.forecast.protocol import load as load
from experiments.forecast.protocol import rows as rows
from experiments.forecast.summary import auc as auc
from experiments.forecast.summary import report as report
from experiments.forecast.summary import summarise as summarise
