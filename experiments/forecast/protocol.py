"""The settings, the signals, and the pairs."""

import dataclasses

import numpy as np

from experiments import common
from jaxpref.data import batches

TEXT, FORWARD, GRAM = "none", "1 forward", "1 forward, 1 backward a response"
SIGNALS = {  # larger: a fall of the chosen response is expected; what each costs a pair
    "first update, pair alone": "1 forward, 1 backward, 1 JVP",
    "first update, all pairs": "1 forward, 1 backward, 1 JVP",
    "Gram, first-order change": GRAM,
    "Gram in the optimizer's metric": GRAM,
    "Gram, band margin": GRAM,
    "Gram, cosine": GRAM,
    "unembedding Gram (alpha-weighted)": FORWARD,
    "CHES": FORWARD,
    "CHES, length-normalised": FORWARD,
    "last hidden inner product": FORWARD,
    "edit similarity": TEXT,
    "length difference": TEXT,
    "chance": TEXT,
}
PROTOCOLS = ("alone", "together")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    optimizer: common.Optimizer = "adam"
    rate: float = 1e-6
    pairs: int = 24
    alone: tuple[int, ...] = (1, 10)
    """Updates after which a pair trained alone is looked at."""
    together: tuple[int, ...] = (1, 10, 50)
    """Updates after which pairs trained together are looked at."""
    batch: int = 4
    """Pairs of an update when they are trained together."""
    seeds: int = 1
    """Each draws other pairs, other batches."""
    beta: float = 0.1
    resamples: int = 2000
    """Of the bootstrap over pairs."""
    supervised: int = 0
    """Updates of Adam on the chosen responses of all pairs before, at `supervised_rate`."""
    supervised_rate: float = 1e-3
    limit: int = 64
    """Most tokens of prompt and response; longer prompts lose their beginning."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A JSONL file of pairs; by default the shipped ones."""
    bad: common.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    columns: str = ""
    """The data's own names of columns, ``chosen=good,rejected=bad``."""
    end: str = "none"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = common.DATE
    """Today, for a chat template that asks."""


SMOKE = Config(pairs=4, alone=(1, 2), together=(1, 2), batch=2, resamples=50)


def load(config: Config) -> tuple[common.Subject, common.Problem]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    common.at_least(1, config, "pairs", "batch", "seeds", "resamples", "limit")
    common.at_least(0, config, "supervised")
    common.above(0, config, "rate", "beta", "supervised_rate")
    for name in PROTOCOLS:
        if min(getattr(config, name), default=0) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected numbers of updates")
    found = common.read(config)
    if not config.batch <= config.pairs <= len(found.rows):
        raise ValueError(f"pairs: got {config.pairs}, expected {config.batch} to {len(found.rows)}")
    subject = common.open_model(config.model)
    return subject, common.problem_of(config, subject, found, least=config.pairs)


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    return common.hashes(*load(config))


def rows(config: Config, problem: common.Problem, seed: int) -> np.ndarray:
    """Which pairs a seed draws."""
    return batches.order(len(problem), config.pairs, seed, 0)
