"""``config.json`` of transformers <-> `DecoderConfig`, by the tables of `families`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.models.decoder import DecoderConfig, RopeScaling
from jaxpref.models.families import FAMILIES, Family
from jaxpref.models.weights import PretrainedError

Values = Mapping[str, Any]  # the content of a config.json

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_LLAMA3 = {  # field of RopeScaling -> key
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
_NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", "clip_qkv")


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
    if found not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise PretrainedError(f"{place}: model_type {found!r} is not supported, expected {known}")
    return FAMILIES[found]


def from_json(values: Values, place: Path) -> DecoderConfig:
    """The decoder that a ``config.json`` describes.

    A sliding window changes nothing up to its own length, so `max_positions` becomes the window
    where that is shorter. Gemma's ``gelu`` means the tanh form, as in Google's code and in
    transformers 4.

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


def window_of(values: Values, place: Path) -> int | None:
    """How far back attention sees.

    Args:
      values: content of ``config.json``.
      place: the file, for messages.

    Returns:
      Length of the sliding window in tokens, None without one.
    """
    return _window({**family_of(values, place).defaults, **values})


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
    values |= {**rows.only, "model_type": family, "architectures": [rows.architecture]}
    values |= {"sliding_window": None} if "sliding_window" in rows.defaults else {}
    if config.positions == "rope":
        values[rows.rope_keys[0]] = config.rope_base
        values |= {rows.rope_keys[1]: config.rope_fraction} if family == "gpt_neox" else {}
        scaling = config.rope_scaling
        if scaling is not None:
            numbers = {key: getattr(scaling, field) for field, key in _LLAMA3.items()}
            values["rope_scaling"] = {"rope_type": "llama3", **numbers}
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
    config["kv_heads"] = config.get("kv_heads") or config["heads"]
    config["head_width"] = config.get("head_width") or config["width"] // max(config["heads"], 1)
    config["mlp_width"] = config["mlp_width"] or 4 * config["width"]
    config["activation"] = _activation(values, family)
    config["max_positions"] = min(config["max_positions"], _window(values) or math.inf)
    if values["model_type"] == "gemma":
        config["embedding_scale"] = math.sqrt(config["width"])
    if config.get("positions") != "learned":
        config |= _rope(values, family)
        rotated = int(config["head_width"] * config["rope_fraction"])
        if rotated % 2:
            raise ValueError(
                f"rotary positions turn {rotated} of a head's axes, expected an even number"
            )
    return DecoderConfig(**config)


def _fields(values: Values, family: Family) -> dict[str, Any]:
    found = {}
    for field, key in family.keys.items():
        value, kind = values.get(key), "word" if field == "activation" else "number"
        if value is None and key not in _NULLABLE:
            raise ValueError(f"key {key} is missing, expected a {kind}")
        if value is not None and not isinstance(value, str if kind == "word" else (int, float)):
            raise ValueError(f"{key} is {value!r}, expected a {kind}")
        found[field] = value
    return found


def _activation(values: Values, family: Family) -> str:
    key = family.keys["activation"]
    found, known = values[key], dict(_ACTIVATIONS)
    if values["model_type"] == "gemma":
        found, known = values.get("hidden_activation") or found, known | {"gelu": "gelu_tanh"}
    if found not in known:
        raise ValueError(f"{key} {found!r} is not supported, expected {', '.join(known)}")
    return known[found]


def _window(values: Values) -> int | None:
    slides = values["model_type"] == "mistral" or values.get("use_sliding_window")
    return values.get("sliding_window") if slides else None


def _rope(values: Values, family: Family) -> dict[str, Any]:
    base, fraction = family.rope_keys
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found = {
        "rope_base": float(rope.get("rope_theta") or values.get(base) or 10_000.0),
        "rope_fraction": rope.get("partial_rotary_factor") or values.get(fraction) or 1.0,
    }
    if values["model_type"] != "gpt_neox" and found["rope_fraction"] != 1.0:
        raise ValueError(f"{fraction} {found['rope_fraction']} is not supported, expected 1")
    if kind == "llama3":
        missing = [key for key in _LLAMA3.values() if key not in rope]
        if missing:
            raise ValueError(f"key {missing[0]} is missing in the rope parameters")
        found["rope_scaling"] = RopeScaling(**{f: rope[key] for f, key in _LLAMA3.items()})
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported, expected 'default' or 'llama3'")
    return found
