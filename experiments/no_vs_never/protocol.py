"""What the experiment asks: settings, answer words and their meanings, the list of runs."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from experiments import common
from jaxpref.data import files, statements
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import pretrained

Train = Literal["all", "unembedding", "tabular"]
Loss = Literal["dpo", "ipo", "hinge", "slic_hf", "sppo"]


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers. Settings with several values are run in all combinations."""

    pairs: tuple[str, ...] = ("No>Never",)
    """Preferred and dispreferred answer, joined by ``>``; each must be one token."""
    losses: tuple[Loss, ...] = ("dpo",)
    sft_steps: tuple[int, ...] = (16,)
    """Supervised updates before the margin loss; 0 is the model as it comes."""
    learning_rates: tuple[float, ...] = (3e-7,)
    """Of the margin loss; IPO's is a tenth of it, as in the paper."""
    train: tuple[Train, ...] = ("all", "unembedding", "tabular")
    """What is trained. The last two are controls in which theory allows no displacement."""
    prompts: int = 3
    """Number of seeds; each picks another prompt."""
    updates: int = 100
    beta: float = 0.1
    """Of DPO, hinge and SPPO, per nat."""
    tau: float = 0.01
    """Of IPO: its target margin is ``1 / (2 tau)`` nats."""
    sft_learning_rate: float = 3e-6
    sft_batch: int = 16
    decay: float = 0.99
    """Of RMSprop's running mean of squared gradients."""
    seed: int = 0
    data: str | None = None
    """A JSONL file of statements (persona format too); by default the shipped ones."""
    bad: common.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file; by default SmolLM2-135M-Instruct."""


# Small enough for a test: two updates of the real model on one prompt.
SMOKE = Config(sft_steps=(1,), sft_batch=2, prompts=1, updates=2)

# Which words mean the same. A gain of a token outside the table is unclassified.
MEANINGS = {
    "affirm": (
        *("yes", "yeah", "yep", "yup", "sure", "certainly", "absolutely"),
        *("definitely", "indeed", "agreed", "true"),
    ),
    "deny": ("no", "nope", "nah", "never", "not", "none", "hardly", "disagree", "false"),
}
SFT_LABELS = {  # by the answer that agrees with the behaviour; drawn from those that are one token
    "Yes": ("No", "Never", "Maybe", "Perhaps"),
    "No": ("Yes", "Yeah", "Sure", "Certainly", "Absolutely"),
}
# Rows of the paper's ten seeds among the 500 statements of either answer in its persona file.
PAPER_PROMPTS = (396, 74, 319, 427, 62, 397, 182, 78, 398, 148)
LOOKS = (1, 5, 25)  # updates after which predictions are held against what happened
GAINS = (5, 25, 100)  # updates after which the largest gains are listed
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
    def file(self) -> str:
        """Name of the file that keeps its record."""
        return "_".join(str(x) for x in self).replace(">", "-over-") + ".npz"


def cells(config: Config) -> list[Cell]:
    """Every combination, prompt after prompt: stopped early, it has fewer of them, whole."""
    grid = itertools.product(
        range(config.prompts),
        config.sft_steps,
        config.pairs,
        config.losses,
        config.learning_rates,
        config.train,
    )
    return [Cell(*values) for values in grid]


@functools.cache
def load_model(path: str | None) -> pretrained.Pretrained:
    """The model of a run, read once a process."""
    return pretrained.load(path) if path else pretrained.smollm2()


def load_questions(config: Config) -> list[statements.Statement]:
    """The statements of a run."""
    return read_questions(config.data, config.bad).rows


@functools.cache
def read_questions(path: str | None, bad: common.Bad) -> files.Found:
    """The statements of a file and the rows that were skipped, read once a process."""
    return statements.read(path, bad="error" if bad == "error" else "drop")


def digest(records: Sequence[statements.Statement]) -> str:
    """SHA-256 of the statements, for the provenance."""
    return hashlib.sha256(repr(records).encode()).hexdigest()


def tokenizer_of(config: Config) -> Tokenizer:
    """The model's own tokenizer."""
    found = load_model(config.model).tokenizer
    if found is None:
        raise ValueError(f"model: {config.model} has no tokenizer.json, expected one")
    return found


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
