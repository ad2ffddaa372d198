"""A model to look at, and the pairs of a run."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from flax import nnx
from jaxtyping import PyTree

from jaxpref.data import chat, files, preferences
from jaxpref.data.files import TextPair
from jaxpref.data.pairs import Counts, TokenPair, TooLong
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import decoder, pretrained
from jaxpref.models.decoder import Policy
from jaxpref.score import command as line
from jaxpref.training.pairset import PairSet

SMALL: Any = {"width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_width": 32,
              "mlp_width": 384}  # fmt: skip

Bad = Literal["error", "skip"]
"""What becomes of a row that cannot be used: an error, or left out, counted and named."""

DATE = str(chat.DATE)
"""Today, as far as chat templates know."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Of a run's model and pairs, as flags of a command line."""

    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A file of pairs, also of HH-RLHF and packed (.gz); by default the shipped pairs."""
    bad: Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    columns: str = ""
    """The data's own names of columns, ``chosen=good,rejected=bad``."""
    end: str = "eos"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = DATE
    """Today, for a chat template that asks."""


def read(config: Any) -> files.Found:
    """The pairs of a run: those of ``config.data``, else the shipped ones.

    Of the configuration it reads ``data``, ``bad`` and ``columns``.
    """
    columns = line.columns_of(config.columns)
    if not config.data:
        return files.Found(preferences.load(), [])
    return files.read(config.data, bad=dropped(config), columns=columns)


def dropped(config: Any) -> Literal["error", "drop"]:
    """``bad`` of a configuration as readers of files take it."""
    return "error" if config.bad == "error" else "drop"


def encoded(
    config: Any, rows: Sequence[TextPair], subject: "Subject", *, too_long: TooLong
) -> tuple[list[TokenPair], Counts]:
    """Their token ids, by ``bad``, ``end``, ``date`` and ``limit`` of the configuration."""
    return line.encode(
        rows, subject.policy, subject.tokenizer, bad=config.bad, end=line.end_of(config.end),
        date=line.date_of(config.date), limit=config.limit, too_long=too_long,
    )  # fmt: skip


class Subject(NamedTuple):
    """A model to look at."""

    policy: Policy
    params: PyTree
    tokenizer: Tokenizer
    revision: str | None = None  # commit of a model of the hub


@functools.lru_cache(maxsize=1)  # a run asks for it twice: for its hash, and to train
def open_model(model: str | None, *, seed: int = 0, **options: Any) -> Subject:
    """SmolLM2-135M-Instruct by default, a folder, GGUF file or hub name, or ``small``.

    ``small`` is a decoder of 4 layers and width 128 with random weights of this seed, and SmolLM2's
    tokenizer: the experiment trains it from scratch. Options are the decoder's: with ``scan=True``
    a program compiles as fast for many layers as for one.
    """
    known = model not in (None, "small")
    found = pretrained.load(model, **options) if known else pretrained.smollm2(**options)
    if found.tokenizer is None:
        raise ValueError(f"model: {model} has no tokenizer.json, expected one")
    if model != "small":
        return Subject(found.policy, found.params, found.tokenizer, found.revision)
    config = decoder.DecoderConfig(vocab=found.config.vocab, **SMALL)
    policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(seed), **options))
    return Subject(policy, params, found.tokenizer)


def hashes(subject: Subject, pairs: PairSet) -> dict[str, Any]:
    """Of model and pairs, a hub model's commit, and the rows that were skipped: a provenance."""
    return provenance(subject, pairs.digest, pairs.skipped)


def provenance(subject: Subject, data: str, skipped: Sequence[str]) -> dict[str, Any]:
    """The same of data of any kind, by its hash."""
    found: dict[str, Any] = {"model": pretrained.hash_params(subject.params), "data": data}
    found |= {"model_revision": subject.revision} if subject.revision else {}
    return found | {"skipped": without_folders(skipped)}


def without_folders(faults: Sequence[str]) -> list[str]:
    """Faults of rows as a provenance keeps them: a file's name, and not where it lies."""
    return [re.sub(r"^(?!tfds:).*?([^/\\]+, (?:line|row) )", r"\1", fault) for fault in faults]
