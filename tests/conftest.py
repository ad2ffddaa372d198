"""What several test files share."""

import multiprocessing
from multiprocessing import forkserver
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clean():
    """Starts processes from one that has imported the library and run nothing: new, and soon there.

    They have the settings of a new interpreter, not those of the tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.no_vs_never.__main__", "jaxpref.training.loop"])
    with pytest.MonkeyPatch.context() as patch:
        # They run the same small programs, one process after the other.
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def as_optax_needs_it():
    """Its Adam mixes integers and floats; for ``pytestmark``, which comes before other fixtures."""
    import jax

    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def any_size(monkeypatch):
    """Worlds that are made by hand are small, and a verdict is spoken of them all the same."""
    from experiments.protocol import tables

    monkeypatch.setattr(tables, "SEEDS", 1)
    monkeypatch.setattr(tables, "PAIRS", 1)


TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ANSWERS = ("No", "Never", "Maybe", "Yes", "Yeah", "Sure", "Certainly")  # single tokens


def small_tokenizer():
    """Byte-level words of the shipped texts: a real tokenizer's lengths at a small vocabulary.

    What a test computes with SmolLM2's 49,152 tokens is mostly their logits.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from jaxpref.data import preferences, prompts, sentiment, statements
    from jaxpref.data.tokenizer import Tokenizer

    texts = [text for pair in preferences.load() for text in pair[:3]]
    texts += [row.question for row in statements.load()] + [row.text for row in prompts.load()]
    for kind in ("short", "long"):
        texts += [text for pair in sentiment.pairs(kind, 200, seed=0) for text in pair[:3]]
    texts += [space + word for word in ANSWERS for space in ("", " ")] * 50
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Tokenizer(backend, {"eos_token": "<|end|>"}, False, TEMPLATE)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of one layer and a small vocabulary."""
    import jax
    from flax import nnx

    from jaxpref.models import decoder, pretrained

    tokenizer = small_tokenizer()
    sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32}
    config = decoder.DecoderConfig(vocab=tokenizer.vocab, **sizes)
    _, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0)))
    # The words must differ in probability: their unembeddings get norms of about 2.4.
    params["embedding"] = jax.tree.map(lambda x: 30 * x, params["embedding"])
    folder = tmp_path_factory.mktemp("tiny")
    pretrained.save(folder, params, config, family="llama", tokenizer=tokenizer)
    return folder
