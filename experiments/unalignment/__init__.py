"""What DPO on a model's own responses does to its refusals, and what filtering its pairs does.

Claim:   Trained by DPO on pairs of its own responses to unsafe prompts, with the refusal preferred,
         a model refuses less, because most pairs are two refusals; the pairs of lowest CHES keep it
         refusing.
Run:     python -m experiments.unalignment
Takes:   4 hours of processor time; 2 with `--only` the arms that decide (estimates)
Expect:  refusals fall under DPO on all pairs, below both controls, and not with the few pairs of
         lowest CHES. Whether as few pairs at random, as few updates, or pairs of one refusal and
         one compliance do the same is what is measured: the paper did not.
Control: at as many updates, DPO with each pair's labels by coin, and supervision continued on the
         chosen responses. Only a fall beyond both is called unalignment, or displacement.
Source:  Razin et al. (2024), Section 6, https://arxiv.org/abs/2410.08847

SmolLM2-135M refuses rarely, so it is taught to first: a few supervised updates on fixed refusals of
unsafe prompts, and on its own answers to safe ones. Two responses to each unsafe prompt are drawn
at temperature 1 and cut after `new` tokens; a judge of rules says which are refusals. Of one of
each the refusal is preferred; of two alike a seeded coin decides (the paper's reward model gave
about what a coin gave). All arms start at the taught model, with the paper's RMSprop, one learning
rate by the paper's rule, and one batch size; a filter's arms differ in their rows and number of
updates only. CHES is length-normalised, of the taught model. More epochs are a run of their own.
"""

from experiments.unalignment.figure import draw as draw
from experiments.unalignment.measure import run as run
from experiments.unalignment.protocol import SMOKE as SMOKE
from experiments.unalignment.protocol import Config as Config
from experiments.unalignment.protocol import arms as arms
from experiments.unalignment.protocol import hashes as hashes
from experiments.unalignment.report import report as report
from experiments.unalignment.report import verdict as verdict
from experiments.unalignment.summary import summarise as summarise
