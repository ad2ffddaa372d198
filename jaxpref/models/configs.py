"""``config.json`` of transformers <-> `DecoderConfig`, by the tables of `families`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.families import FAMILIES, Family
from jaxpref.models.settings import (
    Values,
    read_layers,
    read_rope,
    short,
    typed,
    word,
    write_layers,
    write_rope,
)
from jaxpref.models.weights import PretrainedError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_CAPS = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
_NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", "clip_qkv", *_CAPS.values())
_KINDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}
_KINDS |= {"activation": str, "window": int, "clip_qkv": float, "score_width": float}
_KINDS |= dict.fromkeys(_CAPS, float)
_GEMMAS = ("gemma", "gemma2", "gemma3_text")  # whose embedded tokens are scaled


def family_of(values: Values, place: Path) -> Family:
    """The family of a configuration, by its ``model_type``.

    Args:
      values: content of ``config.json``.
      place: the file, for messages.

    Returns:
      Its row in `jaxpref.models.families.FAMILIES`.

    Raises:
      PretrainedError: a family that the decoder does not compute.
    """
    found = values.get("model_type")
    if not isinstance(found, str) or found not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise PretrainedError(
            f"{place}: model_type {short(found)} is not supported, expected {known}"
        )
    return FAMILIES[found]


def from_json(values: Values, place: Path) -> DecoderConfig:
    """The decoder that a ``config.json`` describes.

    Gemma's ``gelu`` means the tanh form, as in Google's code and in transformers 4. Longrope
    is read where its long and short factors are the same, as `to_json` writes `rope_factors`.

    Args:
      values: content of ``config.json``, of transformers 4 or 5.
      place: the file, for messages.

    Returns:
      The decoder's configuration.

    Raises:
      PretrainedError: an unknown family, a missing key, or a setting that the decoder cannot
        compute.
    """
    family = family_of(values, place)
    try:
        return _config({**family.defaults, **values}, family)
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"{place}: {error}") from None


def to_json(config: DecoderConfig, family: str) -> dict[str, Any]:
    """The ``config.json`` that transformers 4 and 5 read as this decoder.

    Args:
      config: the decoder.
      family: a key of `jaxpref.models.families.FAMILIES`.

    Returns:
      The content of the file.

    Raises:
      PretrainedError: an unknown family, or one that cannot hold this decoder; names the field.
    """
    rows = family_of({"model_type": family}, Path("family"))
    values = {key: getattr(config, field) for field, key in rows.keys.items()}
    usual = rows.defaults[rows.keys["activation"]]  # of several names for one formula, this one
    names = _ACTIVATION_NAMES | {_ACTIVATIONS[usual]: usual}
    values[rows.keys["activation"]] = names[config.activation]
    if "score_width" in rows.keys:
        width = config.score_width or config.head_width
        values[rows.keys["score_width"]] = int(width) if width == int(width) else width
    values |= {**rows.only, "model_type": family, "architectures": [rows.architecture]}
    values |= write_layers(config, rows)
    if config.positions == "rope":
        values |= write_rope(config, rows)
    _check_holds(config, from_json(values, Path(family)), family)
    return values


def _check_holds(config: DecoderConfig, reread: DecoderConfig, family: str) -> None:
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(reread, field.name)
        if ours != theirs:
            raise PretrainedError(
                f"family {family} cannot hold this decoder: {field.name} is {ours!r}, "
                f"expected {theirs!r}"
            )


def _config(values: Values, family: Family) -> DecoderConfig:
    for key, value in {**family.only, "quantization_config": None}.items():
        if (found := values.get(key)) is not None and found != value:
            raise ValueError(f"{key} {found!r} is not supported, expected {value!r}")
    config = _fields(values, family) | dict(family.fixed)
    heads, width = max(config["heads"], 1), config["width"]
    usual = {"kv_heads": heads, "head_width": width // heads, "mlp_width": 4 * width}
    config |= {name: value for name, value in usual.items() if config.get(name) is None}
    config["activation"] = _activation(values, family)
    config |= read_layers(values, family, config["layers"])
    if config.get("score_width") == config["head_width"]:
        config["score_width"] = None
    if values["model_type"] in _GEMMAS:
        config["embedding_scale"] = math.sqrt(config["width"])
    if config.get("positions") != "learned":
        config |= read_rope(values, family, config["head_width"])
    return DecoderConfig(**config)


def _fields(values: Values, family: Family) -> dict[str, Any]:
    found = {}
    for field, key in family.keys.items():
        value = values.get(key)
        if value is None and key not in _NULLABLE:
            raise ValueError(f"key {key} is missing, expected {word(_KINDS[field])}")
        found[field] = value if value is None else typed(key, value, _KINDS[field])
    return found


def _activation(values: Values, family: Family) -> str:
    key = family.keys["activation"]
    found, known = values[key], dict(_ACTIVATIONS)
    if values["model_type"] == "gemma":
        found, known = values.get("hidden_activation") or found, known | {"gelu": "gelu_tanh"}
    if not isinstance(found, str) or found not in known:
        raise ValueError(f"{key} {found!r} is not supported, expected {', '.join(known)}")
    return known[found]
