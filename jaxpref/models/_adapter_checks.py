"""What a folder of PEFT says and holds, and what of it is refused: for `adapters`."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.paths import Shape
from jaxpref.models.weights import PretrainedError, Source

_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight")
_READ = {  # settings that `load` reads, or that decide nothing about given numbers
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "fan_in_fan_out", "init_lora_weights", "base_model_name_or_path"),
    *("revision", "task_type", "auto_mapping", "inference_mode", "peft_version", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
    *("megatron_core", "runtime_config"),
}
# Ways to start that leave the base as it was; after the others the file needs another base.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_USUAL = {"rank": "r", "alpha": "lora_alpha"}


def tensor_name(module: str, side: str) -> str:
    """Of an adapter's ``A`` or ``B``."""
    return f"{_PREFIX}{module}.lora_{side}.weight"


def tail(module: str) -> str:
    """What follows the number of the layer."""
    return re.sub(r"^.*?\.\d+\.", "", module)


def check_settings(values: Mapping[str, Any], place: Path) -> None:
    """Raises for what would change the formula, what is not known here among it."""
    expected = {"peft_type": "LORA", "bias": "none"}
    for key, right in expected.items():
        if (found := values.get(key, right)) != right:
            raise PretrainedError(f"{place}: {key} is {found!r}, expected {right!r}")
    start = values.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _STARTS:
        raise PretrainedError(
            f"{place}: init_lora_weights is {start!r}, which changes the base model too, expected"
            " a file that PEFT converted to one of the unchanged base"
        )
    for key, value in values.items():
        if key not in _READ and value not in (None, False, 0) and value != {} and value != []:
            raise PretrainedError(
                f"{place}: {key} is {str(value)[:80]!r}, expected none: it is not computed here"
            )


def number(values: Mapping[str, Any], which: str, module: str, place: Path) -> Any:
    """Rank or alpha of a module, as PEFT finds it: of the first pattern that ends its name."""
    patterns = values.get(f"{which}_pattern") or {}
    try:
        hits = [p for p in patterns if re.match(rf"(.*\.)?({p})$", module)]
        found = patterns[hits[0]] if hits else values[_USUAL[which]]
    except (re.error, TypeError, KeyError) as error:
        raise PretrainedError(
            f"{place}: {which} of {module} is not to be found ({error})"
        ) from None
    kind = int if which == "rank" else (int, float)
    if isinstance(found, bool) or not isinstance(found, kind) or not 0 < found < math.inf:
        raise PretrainedError(f"{place}: {which} of {module} is {found!r}, expected above 0")
    return found


def check_tensors(
    source: Source,
    file: Path,
    known: Mapping[str, Sequence[str]],
    kernels: Mapping[str, Shape],
    ranks: Mapping[str, int],
    values: Mapping[str, Any],
) -> list[str]:
    """The modules that have adapters, after all names and shapes were found right."""
    found = []
    for name, shape in source.shapes.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise PretrainedError(
                f"{file}: tensor {name} is no lora_A or lora_B of a linear layer, expected no other"
            )
        module, side = match.groups()
        if module not in known:
            raise PretrainedError(
                f"{file}: made for {_base(values)}: this one has no kernel {module}, expected such"
                f" as {next(iter(known))}"
            )
        inside, rank = [kernels[path] for path in known[module]], ranks[module]
        width_in, width_out = inside[0][0], sum(shape[1] for shape in inside)
        expected = (rank, width_in) if side == "A" else (width_out, rank)
        if shape != expected:
            raise PretrainedError(
                f"{file}: made for {_base(values)}: tensor {name} has shape {shape}, expected"
                f" {expected} by rank and model"
            )
        if (other := tensor_name(module, "B" if side == "A" else "A")) not in source.shapes:
            raise PretrainedError(f"{file}: tensor {other} is missing, expected beside {name}")
        found += [module] if side == "A" else []
    if not found:
        raise PretrainedError(f"{file}: no tensor, expected those of adapters")
    return found


def check_layers(
    used: Sequence[str], values: Mapping[str, Any], config: DecoderConfig, file: Path
) -> None:
    """Where the settings choose no layers, all must have what one has."""
    targets = values.get("target_modules") or []
    chosen = isinstance(targets, str) or any(re.search(r"\.\d", str(x)) for x in targets)
    settings = ("layers_to_transform", "exclude_modules")
    if chosen or any(values.get(x) is not None for x in settings):
        return
    for name, count in Counter(map(tail, used)).items():
        if count != config.layers:
            raise PretrainedError(
                f"{file}: made for {_base(values)}: adapters of {name} in {count} layers, expected"
                f" all {config.layers}"
            )


def _base(values: Mapping[str, Any]) -> str:
    return str(values.get("base_model_name_or_path") or "another base model")
