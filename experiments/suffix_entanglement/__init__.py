"""Shared text after the word that differs: what it does to the gradients, and to the chosen.

Three sets of pairs have the same sentences and the same two labels, ``positive`` and ``negative``.
Only the text after the label differs: none, two tokens, eleven. Each set is trained on by itself.

Claim:   Where responses differ in one word, the shared text after it aligns the gradients of the
         two log-probabilities, the more the longer it is, and DPO lowers the chosen response too;
         without such text the gradients point apart and the chosen rises.
Run:     python -m experiments.suffix_entanglement
Takes:   about 40 minutes on 2 cores (an estimate)
Expect:  cosines in the claimed order; a fall of unseen chosen responses below their start and below
         both controls with the long text. A short text that supervision has made sure of sends next
         to no gradient.
Source:  Yuan et al. (2024), Section 4.1, Figures 3 and 4, https://arxiv.org/abs/2410.13828
         (GPT-2 on tweets, one run)
"""

from experiments.suffix_entanglement.measure import run as run
from experiments.suffix_entanglement.protocol import SMOKE as SMOKE
from experiments.suffix_entanglement.protocol import Config as Config
from experiments.suffix_entanglement.protocol import hashes as hashes
from experiments.suffix_entanglement.report import draw as draw
from experiments.suffix_entanglement.report import report as report
from experiments.suffix_entanglement.report import summarise as summarise
