"""A model to look at, and the pairs of a run."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from jaxpref.data import chat, files, preferences
from jaxpref.data.files import TextPair
from jaxpref.data.pairs import Counts, TokenPair, TooLong
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import attention as attentions
from jaxpref.models import blocks, decoder, pretrained
from jaxpref.models import lora as low_rank
from jaxpref.models.decoder import Policy
from jaxpref.score import command as line
from jaxpref.training import parallel
from jaxpref.training.pairset import PairSet

SMALL: Any = {"width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "head_width": 32,
              "mlp_width": 384}  # fmt: skip

SCALE = 2.0  # of adapters: their alpha is twice their rank

Bad = Literal["error", "skip"]
"""What becomes of a row that cannot be used: an error, or left out, counted and named."""

DATE = str(chat.DATE)
"""Today, as far as chat templates know."""


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a run computes, as flags of a command line."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and the residual stream; parameters are float32."""
    precision: blocks.Precision = "highest"
    """Of matrix products. On GPU and TPU `high` and `default` round the inputs of a float32
    product, and small updates vanish or are invented."""
    attention: attentions.Kind = "xla"
    """`xla` holds all scores; `cudnn` is for GPUs and bfloat16, `splash` for TPUs."""
    remat: bool = False
    """Compute each layer's states again in the backward pass, instead of keeping them."""
    lora: int = 0
    """Rank of low-rank adapters, which are trained in place of the model; 0 trains the model. A
    learning rate for them is usually ten times larger."""
    mesh: str = ""
    """Devices, ``data=2,fsdp=4,tensor=2``: copies of the parameters, slices of them, slices of
    each layer; pairs are spread over the first two. By default one device."""


@dataclasses.dataclass(frozen=True)
class Source(Compute):
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
    """A model to look at; on a mesh its parameters lie there, and its policy spreads pairs."""

    policy: Policy
    params: PyTree
    tokenizer: Tokenizer
    revision: str | None = None  # commit of a model of the hub
    compute: Compute = Compute()
    base: str | None = None  # hash of the frozen model, where adapters are the parameters

    @property
    def digest(self) -> str:
        """Of all numbers that decide what it computes."""
        found = pretrained.hash_params(parallel.to_host(self.params))
        return f"{self.base}+{found}" if self.base else found


def subject(config: Any, *, seed: int = 0, scan: bool = True) -> Subject:
    """`open_model` of a configuration's ``model``, computed as it says."""
    names = [field.name for field in dataclasses.fields(Compute)]
    compute = Compute(**{name: getattr(config, name) for name in names})
    return open_model(config.model, compute, seed=seed, scan=scan)


@functools.lru_cache(maxsize=1)  # a run asks for it twice: for its hash, and to train
def open_model(
    model: str | None, compute: Compute = Compute(), *, seed: int = 0, scan: bool = False
) -> Subject:
    """SmolLM2-135M-Instruct by default, a folder, GGUF file or hub name, or ``small``.

    ``small`` is a decoder of 4 layers and width 128 with random weights of this seed, and SmolLM2's
    tokenizer: the experiment trains it from scratch. With ``scan=True`` a program compiles as fast
    for many layers as for one. With ``lora`` the parameters are adapters of this rank of all the
    layers' kernels, at a scale of 2, and the model is frozen.
    """
    if compute.lora < 0:
        raise ValueError(f"lora: got {compute.lora}, expected a rank, or 0 for none")
    if compute.lora and model == "small":
        raise ValueError(f"lora: got {compute.lora} with model small, expected a trained model")
    if compute.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"attention: got cudnn on {jax.default_backend()}, expected a GPU, or xla")
    mesh = parallel.parse(compute.mesh) if compute.mesh else None
    options: dict[str, Any] = {
        "compute_dtype": jnp.dtype(compute.dtype), "precision": compute.precision,
        "attention": compute.attention, "remat": compute.remat, "scan": scan,
    }  # fmt: skip
    where = functools.partial(parallel.shardings, mesh=mesh) if mesh else None
    known = model if model not in (None, "small") else "smollm2"
    found = pretrained.load(known, shardings=where, **options)
    if found.tokenizer is None:
        raise ValueError(f"model: {model} has no tokenizer.json, expected one")
    policy, params = found.policy, found.params
    if model == "small":
        config = decoder.DecoderConfig(vocab=found.config.vocab, **SMALL)
        policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(seed), **options))
        params = parallel.put(params, where(params)) if where else params
    if mesh is not None:
        policy = parallel.spread(policy, mesh, options["compute_dtype"])
    base = None
    if compute.lora:
        adapters = low_rank.draw(params, rank=compute.lora, key=jax.random.key(0))
        base = pretrained.hash_params(parallel.to_host(params))
        policy = low_rank.attach(policy, params, alpha=SCALE * compute.lora)
        params = parallel.put(adapters, parallel.replicated(mesh)) if mesh else adapters
    return Subject(policy, params, found.tokenizer, found.revision, compute, base)


def hashes(subject: Subject, pairs: PairSet) -> dict[str, Any]:
    """Of model and pairs, a hub model's commit, and the rows that were skipped: a provenance."""
    return provenance(subject, pairs.digest, pairs.skipped)


def provenance(subject: Subject, data: str, skipped: Sequence[str]) -> dict[str, Any]:
    """The same of data of any kind, by its hash."""
    found: dict[str, Any] = {"model": subject.digest, "data": data}
    found |= {"dtype": subject.compute.dtype, "precision": subject.compute.precision}
    found |= {"model_revision": subject.revision} if subject.revision else {}
    return found | {"skipped": without_folders(skipped)}


def without_folders(faults: Sequence[str]) -> list[str]:
    """Faults of rows as a provenance keeps them: a file's name, and not where it lies."""
    return [re.sub(r"^(?!tfds:).*?([^/\\]+, (?:line|row) )", r"\1", fault) for fault in faults]
