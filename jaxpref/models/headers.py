"""A GGUF header becomes a configuration: the one place that says what its fields mean.

Every field of the architecture's own is read, or known to change no formula, or has the one value
that is computed; any other is refused. What does not begin with the architecture's name, but
``general.type``, says nothing about the formula.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the
loader of llama.cpp, which decides what a field means.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpref.data.gguf_file import Gguf, read_tensor

ARCHITECTURES = {  # -> model_type of config.json; Mistral files call themselves Llama
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
ROPE_FACTORS = "rope_freqs.weight"  # a divisor for each frequency: Llama 3.1 and 3.2

READ = {  # key of GGUF, after the architecture's name -> key of config.json
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
OWN = {  # read of these architectures alone; llama.cpp knows no window of the Qwens
    "llama": _WINDOW,
    "gemma3": {
        **_WINDOW,
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
}
ROPE = ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")
HARMLESS = (  # true of the file, without a part in the formula of these architectures
    "vocab_size",  # the table's rows count
    "tensor_data_layout",
    "pooling_type",  # of embeddings, after the last hidden state
    "attention.layer_norm_epsilon",  # of another norm than theirs
    "rope.scaling.original_context_length",  # read by the kinds of scaling that are refused
    "rope.scaling.finetuned",
)
ONLY: Mapping[str, tuple[Any, ...]] = {  # the values under which the formula is the one computed
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}


def values_of(file: Gguf) -> dict[str, Any]:
    """The ``config.json`` that a header stands for.

    Args:
      file: from `jaxpref.data.gguf_file.read_gguf`.

    Returns:
      Its content, for `jaxpref.models.configs.from_json`. Llama files with a sliding window are
      Mistral's.

    Raises:
      ValueError: another architecture, or a field that would change the formula.
    """
    fields, tensors = file.fields, file.tensors
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {kind!r} is not supported, expected {known}")
    if (purpose := fields.get("general.type", "model")) != "model":
        raise ValueError(f"general.type is {purpose!r}, expected 'model'")
    own = {
        name.removeprefix(f"{kind}."): _one(value)
        for name, value in fields.items()
        if name.startswith(f"{kind}.")
    }
    read = READ | OWN.get(kind, {})
    values: dict[str, Any] = {"rope_theta": 10_000.0}  # where a file says nothing
    values |= {read[name]: value for name, value in own.items() if name in read}
    if "token_embd.weight" in tensors:
        values["vocab_size"] = tensors["token_embd.weight"].shape[0]
    _check_rest({name: x for name, x in own.items() if name not in read}, kind, values)
    if scaling := _scaling(own, file, kind):
        values["rope_scaling"] = scaling
    windowed = values.get("sliding_window", 0) != 0
    values["sliding_window"] = values["sliding_window"] if windowed else None
    family = "mistral" if kind == "llama" and windowed else ARCHITECTURES[kind]
    if kind == "gemma3":
        values["query_pre_attn_scalar"] = _score_width(values)
    return values | {"model_type": family, "tie_word_embeddings": "output.weight" not in tensors}


def _one(value: Any) -> Any:
    """A number for each layer, all the same, as that number."""
    if isinstance(value, list) and value and all(x == value[0] for x in value):
        return value[0]
    return value


def _check_rest(own: Mapping[str, Any], kind: str, values: Mapping[str, Any]) -> None:
    head = values.get("head_dim") or _head_width(values)
    only = {**ONLY, "attention.value_length": (head,), "rope.dimension_count": (head,)}
    only["rope.freq_base_swa"] = (values.get("rope_theta"),)
    for name, value in own.items():
        if name in ROPE or name in HARMLESS:
            continue
        if name not in only:
            raise ValueError(
                f"field {kind}.{name} is {_short(value)}, expected no such field: what it means is "
                "not computed"
            )
        if value not in only[name]:
            raise ValueError(
                f"field {kind}.{name} is {_short(value)}, expected {only[name][-1]}: any other "
                "changes the formula in a way that is not computed"
            )


def _head_width(values: Mapping[str, Any]) -> Any:
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return width // heads
    return None


def _score_width(values: Mapping[str, Any]) -> Any:
    """What Gemma 3's scores are divided by the root of: no field says it, llama.cpp counts layers.

    The head's width, but in the model of 27B, which has 62 layers.
    """
    largest = values.get("num_hidden_layers") == 62
    return _head_width(values) if largest else values.get("head_dim") or _head_width(values)


def _scaling(own: Mapping[str, Any], file: Gguf, kind: str) -> dict[str, Any] | None:
    """The rope settings of ``config.json``: a divisor for all frequencies, or one for each."""
    named = own.get("rope.scaling.type", "linear")
    if named not in ("linear", "none"):
        raise ValueError(
            f"field {kind}.rope.scaling.type is {_short(named)}, expected 'linear' or 'none'"
        )
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))  # newer, older key
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor >= 0:
        raise ValueError(f"the rope scaling factor is {_short(factor)}, expected more than 0")
    factor = factor or 1.0  # 0 means none
    factor = 1.0 if named == "none" else float(factor)
    if ROPE_FACTORS not in file.tensors or kind != "llama":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    factors = (read_tensor(file, ROPE_FACTORS).astype(np.float64) * factor).reshape(-1).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
    }


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
