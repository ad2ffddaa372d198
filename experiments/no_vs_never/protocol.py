"""What the experiment asks: settings, answer words and their meanings, the list of runs."""

import dataclasses
import functools
import hashlib
import itertools
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.protocol import checks, inputs
from jaxpref.data import files, statements
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import bounds

Train = Literal["all", "unembedding", "tabular"]
Loss = Literal["dpo", "ipo", "hinge"]  # of the margin alone: what the theorems are about


@dataclasses.dataclass(frozen=True)
class Config(inputs.Compute):
    """All that decides the numbers. Settings with several values are run in all combinations."""

    pairs: tuple[str, ...] = ("No>Never",)
    """Preferred and dispreferred answer, joined by ``>``; each must be one token."""
    losses: tuple[Loss, ...] = ("dpo",)
    sft_steps: tuple[int, ...] = (16,)
    """Supervised updates before the margin loss; 0 is the model as it comes."""
    learning_rates: tuple[float, ...] = (3e-7,)
    """Of the margin loss on the whole model; IPO's is a tenth of it, as in the paper."""
    train: tuple[Train, ...] = ("all", "unembedding", "tabular")
    """What is trained: the whole model, and in the controls the unembedding alone or a free table
    of logits, at the learning rate at which each reaches the whole model's margin."""
    prompts: int = 3
    """Number of seeds; each picks another prompt."""
    updates: int = 100
    beta: float = 0.1
    """Of DPO and hinge, per nat."""
    tau: float = 0.01
    """Of IPO: its target margin is ``1 / (2 tau)`` nats."""
    sft_learning_rate: float = 3e-6
    sft_batch: int = 16
    decay: float = 0.99
    """Of RMSprop's running mean of squared gradients."""
    seed: int = 0
    data: str | None = None
    """A JSONL file of statements (persona format too); by default the shipped ones."""
    bad: inputs.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file; by default SmolLM2-135M-Instruct."""


# Small enough for a test: two updates of the real model on one prompt.
SMOKE = Config(sft_steps=(1,), sft_batch=2, prompts=1, updates=2)

# Which words mean the same. A gain of a token outside the table is unclassified.
MEANINGS = {
    "affirm": ("yes", "yeah", "yep", "yup", "sure", "certainly", "absolutely", "definitely",
               "indeed", "agreed", "true"),
    "deny": ("no", "nope", "nah", "never", "not", "none", "hardly", "disagree", "false"),
}  # fmt: skip
SFT_LABELS = {  # by the answer that agrees with the behaviour; drawn from those that are one token
    "Yes": ("No", "Never", "Maybe", "Perhaps"),
    "No": ("Yes", "Yeah", "Sure", "Certainly", "Absolutely"),
}
# Rows of the paper's ten seeds among the 500 statements of either answer in its persona file.
PAPER_PROMPTS = (396, 74, 319, 427, 62, 397, 182, 78, 398, 148)
LOOKS = (1, 5, 25)  # updates after which predictions are held against what happened
GAINS = (5, 25, 100)  # updates after which the largest gains are listed, and after the last
LIKELY = 500  # tokens, the likeliest at the start, that are ranked apart and drawn
PREDICTIONS = {
    "direction": "<W_z, W_chosen - W_rejected> (Theorem 5)",
    "flow": "the exact rate of gradient flow",
    "update": "the exact first-order effect of the first update",
}


class Cell(NamedTuple):
    """One training run."""

    prompt: int
    sft_steps: int
    pair: str
    loss: str
    learning_rate: float
    train: str

    @property
    def part(self) -> str:
        """Name under which a run keeps its record."""
        return "_".join(str(x) for x in self).replace(">", "-over-")


def gains_after(config: Config) -> list[int]:
    """Updates after which the largest gains are listed."""
    return sorted({*(k for k in GAINS if k <= config.updates), config.updates})


def cells(config: Config) -> list[Cell]:
    """Every combination, prompt after prompt: stopped early, it has fewer of them, whole."""
    grid = itertools.product(
        range(config.prompts), config.sft_steps, config.pairs, config.losses,
        config.learning_rates, config.train,
    )  # fmt: skip
    return [Cell(*values) for values in grid]


def load_questions(config: Config) -> list[statements.Statement]:
    """The statements of a run."""
    return read_questions(config.data, config.bad).rows


@functools.cache
def read_questions(path: str | None, bad: inputs.Bad) -> files.Found:
    """The statements of a file and the rows that were skipped, read once a process."""
    return statements.read(path, bad="error" if bad == "error" else "drop")


def answer_ids(pair: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """Token ids of the two words, chosen first; an error shows the pieces of a longer word."""
    chosen, separator, rejected = pair.partition(">")
    if not (chosen and separator and rejected):
        raise ValueError(f"pairs: got {pair!r}, expected two words such as No>Never")
    return tokenizer.single_token(chosen), tokenizer.single_token(rejected)


def meaning_ids(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Single tokens of each meaning: the words of `MEANINGS`, any case, with or without a space."""
    vocabulary = {}
    for meaning, words in MEANINGS.items():
        cased = [form for word in words for form in (word, word.capitalize(), word.upper())]
        pieces = [tokenizer.encode(space + word) for word in cased for space in ("", " ")]
        vocabulary[meaning] = sorted({piece[0] for piece in pieces if len(piece) == 1})
    return vocabulary


def meanings_of(pair: str) -> tuple[str | None, str | None]:
    """Meaning of the chosen word, and its opposite; None where the table does not know it."""
    word = pair.partition(">")[0].lower()
    same = next((m for m, words in MEANINGS.items() if word in words), None)
    return same, {"affirm": "deny", "deny": "affirm"}.get(same or "")


def prompt_rows(config: Config, pair: str) -> list[int]:
    """The seeds' statements: those whose usual answer the training works against, in order."""
    usual = " No" if meanings_of(pair)[0] == "affirm" else " Yes"
    rows = [i for i, s in enumerate(load_questions(config)) if s.answer == usual]
    if len(rows) == 500:  # the persona file: the paper's own prompts
        order = np.array(PAPER_PROMPTS)
    else:
        order = np.random.default_rng(config.seed).permutation(len(rows))
    if config.prompts > len(order):
        raise ValueError(f"prompts: got {config.prompts}, expected at most {len(order)}")
    return [rows[i] for i in order[: config.prompts]]


def hashes(config: Config) -> dict[str, Any]:
    """Of model and data, for the provenance; raises for settings that cannot be run."""
    checks.at_least(1, config, "prompts", "updates", "sft_batch")
    checks.at_least(0, config, "seed", "sft_steps")
    checks.above(0, config, "beta", "tau", "learning_rates", "sft_learning_rate")
    for name in ("pairs", "losses", "sft_steps", "learning_rates"):
        if not getattr(config, name):
            raise ValueError(f"{name}: got none, expected one or more")
    if "all" not in config.train:
        got = " ".join(config.train) or "none"
        raise ValueError(f"train: got {got}, expected all among them: controls take its margin")
    if not 0 < config.decay < 1:
        raise ValueError(f"decay: got {config.decay}, expected a number between 0 and 1")
    subject = inputs.subject(config, scan=False)
    for pair in config.pairs:
        chosen, rejected = answer_ids(pair, subject.tokenizer)
        if chosen == rejected:
            raise ValueError(f"pairs: {pair!r} prefers a word to itself")
        prompt_rows(config, pair)
    rows, skipped = read_questions(config.data, config.bad)
    # The question, the end of its line, and any one token as the answer.
    asked = [[*subject.tokenizer.encode(x.question + "\n"), 0] for x in rows]
    bounds.check(subject.policy.bounds, asked, [f"question {n}" for n in range(len(asked))])
    data = hashlib.sha256(repr(rows).encode()).hexdigest()
    return inputs.provenance(subject, data, skipped)
