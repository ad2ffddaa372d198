"""Folders of low-rank adapters as PEFT writes and reads them, for every family of `families`.

``adapter_config.json`` says what the numbers mean, ``adapter_model.safetensors`` holds them under
transformers' names of the modules. What would change the formula is refused, not ignored. In PEFT
a file's scale is ``lora_alpha / r``, with ``use_rslora`` ``lora_alpha / sqrt(r)``, and either
number may be another for some modules (``rank_pattern``, ``alpha_pattern``); here it is ``alpha /
rank`` always, so `load` gives the `alpha` that makes it so.

Query, key and value are one module in GPT-2, GPT-NeoX and Phi-3 and three here (as are Phi-3's gate
and up one and two). One such adapter becomes three that begin with the same A; three become one of
the sum of their ranks, its B in blocks.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, PyTree

from jaxpref.models import _adapter_checks as adapter_checks
from jaxpref.models import configs, decoder, lora, paths, sources, weights
from jaxpref.models.blocks import wide
from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.lora import Adapters, Alpha
from jaxpref.models.pretrained import replace_file, save_tensors
from jaxpref.models.weights import Layout, PretrainedError, Source

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_END = ".kernel"


class Loaded(NamedTuple):
    """Adapters from a folder.

    Attributes:
        adapters: As `jaxpref.models.lora` has them, in float32.
        alpha: Of each module in each layer, for `lora.attach` and `lora.merge`.
        dropout: Rate that they were trained with, for `lora.dropped`; nothing is dropped before.
    """

    adapters: Adapters
    alpha: Alpha
    dropout: float


def load(
    folder: str | os.PathLike, params: PyTree, config: DecoderConfig, *, family: str
) -> Loaded:
    """Adapters out of a folder that PEFT or `save` wrote.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        params: Of the base, layers apart or stacked; their shapes are read. Where a stack has
            different ranks they are filled up to the largest, and layers without an adapter get
            one, of zeros that no training moves.
        config: Of the base.
        family: Its ``model_type``, such as `jaxpref.models.pretrained.Pretrained.family`.

    Returns:
        `Loaded`.

    Raises:
        PretrainedError: one line that names file, what came and what was expected: an adapter of
            another base, of another kind (DoRA, trained biases, whole modules), a damaged file.
    """
    folder = Path(folder)
    place, file = folder / CONFIG, folder / TENSORS
    for needed in (place, file):
        if not needed.is_file():
            raise PretrainedError(f"{needed}: no such file, expected in a folder of PEFT's LoRA")
    values = sources.read_json(place)
    adapter_checks.check_settings(values, place)
    source = sources.open_safetensors(folder, [file], place)
    layout = configs.family_of({"model_type": family}, Path("family")).layout
    kernels = _kernels(paths.shapes(params, config.layers))
    known = _modules(kernels, layout)
    ranks = {module: adapter_checks.number(values, "rank", module, place) for module in known}
    used = adapter_checks.check_tensors(source, file, known, kernels, ranks, values)
    adapter_checks.check_layers(used, values, config, file)
    shapes = {p: (ranks[m], kernels[p][1]) for m in used for p in known[m]}
    whole = {f"{m}.weight": (sum(shapes[p][1] for p in known[m]), ranks[m]) for m in used}
    read = lambda name: source.read(adapter_checks.tensor_name(name.removesuffix(".weight"), "B"))  # noqa: E731
    places = dict.fromkeys(whole, file)
    bs = weights.read(Source(folder, whole, places, read), shapes, config, _torch(layout))
    found = {}
    for module in used:
        alpha = adapter_checks.number(values, "alpha", module, place)
        scale = alpha / (math.sqrt(ranks[module]) if values.get("use_rslora") else ranks[module])
        a = source.read(adapter_checks.tensor_name(module, "A")).T
        found |= {p.removesuffix(_END): Piece(a, bs[p], scale) for p in known[module]}
    adapters, alphas, leaves = {}, {}, jax.tree.leaves(params)
    for module, site in lora.sites(params).items():
        inside = [found.get(name) for name in site.names]
        if any(inside):
            dtype = wide(leaves[site.leaf].dtype)
            adapters[module], rank = _in_place(inside, site, dtype)
            scales = [piece.scale if piece else 1.0 for piece in inside]
            alphas |= {n: s * rank for n, s in zip(site.names, scales, strict=True)}
    return Loaded(adapters, alphas, float(values.get("lora_dropout") or 0.0))


def save(
    folder: str | os.PathLike,
    adapters: Adapters,
    config: DecoderConfig,
    *,
    family: str,
    alpha: Alpha,
    base: str = "",
) -> None:
    """Writes a folder that PEFT opens to the same logits.

    Each file is complete or absent, ``adapter_config.json`` comes last.

    Args:
        folder: Made if absent.
        adapters: Of layers apart or stacked; written in float32.
        config: Of the base.
        family: ``model_type`` of the base.
        alpha: As of `jaxpref.models.lora.attach`.
        base: Name or path of the base, for those who open the folder.

    Raises:
        PretrainedError: an unknown family.
        OSError: nothing was written, for example because the disk is full.
    """
    folder = Path(folder)
    layout = configs.family_of({"model_type": family}, Path("family")).layout
    kernels = _kernels(paths.shapes(decoder.abstract(config)[1], config.layers))
    pieces = _apart(adapters, kernels, alpha)
    tensors, ranks, alphas, bs = {}, {}, {}, {}
    for module, inside in _modules(kernels, layout).items():
        present = [path for path in inside if path in pieces]
        if present:
            first, rank = pieces[present[0]], sum(pieces[p].a.shape[1] for p in present)
            ranks[module], alphas[module] = rank, _whole(first.scale * rank)
            a = np.concatenate([pieces[p].a for p in present], axis=1)
            tensors[adapter_checks.tensor_name(module, "A")] = np.ascontiguousarray(a.T)
            bs |= {path: np.zeros((rank, kernels[path][1]), np.float32) for path in inside}
            begin = 0
            for path in present:
                _, b, scale = pieces[path]
                bs[path][begin : begin + len(b)] = b * np.float32(scale / first.scale)
                begin += len(b)
    written = weights.write(bs, config, _torch(layout))
    tensors |= {
        adapter_checks.tensor_name(name.removesuffix(".weight"), "B"): b
        for name, b in written.items()
    }
    rank, common = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "target_modules": _targets(ranks, config.layers),
        "r": rank,
        "lora_alpha": common,
        "rank_pattern": {module: x for module, x in ranks.items() if x != rank},
        "alpha_pattern": {module: x for module, x in alphas.items() if x != common},
        "fan_in_fan_out": layout.input_first,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TENSORS, lambda file: save_tensors(tensors, file))
    text = json.dumps(values, indent=2) + "\n"
    replace_file(folder / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))


# Names and places


class Piece(NamedTuple):
    """The adapter of one kernel of one layer: ``[in rank]``, ``[rank out]``, and its scale."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def _kernels(shapes: Mapping[str, paths.Shape]) -> dict[str, paths.Shape]:
    return {path: shape for path, shape in shapes.items() if path.endswith(_END)}


def _modules(kernels: Iterable[str], layout: Layout) -> dict[str, list[str]]:
    """Each module of transformers that is a linear layer, with the kernels in it."""
    found = weights.names(kernels, layout)
    return {name.removesuffix(".weight"): inside for name, inside in found.items()}


def _torch(layout: Layout) -> Layout:
    """Where B lies as the weight of torch's Linear, in every family."""
    return layout._replace(input_first=False)


def _targets(modules: Iterable[str], layers: int) -> list[str]:
    """Names without a layer where all layers have them."""
    tails = Counter(adapter_checks.tail(module) for module in modules)
    return sorted(
        {adapter_checks.tail(m) if tails[adapter_checks.tail(m)] == layers else m for m in modules}
    )


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-9 * abs(x) else x


def _in_place(
    pieces: Sequence[Piece | None], site: lora.Site, dtype: DTypeLike
) -> tuple[dict[str, Array], int]:
    """The adapter of a kernel or of a stack of them, and its rank."""
    rank = max(piece.a.shape[1] for piece in pieces if piece)
    *_, width_in, width_out = site.shape
    a, b = np.zeros((len(pieces), width_in, rank)), np.zeros((len(pieces), rank, width_out))
    for number, piece in enumerate(pieces):
        if piece:
            a[number, :, : piece.a.shape[1]] = piece.a
            b[number, : piece.b.shape[0]] = piece.b
    both = (a, b) if len(site.shape) == 3 else (a[0], b[0])
    return dict(zip("ab", (jnp.asarray(x, dtype) for x in both), strict=True)), rank


def _apart(
    adapters: Adapters, kernels: Mapping[str, paths.Shape], alpha: Alpha
) -> dict[str, Piece]:
    """Each kernel's adapter by its path, layers apart."""
    found = {}
    for module, both in adapters.items():
        a, b = (np.asarray(both[side], np.float32) for side in "ab")
        tail, stack = module.removeprefix("layers."), a.ndim == 3
        names = tuple(f"layers.{i}.{tail}" for i in range(len(a))) if stack else (module,)
        shape = (a.shape[0], a.shape[1], b.shape[2]) if stack else (a.shape[0], b.shape[1])
        scales = lora.scales(lora.Site(0, names, shape), a.shape[-1], alpha).ravel()
        each = zip(names, *((a, b) if stack else (a[None], b[None])), scales, strict=True)
        for name, one, other, scale in each:
            if kernels.get(name + _END) != shape[-2:]:
                raise PretrainedError(
                    f"adapters: {name} is for a kernel {shape[-2:]}, expected"
                    f" {kernels.get(name + _END)} by config"
                )
            found[name + _END] = Piece(one, other, float(scale))
    if not found:
        raise PretrainedError("adapters: got none, expected at least one")
    return found
