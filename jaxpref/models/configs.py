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
_KINDS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(DecoderConfig)}
_KINDS |= {"activation": str, "clip_qkv": float}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_SWITCHED = ("qwen2", "qwen3")  # whose windows slide only where `use_sliding_window` says so
_LARGEST = 2**31  # a number beyond it is a damaged file


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
            f"{place}: model_type {_short(found)} is not supported, expected {known}"
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
    values |= {**rows.only, "model_type": family, "architectures": [rows.architecture]}
    if "sliding_window" in rows.defaults:
        values["sliding_window"] = config.window
    elif family in _SWITCHED and config.window is not None:
        values |= {"sliding_window": config.window, "use_sliding_window": True}
    if config.positions == "rope":
        values[rows.rope_keys[0]] = config.rope_base
        values |= {rows.rope_keys[1]: config.rope_fraction} if family == "gpt_neox" else {}
        if scaling := _scaling(config):
            values["rope_scaling"] = scaling
    _check_holds(config, from_json(values, Path(family)), family)
    return values


def _scaling(config: DecoderConfig) -> dict[str, Any] | None:
    """The rope settings beside base and fraction."""
    scaling, factors = config.rope_scaling, config.rope_factors
    if scaling is not None:
        numbers = {key: getattr(scaling, field) for field, key in _LLAMA3.items()}
        return {"rope_type": "llama3", **numbers}
    if factors is None:
        return None
    if len(set(factors)) == 1:
        return {"rope_type": "linear", "factor": factors[0]}
    return {
        "rope_type": "longrope",
        "short_factor": list(factors),
        "long_factor": list(factors),
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_positions,
    }


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
    config["window"] = _window(values)
    if values["model_type"] == "gemma":
        config["embedding_scale"] = math.sqrt(config["width"])
    if config.get("positions") != "learned":
        config |= _rope(values, family, config["head_width"])
    return DecoderConfig(**config)


def _fields(values: Values, family: Family) -> dict[str, Any]:
    found = {}
    for field, key in family.keys.items():
        value = values.get(key)
        if value is None and key not in _NULLABLE:
            raise ValueError(f"key {key} is missing, expected {_WORDS[_KINDS[field]]}")
        found[field] = value if value is None else _typed(key, value, _KINDS[field])
    return found


def _typed(key: str, value: Any, kind: type) -> Any:
    """A value of this type (a finite number, for a number), or an error that names its key."""
    right = isinstance(value, kind) if kind in (bool, str) else _is_number(value)
    if not right or (kind is int and value != int(value)):
        raise ValueError(f"{key} is {_short(value)}, expected {_WORDS[kind]}")
    return kind(value)


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < _LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _activation(values: Values, family: Family) -> str:
    key = family.keys["activation"]
    found, known = values[key], dict(_ACTIVATIONS)
    if values["model_type"] == "gemma":
        found, known = values.get("hidden_activation") or found, known | {"gelu": "gelu_tanh"}
    if not isinstance(found, str) or found not in known:
        raise ValueError(f"{key} {found!r} is not supported, expected {', '.join(known)}")
    return known[found]


def _window(values: Values) -> int | None:
    kind = values["model_type"]
    slides = kind == "mistral" or (kind in _SWITCHED and values.get("use_sliding_window"))
    window = values.get("sliding_window") if slides else None
    return None if window is None else _typed("sliding_window", window, int)


def _rope(values: Values, family: Family, head_width: int) -> dict[str, Any]:
    base, fraction = family.rope_keys
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(x, Mapping) for x in rope.values()):
        raise ValueError(f"rope parameters are {_short(rope)}, expected one group of settings")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    bases = (rope.get("rope_theta"), values.get(base), 10_000.0)
    shares = (rope.get("partial_rotary_factor"), values.get(fraction), 1.0)
    found: dict[str, Any] = {
        "rope_base": _typed(base, next(x for x in bases if x is not None), float),
        "rope_fraction": _typed(fraction, next(x for x in shares if x is not None), float),
    }
    if values["model_type"] != "gpt_neox" and found["rope_fraction"] != 1.0:
        raise ValueError(f"{fraction} {found['rope_fraction']} is not supported, expected 1")
    rotated = int(head_width * found["rope_fraction"])
    if rotated % 2:
        raise ValueError(
            f"rotary positions turn {rotated} of a head's axes, expected an even number"
        )
    if kind == "llama3":
        numbers = {
            field: _typed(key, _setting(rope, key), RopeScaling.__annotations__[field])
            for field, key in _LLAMA3.items()
        }
        found["rope_scaling"] = RopeScaling(**numbers)
    elif kind == "linear":
        factor = _typed("factor", _setting(rope, "factor"), float)
        found["rope_factors"] = _factors([factor] * (rotated // 2))
    elif kind == "longrope":
        found["rope_factors"] = _longrope(rope)
    elif kind != "default":
        known = "'default', 'linear', 'llama3' or 'longrope'"
        raise ValueError(f"rope_type {_short(kind)} is not supported, expected {known}")
    return found


def _longrope(rope: Values) -> tuple[float, ...] | None:
    """Factors that are the same for short and for long texts; else a text's length would decide."""
    short, long, scale = (
        _setting(rope, key) for key in ("short_factor", "long_factor", "attention_factor")
    )
    if short != long or scale != 1 or not isinstance(short, list):
        raise ValueError(
            "rope_type 'longrope' is not supported where its factors depend on a text's length, "
            "expected the same short_factor and long_factor, and attention_factor 1"
        )
    return _factors([_typed("short_factor", x, float) for x in short])


def _factors(factors: list[float]) -> tuple[float, ...] | None:
    if any(factor <= 0 for factor in factors):
        raise ValueError(f"rope factor {min(factors)}, expected more than 0")
    return None if set(factors) == {1.0} else tuple(factors)


def _setting(rope: Values, key: str) -> Any:
    if key not in rope:
        raise ValueError(f"key {key} is missing in the rope parameters")
    return rope[key]
