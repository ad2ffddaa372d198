"""Finding a model's tensors on disk: GGUF files and Hugging Face folders, opened but not read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from jaxpref.data.gguf_file import read_gguf, read_tensor
from jaxpref.models.configs import family_of
from jaxpref.models.headers import ARCHITECTURES, ROPE_FACTORS, values_of
from jaxpref.models.weights import Layout, PretrainedError, Source

_FLOATS = ("F32", "F16", "BF16", "F64")
_GGUF_MODULES = {
    "embedding": "token_embd",
    "layers.*.attention_norm": "blk.*.attn_norm",
    "layers.*.attention.query": "blk.*.attn_q",
    "layers.*.attention.key": "blk.*.attn_k",
    "layers.*.attention.value": "blk.*.attn_v",
    "layers.*.attention.output": "blk.*.attn_output",
    "layers.*.attention.query_norm": "blk.*.attn_q_norm",
    "layers.*.attention.key_norm": "blk.*.attn_k_norm",
    "layers.*.mlp_norm": "blk.*.ffn_norm",
    "layers.*.mlp.gate": "blk.*.ffn_gate",
    "layers.*.mlp.up": "blk.*.ffn_up",
    "layers.*.mlp.down": "blk.*.ffn_down",
    "norm": "output_norm",
    "unembedding": "output",
}
_GGUF_AFTER = {
    "layers.*.attention_output_norm": "blk.*.post_attention_norm",
    "layers.*.mlp_output_norm": "blk.*.post_ffw_norm",
}
# llama.cpp keeps the rotary pairs of Llama side by side, those of others as transformers does, and
# Gemma's norms with the one that its formula adds.
_GGUF_LAYOUTS = {
    kind: Layout(
        _GGUF_MODULES | (_GGUF_AFTER if kind == "gemma3" else {}),
        interleaved=kind == "llama",
        norm_offset=float(kind == "gemma3"),
    )
    for kind in ARCHITECTURES
}


class Opened(NamedTuple):
    """A model on disk."""

    values: Mapping[str, Any]  # as in config.json
    described: Path  # the file that holds them
    layout: Layout
    tensors: Source


def open_gguf(path: Path) -> Opened:
    """A GGUF file, all parts of it, of an architecture in `jaxpref.models.headers`.

    Raises:
      PretrainedError: the file is missing, cut off, not a GGUF file or of another architecture, or
        a field of its header would change the formula.
    """
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file, expected a GGUF file or a model folder")
    try:
        file = read_gguf(path)
    except ValueError as error:
        raise PretrainedError(str(error)) from None

    def read(name: str) -> np.ndarray:
        try:
            return read_tensor(file, name)
        except ValueError as error:
            raise PretrainedError(str(error)) from None

    try:
        values = values_of(file)
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}") from None
    kind = file.fields["general.architecture"]
    kept = {n: t for n, t in file.tensors.items() if kind != "llama" or n != ROPE_FACTORS}
    shapes = {name: tensor.shape for name, tensor in kept.items()}
    places = {name: tensor.path for name, tensor in kept.items()}
    return Opened(values, path, _GGUF_LAYOUTS[kind], Source(path, shapes, places, read))


def open_folder(folder: Path) -> Opened:
    """A Hugging Face folder: ``config.json``, and one or several safetensors files.

    Raises:
      PretrainedError: a file is missing, cut off or not what its name says, or the model is of a
        family that the decoder does not compute.
    """
    described = folder / "config.json"
    if not described.is_file():
        raise PretrainedError(f"{described}: no such file, expected in a Hugging Face model folder")
    values = read_json(described)
    layout = family_of(values, described).layout
    return Opened(values, described, layout, _folder_tensors(folder))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      PretrainedError: it is something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise PretrainedError(f"{file}: found {type(values).__name__}, expected a JSON object")
    return values


def _folder_tensors(folder: Path) -> Source:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    listed: dict[str, str] = {}
    if single.is_file():
        files = [single]
    elif index.is_file():
        listed = read_json(index).get("weight_map") or {}
        whole = isinstance(listed, dict) and all(isinstance(x, str) for x in listed.values())
        if not listed or not whole:
            raise PretrainedError(f"{index}: no weight_map, expected names of tensors and files")
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))
        raise PretrainedError(f"{folder}: no {single.name} and no {index.name}, found {found}")
    found = open_safetensors(folder, files, index)
    absent = [name for name in listed if name not in found.shapes]
    if absent:
        file = folder / listed[absent[0]]
        raise PretrainedError(f"{file}: tensor {absent[0]} is missing, expected by {index.name}")
    return found


def open_safetensors(folder: Path, files: Sequence[Path], index: Path) -> Source:
    """The tensors of some files of a folder.

    Args:
      folder: for messages about all of them.
      files: in safetensors.
      index: which says that they are there, for messages.

    Returns:
      Them, unread.

    Raises:
      PretrainedError: a file is missing, where `index` says that it is there, or is cut off.
    """
    shapes, places, handles = {}, {}, {}
    for file in files:
        handles[file] = _open_file(file, index)
        for name in handles[file].keys():  # noqa: SIM118 (the handle is no mapping)
            shapes[name] = tuple(handles[file].get_slice(name).get_shape())
            places[name] = file

    def read(name: str) -> np.ndarray:
        handle = handles[places[name]]
        kind = handle.get_slice(name).get_dtype()
        if kind not in _FLOATS:
            known = ", ".join(_FLOATS)
            raise PretrainedError(
                f"{places[name]}: tensor {name} has dtype {kind}, expected {known}"
            )
        return np.asarray(handle.get_tensor(name), np.float32)

    return Source(folder, shapes, places, read)


def _open_file(file: Path, index: Path) -> Any:
    if not file.is_file():
        raise PretrainedError(f"{file}: no such file, expected by {index.name}")
    try:
        return safetensors.safe_open(str(file), framework="np")
    except safetensors.SafetensorError as error:
        raise PretrainedError(_what_is_broken(file, error)) from None


def _what_is_broken(file: Path, error: Exception) -> str:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        for name, tensor in header.items():
            end = 8 + length + tensor["data_offsets"][1] if name != "__metadata__" else 0
            if end > size:
                return f"{file}: cut off in tensor {name}, expected {end} bytes, found {size}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return f"{file}: cut off or not a safetensors file, found {size} bytes ({error})"
