"""What a ``config.json`` says in several settings at once: rotary positions, kinds of layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpref.models.decoder import DecoderConfig, RopeScaling, kinds
from jaxpref.models.families import Family

Values = Mapping[str, Any]  # the content of a config.json

SLIDING, FULL = "sliding_attention", "full_attention"
_LLAMA3 = {  # field of RopeScaling -> key
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_LARGEST = 2**31  # a number beyond it is a damaged file
_PATTERNS = {"max_window_layers": 0, "sliding_window_pattern": 1, "no_rope_layer_interval": 1}
_MOST_LAYERS = 10_000  # of a family whose layers differ

# One value


def typed(key: str, value: Any, kind: type) -> Any:
    """A value of this type; a finite number, for a number.

    Args:
      key: its name.
      value: as JSON gave it.
      kind: bool, int, float or str.

    Returns:
      The value.

    Raises:
      ValueError: one of another type; names the key.
    """
    right = isinstance(value, kind) if kind in (bool, str) else _is_number(value)
    if not right or (kind is int and value != int(value)):
        raise ValueError(f"{key} is {short(value)}, expected {word(kind)}")
    return kind(value)


def word(kind: type) -> str:
    """A type in words."""
    return _WORDS[kind]


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < _LARGEST


# Kinds of layers


def read_layers(values: Values, family: Family, layers: int) -> dict[str, Any]:
    """The fields ``window``, ``sliding`` and ``rotary`` of a decoder.

    Args:
      values: content of ``config.json``, with the family's defaults.
      family: its family.
      layers: number of them.

    Returns:
      The fields.

    Raises:
      ValueError: a setting that the decoder cannot compute.
    """
    found: dict[str, Any] = {"window": _window(values, family)}
    if (family.slides or family.turns) and layers > _MOST_LAYERS:
        raise ValueError(f"{layers} layers, expected at most {_MOST_LAYERS}")
    for key, least in _PATTERNS.items():
        if key in family.defaults and typed(key, values[key], int) < least:
            raise ValueError(f"{key} is {short(values[key])}, expected at least {least}")
    if found["window"] is not None and family.slides:
        sliding = _sliding(values, family, layers)
        found["sliding"] = None if all(sliding) else sliding
        if not any(sliding) and "window" not in family.keys:
            found |= {"window": None, "sliding": None}
    if family.turns:
        turning = _flags(values, family, layers)
        found["rotary"] = None if all(turning) else turning
    return found


def write_layers(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """What `read_layers` reads.

    Args:
      config: the decoder.
      family: of the file.

    Returns:
      Keys and values of ``config.json``.
    """
    found: dict[str, Any] = {}
    if family.slides:
        found["sliding_window"] = config.window
    if "use_sliding_window" in family.defaults:
        found["use_sliding_window"] = config.window is not None
    if "layer_types" in family.defaults:
        found["layer_types"] = [SLIDING if kind.slides else FULL for kind in kinds(config)]
    if family.turns:
        found["no_rope_layers"] = [int(kind.turns) for kind in kinds(config)]
    return found


def _window(values: Values, family: Family) -> int | None:
    switch, window = "use_sliding_window", values.get("sliding_window")
    off = switch in family.defaults and not typed(switch, values[switch], bool)
    if family.slides is None or off or window is None:
        return None
    return typed("sliding_window", window, int)


def _sliding(values: Values, family: Family, layers: int) -> tuple[bool, ...]:
    assert family.slides is not None
    types = values.get("layer_types")
    if types is None:
        return tuple(family.slides(values, layer) for layer in range(layers))
    _check_length("layer_types", types, layers)
    known = (SLIDING, FULL) if "layer_types" in family.defaults else (SLIDING,)
    if wrong := [kind for kind in types if kind not in known]:
        raise ValueError(
            f"layer_types has {short(wrong[0])}, expected {' or '.join(map(repr, known))}"
        )
    return tuple(kind == SLIDING for kind in types)


def _flags(values: Values, family: Family, layers: int) -> tuple[bool, ...]:
    """Whether each layer turns heads; the key says the contrary of its numbers."""
    assert family.turns is not None
    flags = values.get("no_rope_layers")
    if flags is None:
        return tuple(family.turns(values, layer) for layer in range(layers))
    _check_length("no_rope_layers", flags, layers)
    if wrong := [flag for flag in flags if flag not in (0, 1)]:
        raise ValueError(f"no_rope_layers has {short(wrong[0])}, expected 0 or 1")
    return tuple(map(bool, flags))


def _check_length(key: str, found: Any, layers: int) -> None:
    if not isinstance(found, list) or len(found) != layers:
        raise ValueError(f"{key} is {short(found)}, expected a list of {layers}, one a layer")


# Rotary positions


def read_rope(values: Values, family: Family, head_width: int) -> dict[str, Any]:
    """The fields of a decoder that begin with ``rope``, and ``local_rope_base``.

    Args:
      values: content of ``config.json``, with the family's defaults.
      family: its family.
      head_width: of the decoder.

    Returns:
      The fields.

    Raises:
      ValueError: a setting that the decoder cannot compute.
    """
    base, fraction = family.rope_keys
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    found: dict[str, Any] = {}
    if family.local_rope_key is not None:
        rope, found["local_rope_base"] = _apart(values, rope, family.local_rope_key)
    if not isinstance(rope, Mapping) or any(isinstance(x, Mapping) for x in rope.values()):
        raise ValueError(f"rope parameters are {short(rope)}, expected one group of settings")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    bases = (rope.get("rope_theta"), values.get(base), 10_000.0)
    shares = (rope.get("partial_rotary_factor"), values.get(fraction), 1.0)
    found["rope_base"] = typed(base, next(x for x in bases if x is not None), float)
    found["rope_fraction"] = typed(fraction, next(x for x in shares if x is not None), float)
    if not family.turns_partly and found["rope_fraction"] != 1.0:
        raise ValueError(f"{fraction} {found['rope_fraction']} is not supported, expected 1")
    rotated = int(head_width * found["rope_fraction"])
    if rotated % 2:
        raise ValueError(
            f"rotary positions turn {rotated} of a head's axes, expected an even number"
        )
    if kind == "llama3":
        numbers = {
            field: typed(key, _setting(rope, key), RopeScaling.__annotations__[field])
            for field, key in _LLAMA3.items()
        }
        found["rope_scaling"] = RopeScaling(**numbers)
    elif kind == "linear":
        factor = typed("factor", _setting(rope, "factor"), float)
        found["rope_factors"] = _factors([factor] * (rotated // 2))
    elif kind == "longrope":
        found["rope_factors"] = _longrope(rope)
    elif kind != "default":
        known = "'default', 'linear', 'llama3' or 'longrope'"
        raise ValueError(f"rope_type {short(kind)} is not supported, expected {known}")
    return found


def write_rope(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """What `read_rope` reads.

    Args:
      config: the decoder.
      family: of the file.

    Returns:
      Keys and values of ``config.json``, as transformers 4 and 5 read them.
    """
    base, fraction = family.rope_keys
    found: dict[str, Any] = {base: config.rope_base}
    if family.local_rope_key is not None:
        found[family.local_rope_key] = config.local_rope_base or config.rope_base
    if family.turns_partly:
        found[fraction] = config.rope_fraction
    if scaling := _scaling(config):
        found["rope_scaling"] = scaling
    return found


def _apart(values: Values, rope: Any, key: str) -> tuple[Any, float]:
    """The settings of layers that see all, and the base of those that slide a window."""
    local: Any = {}
    if isinstance(rope, Mapping) and (SLIDING in rope or FULL in rope):
        local, rope = rope.get(SLIDING) or {}, rope.get(FULL) or {}
        if isinstance(rope, Mapping):
            rope = {**rope, **(values.get("rope_scaling") or {})}
    if not isinstance(local, Mapping):
        raise ValueError(f"rope parameters of {SLIDING} are {short(local)}, expected settings")
    if (kind := local.get("rope_type") or "default") != "default":
        raise ValueError(f"rope_type {short(kind)} of {SLIDING} is not supported, expected default")
    return rope, typed(key, local.get("rope_theta") or values.get(key), float)


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


def _longrope(rope: Values) -> tuple[float, ...] | None:
    """Factors that are the same for short and for long texts; else a text's length would decide."""
    short_, long, scale = (
        _setting(rope, key) for key in ("short_factor", "long_factor", "attention_factor")
    )
    if short_ != long or scale != 1 or not isinstance(short_, list):
        raise ValueError(
            "rope_type 'longrope' is not supported where its factors depend on a text's length, "
            "expected the same short_factor and long_factor, and attention_factor 1"
        )
    return _factors([typed("short_factor", x, float) for x in short_])


def _factors(factors: Sequence[float]) -> tuple[float, ...] | None:
    if any(factor <= 0 for factor in factors):
        raise ValueError(f"rope factor {min(factors)}, expected more than 0")
    return None if set(factors) == {1.0} else tuple(factors)


def _setting(rope: Values, key: str) -> Any:
    if key not in rope:
        raise ValueError(f"key {key} is missing in the rope parameters")
    return rope[key]
