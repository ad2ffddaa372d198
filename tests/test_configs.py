"""Published configurations read as decoders, and back; what cannot be computed is refused."""

import dataclasses
from pathlib import Path

import pytest

from jaxpref.models.configs import from_json, to_json
from jaxpref.models.decoder import DecoderConfig, RopeScaling
from jaxpref.models.families import FAMILIES
from jaxpref.models.weights import PretrainedError

PLACE = Path("folder/config.json")
LLAMA = {  # Llama-3.2-1B
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
}
MISTRAL = {  # Mistral-7B-v0.1
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
PYTHIA = {  # Pythia-70m
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
OLMO = {
    "model_type": "olmo",
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "clip_qkv": 8.0,
    "tie_word_embeddings": False,
}
GEMMA = {  # gemma-2b
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
QWEN2 = {  # Qwen2-0.5B
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 24,
    "tie_word_embeddings": True,
}
QWEN3 = {  # Qwen3-0.6B
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
GEMMA3 = {  # gemma-3-270m
    "model_type": "gemma3_text",
    "_sliding_window_pattern": 6,
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_bias": False,
    "use_bidirectional_attention": False,
}
GEMMA2 = {  # gemma-2-27b
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid",
}
OLMO2 = {  # OLMo-2-1124-7B
    "model_type": "olmo2",
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PHI3 = {  # Phi-3-mini-4k-instruct
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
SMOLLM3 = {  # SmolLM3-3B
    "model_type": "smollm3",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "rope_scaling": None,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "no_rope_layer_interval": 4,
    "layer_types": ["full_attention"] * 36,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "attention_bias": False,
    "mlp_bias": False,
}
LAYER = {"norm": "layer", "gated": False, "output_bias": True, "mlp_bias": True, "qkv_bias": True}
EXPECTED = {  # vocab, width, layers, heads, kv_heads, head_width, mlp_width; the rest by name
    "llama": DecoderConfig(
        *(128256, 2048, 16, 32, 8, 64, 8192),
        max_positions=131072,
        rope_base=5e5,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
    "mistral": DecoderConfig(
        *(32000, 4096, 32, 32, 8, 128, 14336), max_positions=32768, window=4096, tied=False
    ),
    "gpt2": DecoderConfig(
        *(50257, 768, 12, 12, 12, 64, 3072),
        **LAYER,
        positions="learned",
        max_positions=1024,
        activation="gelu_tanh",
    ),
    "gpt_neox": DecoderConfig(
        *(50304, 512, 6, 8, 8, 64, 2048),
        **LAYER,
        activation="gelu",
        rope_fraction=0.25,
        parallel_residual=True,
        tied=False,
    ),
    "olmo": DecoderConfig(
        *(50304, 4096, 32, 32, 32, 128, 11008), norm="layer_plain", clip_qkv=8.0, tied=False
    ),
    "gemma": DecoderConfig(
        *(256000, 2048, 18, 8, 1, 256, 16384),
        norm_epsilon=1e-6,
        norm_offset=1.0,
        activation="gelu_tanh",
        max_positions=8192,
        embedding_scale=2048**0.5,
    ),
    "qwen2": DecoderConfig(
        *(151936, 896, 24, 14, 2, 64, 4864),
        norm_epsilon=1e-6,
        max_positions=131072,
        rope_base=1e6,
        qkv_bias=True,
    ),
    "qwen3": DecoderConfig(
        *(151936, 1024, 28, 16, 8, 128, 3072),
        norm_epsilon=1e-6,
        max_positions=40960,
        rope_base=1e6,
        query_key_norm=True,
    ),
    "gemma3_text": DecoderConfig(
        *(262144, 640, 18, 4, 1, 256, 2048),
        norm_epsilon=1e-6,
        norm_offset=1.0,
        norms="both",
        activation="gelu_tanh",
        max_positions=32768,
        rope_base=1e6,
        local_rope_base=1e4,
        window=512,
        sliding=(*[True] * 5, False) * 3,
        query_key_norm=True,
        embedding_scale=640**0.5,
    ),
    "gemma2": DecoderConfig(
        *(256000, 4608, 46, 32, 16, 128, 36864),
        norm_epsilon=1e-6,
        norm_offset=1.0,
        norms="both",
        activation="gelu_tanh",
        max_positions=8192,
        window=4096,
        sliding=(True, False) * 23,
        score_width=144.0,
        score_cap=50.0,
        logit_cap=30.0,
        embedding_scale=4608**0.5,
    ),
    "olmo2": DecoderConfig(
        *(100352, 4096, 32, 32, 32, 128, 11008),
        norm_epsilon=1e-6,
        norms="after",
        max_positions=4096,
        rope_base=5e5,
        query_key_norm="whole",
        tied=False,
    ),
    "phi3": DecoderConfig(
        *(32064, 3072, 32, 32, 32, 96, 8192), max_positions=4096, window=2047, tied=False
    ),
    "smollm3": DecoderConfig(
        *(128256, 2048, 36, 16, 4, 128, 11008),
        norm_epsilon=1e-6,
        max_positions=65536,
        rope_base=5e6,
        rotary=(True, True, True, False) * 9,
    ),
}
PUBLISHED = {
    values["model_type"]: values
    for values in (
        *(LLAMA, MISTRAL, GPT2, PYTHIA, OLMO, OLMO2, GEMMA, GEMMA2, GEMMA3),
        *(QWEN2, QWEN3, PHI3, SMOLLM3),
    )
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_configuration_is_this_decoder(family):
    assert from_json(PUBLISHED[family], PLACE) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_write_reads_as_the_same_decoder(family):
    written = to_json(EXPECTED[family], family)
    assert written["model_type"] == family
    assert from_json(written, PLACE) == EXPECTED[family]


def test_transformers_5_moved_the_rotary_settings():
    moved = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    moved["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}
    assert from_json(moved, PLACE) == EXPECTED["llama"]
    moved = {k: v for k, v in PYTHIA.items() if not k.startswith("rotary")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    assert from_json({**moved, "rope_parameters": rope}, PLACE) == EXPECTED["gpt_neox"]


def test_absent_settings_mean_what_transformers_means():
    early = {"num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias"}
    found = from_json({k: v for k, v in LLAMA.items() if k not in early}, PLACE)
    assert (found.kv_heads, found.head_width) == (32, 64)
    assert not found.tied
    no_window = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    assert from_json(no_window, PLACE).window == 4096
    assert from_json({**MISTRAL, "sliding_window": None}, PLACE).window is None


def test_biases_are_read_where_the_family_has_a_switch():
    found = from_json({**LLAMA, "attention_bias": True, "mlp_bias": True}, PLACE)
    assert found.qkv_bias
    assert found.output_bias
    assert found.mlp_bias
    found = from_json({**PYTHIA, "attention_bias": False}, PLACE)
    assert not found.qkv_bias
    assert not found.output_bias
    assert found.mlp_bias


def test_gemmas_newer_key_for_the_activation_wins():
    new = {**GEMMA, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "silu"}
    assert from_json(new, PLACE) == EXPECTED["gemma"]


def test_newer_llamas_and_qwens_are_older_ones_of_other_sizes():
    scaling = {**LLAMA["rope_scaling"], "factor": 8.0}
    llama31 = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    llama31 |= {"head_dim": None, "rope_scaling": scaling, "tie_word_embeddings": False}  # 8B
    assert from_json(llama31, PLACE) == DecoderConfig(
        *(128256, 4096, 32, 32, 8, 128, 14336),
        max_positions=131072,
        rope_base=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        tied=False,
    )
    qwen25 = {**QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    qwen25 |= {"num_attention_heads": 28, "num_key_value_heads": 4, "use_mrope": False}  # 7B
    qwen25 |= {"max_window_layers": 28, "vocab_size": 152064, "tie_word_embeddings": False}
    assert from_json(qwen25, PLACE) == DecoderConfig(
        *(152064, 3584, 28, 28, 4, 128, 18944),
        norm_epsilon=1e-6,
        max_positions=131072,
        rope_base=1e6,
        qkv_bias=True,
        tied=False,
    )


def test_the_window_counts_where_the_model_slides_it():
    sliding = {**QWEN2, "use_sliding_window": True, "sliding_window": 64}
    assert from_json(sliding, PLACE) == EXPECTED["qwen2"]  # no layer beyond the last one counted
    found = from_json({**sliding, "max_window_layers": 22}, PLACE)
    flags = (*[False] * 22, True, True)
    assert found == dataclasses.replace(EXPECTED["qwen2"], window=64, sliding=flags)
    assert from_json(to_json(found, "qwen2"), PLACE) == found
    every = from_json({**sliding, "layer_types": ["sliding_attention"] * 24}, PLACE)
    assert every == dataclasses.replace(EXPECTED["qwen2"], window=64)
    # transformers' Llama has no window, whatever its file says.
    assert (
        from_json({**LLAMA, "use_sliding_window": True, "sliding_window": 8}, PLACE)
        == (EXPECTED["llama"])
    )


def test_layers_follow_a_pattern_where_no_list_says_it():
    plain = {k: v for k, v in GEMMA3.items() if k != "layer_types"}
    assert from_json(plain, PLACE) == EXPECTED["gemma3_text"]
    found = from_json({**plain, "sliding_window_pattern": 3}, PLACE)
    assert found.sliding == (True, True, False) * 6
    plain = {k: v for k, v in SMOLLM3.items() if k != "no_rope_layers"}
    assert from_json(plain, PLACE) == EXPECTED["smollm3"]
    found = from_json({**plain, "no_rope_layer_interval": 40}, PLACE)
    assert found.rotary is None


def test_both_rotary_bases_of_gemma_3_are_read_where_either_transformers_has_them():
    moved = {k: v for k, v in GEMMA3.items() if not k.startswith("rope")}
    assert from_json(moved, PLACE) == EXPECTED["gemma3_text"]
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    local = {"rope_type": "default", "rope_theta": 2e4}
    expected = dataclasses.replace(
        *(EXPECTED["gemma3_text"],),
        rope_base=5e5,
        local_rope_base=2e4,
        rope_factors=(8.0,) * 128,
    )
    nested = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    assert from_json({**moved, **nested}, PLACE) == expected
    assert from_json(to_json(expected, "gemma3_text"), PLACE) == expected


ROPE = "rope_scaling"
FACTORS = [1.0 + i for i in range(32)]
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}
LONG |= {"attention_factor": 1.0}


def test_factors_of_the_frequencies_are_read_and_written():
    plain = dataclasses.replace(EXPECTED["llama"], rope_scaling=None)
    for rope, factors in (
        ({"rope_type": "linear", "factor": 4.0}, [4.0] * 32),
        ({"type": "linear", "factor": 1}, None),
        (LONG, FACTORS),
    ):
        expected = dataclasses.replace(plain, rope_factors=factors and tuple(factors))
        assert from_json({**LLAMA, ROPE: rope}, PLACE) == expected
        assert from_json(to_json(expected, "llama"), PLACE) == expected


@pytest.mark.parametrize(
    ("published", "change", "message"),
    [
        (LLAMA, {"model_type": "bert"}, "model_type 'bert' is not supported, expected llama, "),
        (LLAMA, {"model_type": None}, "model_type None is not supported"),
        (LLAMA, {"hidden_act": "relu"}, "hidden_act 'relu' is not supported, expected silu"),
        (LLAMA, {"model_type": ["llama"]}, "model_type .'llama'. is not supported"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing, expected a whole number"),
        (LLAMA, {"hidden_size": True}, "hidden_size is True, expected a whole number"),
        (LLAMA, {"hidden_size": 24.5}, "hidden_size is 24.5, expected a whole number"),
        (LLAMA, {"hidden_size": 1e300}, "hidden_size is 1e.300, expected a whole number"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        (LLAMA, {"rope_theta": -1.0}, "rope_base: got -1.0, expected more than 0"),
        (LLAMA, {"intermediate_size": None}, "key intermediate_size is missing"),
        (LLAMA, {"hidden_size": "wide"}, "hidden_size is 'wide', expected a whole number"),
        (LLAMA, {"num_attention_heads": 0, "head_dim": None}, "heads: got 0, expected at least 1"),
        (LLAMA, {"num_key_value_heads": 5}, "kv_heads: got 5, expected a divisor of heads"),
        (LLAMA, {ROPE: {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported"),
        (LLAMA, {ROPE: {"type": "linear", "factor": 0}}, "rope factor 0.0, expected more than 0"),
        (LLAMA, {ROPE: "linear"}, "rope parameters are 'linear', expected one group"),
        (LLAMA, {ROPE: {"full_attention": {"rope_type": "default"}}}, "expected one group"),
        (LLAMA, {ROPE: {**LONG, "long_factor": [2.0] * 32}}, "depend on a text's length"),
        (LLAMA, {ROPE: {**LONG, "attention_factor": 1.2}}, "depend on a text's length"),
        (
            LLAMA,
            {ROPE: {**LONG, "short_factor": [1.5], "long_factor": [1.5]}},
            "got 1, expected 32",
        ),
        (LLAMA, {ROPE: {"rope_type": "llama3"}}, "key factor is missing in the rope parameters"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True is not"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        (GEMMA, {"use_bidirectional_attention": True}, "bidirectional_attention True is not"),
        (GEMMA2, {"final_logit_softcapping": 0.0}, "logit_cap: got 0.0, expected more than 0"),
        (GEMMA2, {"final_logit_softcapping": "no"}, "final_logit_softcapping is 'no', expected"),
        (GEMMA2, {"use_bidirectional_attention": True}, "bidirectional_attention True is not"),
        (GEMMA3, {"sliding_window": None}, "key sliding_window is missing, expected a whole"),
        (GEMMA3, {"layer_types": ["full_attention"]}, "expected a list of 18, one a layer"),
        (GEMMA3, {"layer_types": ["linear_attention"] * 18}, "layer_types has 'linear_attention'"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type 'linear' of sliding_attention is not supported",
        ),
        (GEMMA3, {"layer_types": None, "sliding_window_pattern": 0}, "expected at least 1"),
        (GEMMA3, {"num_hidden_layers": 10**9}, "1000000000 layers, expected at most 10000"),
        (GEMMA3, {"attn_logit_softcapping": -5.0}, "score_cap: got -5.0, expected more than 0"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types has 'full_attention'"),
        (SMOLLM3, {"no_rope_layers": [2] * 36}, "no_rope_layers has 2, expected 0 or 1"),
        (SMOLLM3, {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        (PHI3, {ROPE: {**LONG, "long_factor": [2.0] * 32}}, "depend on a text's length"),
        (OLMO2, {"hidden_act": "relu"}, "hidden_act 'relu' is not supported, expected silu"),
        (PYTHIA, {"rotary_pct": 0.02}, "turn 1 of a head's axes, expected an even number"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(published, change, message):
    with pytest.raises(PretrainedError, match=message) as error:
        from_json({**published, **change}, PLACE)
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"query_key_norm": True}, "query_key_norm is True, expected False"),
        ("llama", {"qkv_bias": True}, "qkv_bias is True, expected False"),
        ("llama", {"norm": "layer"}, "norm is 'layer', expected 'rms'"),
        ("gpt2", {"kv_heads": 4}, "kv_heads is 4, expected 12"),
        ("gpt2", {"head_width": 32}, "head_width is 32, expected 64"),
        ("gemma", {"embedding_scale": 1.0}, "embedding_scale is 1.0"),
        ("mistral", {"mlp_bias": True}, "mlp_bias is True, expected False"),
        ("olmo2", {"norms": "both"}, "norms is 'both', expected 'after'"),
        ("mistral", {"sliding": (True, False) * 16}, "sliding is .*, expected None"),
        ("llama", {"window": 8}, "window is 8, expected None"),
        ("gemma3_text", {"local_rope_base": None}, "local_rope_base is None, expected 1000000"),
        ("qwen2", {"rope_fraction": 0.5}, "rope_fraction is 0.5, expected 1.0"),
    ],
)
def test_a_family_that_cannot_hold_the_decoder_is_refused(family, change, message):
    with pytest.raises(PretrainedError, match=message):
        to_json(dataclasses.replace(EXPECTED[family], **change), family)


def test_an_unknown_family_is_refused():
    with pytest.raises(PretrainedError, match="model_type 'bert' is not supported"):
        to_json(EXPECTED["llama"], "bert")
