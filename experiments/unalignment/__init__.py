"""What DPO on a model's own responses does to its refusals, and what filtering its pairs does.

Claim:   Trained by DPO on pairs of its own responses to unsafe prompts, with the refusal preferred,
         a model refuses less, because most pairs are two refusals; the pairs of lowest CHES keep it
         refusing.
Run:     python -m experiments.unalignment
Takes:   70 minutes of processor time
Expect:  refusals fall under DPO and IPO on all pairs, not with a likelihood term, not with gold
         pairs, not with the few pairs of lowest CHES. Whether as few pairs at random, as few
         updates, pairs of one refusal and one compliance, or pairs of short rejected responses do
         the same is what is measured: the paper did not.
Source:  Razin et al. (2024), Section 6, https://arxiv.org/abs/2410.08847

SmolLM2-135M refuses rarely, so it is taught to first: a few supervised updates on fixed refusals of
unsafe prompts, and on its own answers to safe ones. Two responses to each unsafe prompt are drawn
at temperature 1 and cut after `new` tokens; a judge of rules says which are refusals. Of one of
each the refusal is preferred; of two alike a seeded coin decides (the paper's reward model gave
about what a coin gave). All arms start at the taught model, with the paper's RMSprop, one learning
rate and one batch size; a filter's arms differ in their rows and number of updates only. CHES is
length-normalised, of the taught model.
"""

from experiments.unalignment.bench import Bench as Bench
from experiments.unalignment.figure import draw as draw
from experiments.unalignment.judge import PREFIXES as PREFIXES
from experiments.unalignment.judge import degenerate as degenerate
from experiments.unalignment.judge import has_refusal_prefix as has_refusal_prefix
from experiments.unalignment.judge import judge as judge
from experiments.unalignment.judge import labelled as labelled
from experiments.unalignment.judge import refuses as refuses
from experiments.unalignment.judge import repetition as repetition
from experiments.unalignment.judge import sameness as sameness
from experiments.unalignment.measure import run as run
from experiments.unalignment.pairs import kept as kept
from experiments.unalignment.pairs import preferred as preferred
from experiments.unalignment.pairs import updates as updates
from experiments.unalignment.protocol import LOSSES as LOSSES
from experiments.unalignment.protocol import PROBES as PROBES
from experiments.unalignment.protocol import REFUSALS as REFUSALS
from experiments.unalignment.protocol import RULES as RULES
from experiments.unalignment.protocol import SMOKE as SMOKE
from experiments.unalignment.protocol import TYPES as TYPES
from experiments.unalignment.protocol import Arm as Arm
from experiments.unalignment.protocol import Config as Config
from experiments.unalignment.protocol import arms as arms
from experiments.unalignment.protocol import hashes as hashes
from experiments.unalignment.protocol import split as split
from experiments.unalignment.report import report as report
from experiments.unalignment.report import verdict as verdict
from experiments.unalignment.summary import accuracy as accuracy
from experiments.unalignment.summary import bootstrap as bootstrap
from experiments.unalignment.summary import summarise as summarise
from experiments.unalignment.summary import wilson as wilson
