"""The families of models as tables: what a ``config.json`` says, and what the tensors are called.

Reading and writing use the same rows. A setting that the decoder cannot compute is refused: a
wrong formula would give numbers that look right.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpref.models.weights import Layout

_LLAMA_KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_SWITCH = {"use_sliding_window": False, "layer_types": None, "max_window_layers": 28}
_BIASED = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}


class Family(NamedTuple):
    """One ``model_type`` of transformers."""

    architecture: str
    layout: Layout
    keys: Mapping[str, str]  # field of DecoderConfig -> key of config.json
    defaults: Mapping[str, Any]  # what transformers takes for an absent key
    fixed: Mapping[str, Any] = {}  # fields that no key sets
    only: Mapping[str, Any] = {}  # switches of the formula -> the one value that is computed
    rope_keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    turns_partly: bool = False  # a share of each head
    local_rope_key: str | None = None  # base of the layers that slide a window
    slides: Callable[[Mapping[str, Any], int], bool] | None = None  # a layer, of a window's family
    turns: Callable[[Mapping[str, Any], int], bool] | None = None  # a layer, where some do not


_LLAMA = Layout(
    {
        "embedding": "embed_tokens",
        "layers.*.attention_norm": "layers.*.input_layernorm",
        "layers.*.attention.query": "layers.*.self_attn.q_proj",
        "layers.*.attention.key": "layers.*.self_attn.k_proj",
        "layers.*.attention.value": "layers.*.self_attn.v_proj",
        "layers.*.attention.output": "layers.*.self_attn.o_proj",
        "layers.*.attention.query_norm": "layers.*.self_attn.q_norm",
        "layers.*.attention.key_norm": "layers.*.self_attn.k_norm",
        "layers.*.mlp_norm": "layers.*.post_attention_layernorm",
        "layers.*.mlp.gate": "layers.*.mlp.gate_proj",
        "layers.*.mlp.up": "layers.*.mlp.up_proj",
        "layers.*.mlp.down": "layers.*.mlp.down_proj",
        "norm": "norm",
        "unembedding": "lm_head",
    },
    prefix="model.",
    ignored=(".rotary_emb.inv_freq",),
)
_PHI3 = {
    "layers.*.attention.query": "layers.*.self_attn.qkv_proj",
    "layers.*.attention.key": "layers.*.self_attn.qkv_proj",
    "layers.*.attention.value": "layers.*.self_attn.qkv_proj",
    "layers.*.mlp.gate": "layers.*.mlp.gate_up_proj",
    "layers.*.mlp.up": "layers.*.mlp.gate_up_proj",
}
_AFTER = {
    "layers.*.attention_output_norm": "layers.*.post_attention_layernorm",
    "layers.*.mlp_output_norm": "layers.*.post_feedforward_layernorm",
}
_LLAMA_AFTER = _LLAMA._replace(modules={**_LLAMA.modules, **_AFTER})
_BOTH = {**_LLAMA_AFTER.modules, "layers.*.mlp_norm": "layers.*.pre_feedforward_layernorm"}
_LLAMA_BOTH = _LLAMA._replace(modules=_BOTH)
_GPT2 = Layout(
    {
        "embedding": "wte",
        "positions": "wpe",
        "layers.*.attention_norm": "h.*.ln_1",
        "layers.*.attention.query": "h.*.attn.c_attn",
        "layers.*.attention.key": "h.*.attn.c_attn",
        "layers.*.attention.value": "h.*.attn.c_attn",
        "layers.*.attention.output": "h.*.attn.c_proj",
        "layers.*.mlp_norm": "h.*.ln_2",
        "layers.*.mlp.up": "h.*.mlp.c_fc",
        "layers.*.mlp.down": "h.*.mlp.c_proj",
        "norm": "ln_f",
        "unembedding": "lm_head",
    },
    prefix="transformer.",
    input_first=True,
    fused="blocks",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
_NEOX = Layout(
    {
        "embedding": "embed_in",
        "layers.*.attention_norm": "layers.*.input_layernorm",
        "layers.*.attention.query": "layers.*.attention.query_key_value",
        "layers.*.attention.key": "layers.*.attention.query_key_value",
        "layers.*.attention.value": "layers.*.attention.query_key_value",
        "layers.*.attention.output": "layers.*.attention.dense",
        "layers.*.mlp_norm": "layers.*.post_attention_layernorm",
        "layers.*.mlp.up": "layers.*.mlp.dense_h_to_4h",
        "layers.*.mlp.down": "layers.*.mlp.dense_4h_to_h",
        "norm": "final_layer_norm",
        "unembedding": "embed_out",
    },
    prefix="gpt_neox.",
    fused="heads",
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)


_GEMMA_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_GEMMA3_KEYS = {
    **_LLAMA_KEYS,
    **_ATTENTION_BIAS,
    "activation": "hidden_activation",
    "window": "sliding_window",
    "score_width": "query_pre_attn_scalar",
    "score_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}
_GEMMA3_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_CAUSAL = {"use_bidirectional_attention": False}


def _not_last(many: int, layer: int) -> bool:
    """Whether a layer is not the last one of so many."""
    return (layer + 1) % many != 0


def _without(keys: Mapping[str, str], *fields: str) -> dict[str, str]:
    return {field: key for field, key in keys.items() if field not in fields}


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _LLAMA,
        {**_LLAMA_KEYS, **_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        _LLAMA_DEFAULTS,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA,
        _LLAMA_KEYS,
        {**_LLAMA_DEFAULTS, "sliding_window": 4096},
        slides=lambda values, layer: True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _LLAMA,
        _LLAMA_KEYS,
        {**_LLAMA_DEFAULTS, **_SWITCH},
        {"qkv_bias": True},
        slides=lambda values, layer: layer >= values["max_window_layers"],
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _LLAMA,
        {**_LLAMA_KEYS, **_ATTENTION_BIAS},
        {**_LLAMA_DEFAULTS, **_SWITCH, "head_dim": 128},
        {"query_key_norm": True},
        slides=lambda values, layer: layer >= values["max_window_layers"],
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _LLAMA,
        {**_LLAMA_KEYS, **_ATTENTION_BIAS},
        _GEMMA_DEFAULTS,
        {"norm_offset": 1.0},
        _CAUSAL,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _LLAMA_BOTH,
        _GEMMA3_KEYS,
        {**_GEMMA3_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"norm_offset": 1.0, "norms": "both"},
        _CAUSAL,
        slides=lambda values, layer: _not_last(2, layer),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _LLAMA_BOTH,
        _GEMMA3_KEYS,
        {
            **_GEMMA3_DEFAULTS,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        {"norm_offset": 1.0, "norms": "both", "query_key_norm": True},
        _CAUSAL,
        local_rope_key="rope_local_base_freq",
        slides=lambda values, layer: _not_last(values["sliding_window_pattern"], layer),
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        _LLAMA,
        {**_without(_LLAMA_KEYS, "norm_epsilon"), **_ATTENTION_BIAS, "clip_qkv": "clip_qkv"},
        _LLAMA_DEFAULTS,
        {"norm": "layer_plain", "norm_epsilon": 1e-5},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _LLAMA_AFTER,
        {**_LLAMA_KEYS, **_ATTENTION_BIAS},
        {**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5},
        {"norms": "after", "query_key_norm": "whole"},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _LLAMA._replace(modules={**_LLAMA.modules, **_PHI3}, fused="blocks"),
        _LLAMA_KEYS,
        {**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        turns_partly=True,
        slides=lambda values, layer: True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _LLAMA,
        {**_LLAMA_KEYS, **_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        {
            **_LLAMA_DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        {},
        {"use_sliding_window": False},
        turns=lambda values, layer: _not_last(values["no_rope_layer_interval"], layer),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _GPT2,
        {
            "vocab": "vocab_size",
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "mlp_width": "n_inner",
            "norm_epsilon": "layer_norm_epsilon",
            "activation": "activation_function",
            "max_positions": "n_positions",
            "tied": "tie_word_embeddings",
        },
        {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_positions": 1024,
            "tie_word_embeddings": True,
        },
        {"norm": "layer", "gated": False, "positions": "learned", **_BIASED},
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _NEOX,
        {
            **_without(_LLAMA_KEYS, "kv_heads", "head_width"),
            **_ATTENTION_BIAS,
            "norm_epsilon": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
        },
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
        },
        {"norm": "layer", "gated": False, "mlp_bias": True},
        rope_keys=("rotary_emb_base", "rotary_pct"),
        turns_partly=True,
    ),
}
