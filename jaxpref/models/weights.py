"""A file's tensors and the decoder's parameters: the same numbers under two sets of names.

A `Layout` says, for one family of files, how a parameter (by its path, see `jaxpref.models.paths`)
is called there and how its numbers lie; reading and writing use the same table.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.paths import Arrays, Shape


class PretrainedError(ValueError):
    """A model on disk that cannot be read or written; names file, tensor, expected and found."""


class Layout(NamedTuple):
    """How one family of files holds the parameters."""

    modules: Mapping[str, str]  # our module -> theirs; ``*`` is the layer
    prefix: str = ""  # absent from all names where only the base model was saved
    input_first: bool = False  # kernels [in, out] as ours (GPT-2), else [out, in] (torch's Linear)
    # Query, key, value in one tensor, or gate and up: one after the other, or by heads.
    fused: Literal["apart", "blocks", "heads"] = "apart"
    interleaved: bool = (
        False  # rope pairs are neighbours (llama.cpp), else half a head apart (ours)
    )
    norm_offset: float = 0.0  # that of the decoder's family, where their scales have it in them
    ignored: tuple[str, ...] = ()  # ends of the names of tensors that are constants: masks, tables


class Source(NamedTuple):
    """The tensors of a model on disk, unread."""

    place: Path
    shapes: Mapping[str, Shape]
    files: Mapping[str, Path]
    read: Callable[[str], np.ndarray]


# Names


def names(paths: Iterable[str], layout: Layout) -> dict[str, list[str]]:
    """The tensors of a file, and which parameters each holds.

    Args:
      paths: of the parameters.
      layout: of the file.

    Returns:
      Each tensor's name with the paths in it, in their order there.

    >>> layout = Layout({"layers.*.mlp.up": "h.*.up", "embedding": "wte"}, prefix="model.")
    >>> names(["embedding", "layers.3.mlp.up.bias"], layout)
    {'model.wte.weight': ['embedding'], 'model.h.3.up.bias': ['layers.3.mlp.up.bias']}
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        module, leaf = path.rsplit(".", 1) if "." in path else (path, "weight")
        pieces = module.split(".")
        layer = pieces[1] if pieces[0] == "layers" else ""
        theirs = layout.modules[module.replace(f".{layer}.", ".*.", 1)].replace("*", layer)
        name = f"{theirs}.{'bias' if leaf == 'bias' else 'weight'}"
        name = name if module == "unembedding" else layout.prefix + name
        found.setdefault(name, []).append(path)
    return {name: sorted(inside, key=_place) for name, inside in found.items()}


def _place(path: str) -> int:
    """In a tensor that holds several: query, key, value; gate, up."""
    parts = ("query", "key", "value", "gate", "up")
    return next((i for i, part in enumerate(parts) if f".{part}." in path), 0)


def _transposed(path: str, layout: Layout) -> bool:
    return path.endswith(".kernel") and not layout.input_first


def _file_shape(paths: Sequence[str], ours: Mapping[str, Shape], layout: Layout) -> Shape:
    *first, _ = ours[paths[0]]
    shape = (*first, sum(ours[path][-1] for path in paths))
    return shape[::-1] if _transposed(paths[0], layout) else shape


# Numbers


def _from_file(
    paths: Sequence[str],
    x: np.ndarray,
    ours: Mapping[str, Shape],
    config: DecoderConfig,
    layout: Layout,
) -> Arrays:
    x = x.T if _transposed(paths[0], layout) else x
    width = config.head_width
    if len(paths) == 1:
        if layout.interleaved and (".query." in paths[0] or ".key." in paths[0]):
            pairs = x.reshape(*x.shape[:-1], -1, width // 2, 2)
            x = pairs.swapaxes(-1, -2).reshape(x.shape)
        if paths[0].endswith("norm.scale") and layout.norm_offset:
            x = x - np.asarray(layout.norm_offset, x.dtype)
        return {paths[0]: x}
    if layout.fused == "heads":  # each head's query, key, value side by side
        x = x.reshape(*x.shape[:-1], config.heads, 3, width)
        parts = [x[..., i, :].reshape(*x.shape[:-3], -1) for i in range(3)]
    else:
        ends = np.cumsum([ours[path][-1] for path in paths])
        parts = np.split(x, ends[:-1], axis=-1)
    return dict(zip(paths, parts, strict=True))


def _to_file(
    paths: Sequence[str], arrays: Mapping[str, np.ndarray], config: DecoderConfig, layout: Layout
) -> Float[np.ndarray, "..."]:
    parts = [arrays[path] for path in paths]
    x = parts[0]
    if len(parts) > 1 and layout.fused == "heads":
        apart = [p.reshape(*p.shape[:-1], config.heads, config.head_width) for p in parts]
        x = np.stack(apart, axis=-2).reshape(*x.shape[:-1], -1)
    elif len(parts) > 1:
        x = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(x.T if _transposed(paths[0], layout) else x)


# Whole models


def read(
    source: Source, ours: Mapping[str, Shape], config: DecoderConfig, layout: Layout
) -> Mapping[str, np.ndarray]:
    """Every parameter, after all names and shapes were found right; each is read when asked for.

    Args:
      source: the tensors on disk.
      ours: the shape of each parameter by path.
      config: of the decoder that they belong to.
      layout: of the files.

    Returns:
      The parameters by path, in float32; of one tensor at a time are held.

    Raises:
      PretrainedError: a tensor is missing, is too many, or has another shape.
    """
    if layout.prefix and not any(name.startswith(layout.prefix) for name in source.shapes):
        layout = layout._replace(prefix="")
    wanted = names(ours, layout)
    twin, embedding = _ends(layout)
    if config.tied and embedding not in source.shapes and twin in source.shapes:
        wanted[twin] = wanted.pop(embedding)  # one table under either name
    expected = {name: _file_shape(paths, ours, layout) for name, paths in wanted.items()}
    _check(source, expected, layout, config)

    @functools.lru_cache(maxsize=1)
    def tensor(name: str) -> Arrays:
        return _from_file(wanted[name], source.read(name), ours, config, layout)

    owners = {path: name for name, paths in wanted.items() for path in paths}
    return _Unread(owners, tensor)


class _Unread(Mapping[str, np.ndarray]):
    """Arrays by path, of the last tensor that was read or of one that is read now."""

    def __init__(self, owners: Mapping[str, str], tensor: Callable[[str], Arrays]):
        self.owners, self.tensor = owners, tensor

    def __getitem__(self, path: str) -> np.ndarray:
        return self.tensor(self.owners[path])[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


def write(arrays: Mapping[str, np.ndarray], config: DecoderConfig, layout: Layout) -> Arrays:
    """The tensors of a file.

    Args:
      arrays: the parameters by path.
      config: of the decoder that they belong to.
      layout: of the file.

    Returns:
      The tensors by name.
    """
    wanted = names(arrays, layout)
    return {name: _to_file(paths, arrays, config, layout) for name, paths in wanted.items()}


def check_layers(source: Source, config: DecoderConfig) -> None:
    """Refuses a configuration of more layers than a file has tensors, before any is built.

    Args:
      source: the tensors on disk.
      config: of the decoder that they should belong to.

    Raises:
      PretrainedError: there are more.
    """
    if config.layers > len(source.shapes):
        raise PretrainedError(
            f"{source.place}: {len(source.shapes)} tensors, expected some for each of the "
            f"{config.layers} layers of its configuration"
        )


def _check(
    source: Source, expected: Mapping[str, Shape], layout: Layout, config: DecoderConfig
) -> None:
    missing = [name for name in expected if name not in source.shapes]
    if missing:
        raise PretrainedError(
            f"{source.place}: tensor {missing[0]} is missing, expected shape "
            f"{expected[missing[0]]}{_others(missing)}"
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise PretrainedError(
                f"{source.files[name]}: tensor {name} has shape {source.shapes[name]}, "
                f"expected {shape}"
            )
    extra = [n for n in source.shapes if n not in expected and not n.endswith(layout.ignored)]
    twin, embedding = _ends(layout)
    if config.tied and twin in extra:
        _check_tied(source, twin, embedding)
        extra.remove(twin)
    if extra:
        raise PretrainedError(
            f"{source.files[extra[0]]}: unexpected tensor {extra[0]} of shape "
            f"{source.shapes[extra[0]]}, expected no such tensor for this config{_others(extra)}"
        )


def _ends(layout: Layout) -> tuple[str, str]:
    """The tensors of the unembedding and of the embedding."""
    twin, embedding = (layout.modules[name] + ".weight" for name in ("unembedding", "embedding"))
    return twin, layout.prefix + embedding


def _check_tied(source: Source, twin: str, embedding: str) -> None:
    same_shape = source.shapes[twin] == source.shapes[embedding]
    if not same_shape or not np.array_equal(source.read(twin), source.read(embedding)):
        raise PretrainedError(
            f"{source.files[twin]}: tensor {twin} differs from {embedding}, expected the same "
            "numbers because the config ties them"
        )


def _others(found: Sequence[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
