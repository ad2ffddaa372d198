"""The GGUF container: a header of named fields and tensors, read in a fraction of a second.

The reader of the `gguf` package makes several numpy arrays for every word of the vocabulary, some
seconds for 50,000 words. Only its formulas for quantised blocks are used here.

Source: the GGUF specification, version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

# Value types of the specification as struct codes; 8 (string) and 9 (array) are read apart.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Tensor(NamedTuple):
    """Where one tensor lies in the file."""

    shape: tuple[int, ...]  # numpy order: the last axis is contiguous
    quantisation: int  # ggml type number
    start: int  # byte in the file
    path: Path  # of several parts, the one that holds it


class Gguf(NamedTuple):
    """The header of one file, or of all parts of a split one."""

    path: Path
    fields: Mapping[str, Any]  # numbers, strings, lists of these; of the first part
    tensors: Mapping[str, Tensor]


class _Cursor:
    def __init__(self, content: bytes | memoryview):
        self.content, self.at = content, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.content, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def strings(self, number: int) -> list[str]:
        """Some in a row, in one loop: a vocabulary has a hundred thousand of them."""
        found, length = [], struct.Struct("<Q")
        for _ in range(number):
            (size,) = length.unpack_from(self.content, self.at)
            text = self.content[self.at + length.size :][:size]
            if len(text) < size:
                raise struct.error("string ends after the file")
            self.at += length.size + size
            found.append(str(text, "utf-8", "replace"))
        return found

    def string(self) -> str:
        return self.strings(1)[0]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, size = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return self.strings(size)
        if kind == _ARRAY:
            return [self.value(kind) for _ in range(size)]
        code = f"<{size}{_SCALARS[kind]}"
        values = struct.unpack_from(code, self.content, self.at)
        self.at += struct.calcsize(code)
        return list(values)


def read_gguf(path: str | os.PathLike) -> Gguf:
    """Read the header of a GGUF file: fields and where the tensors lie.

    Args:
        path: the file; little-endian, version 2 or 3. Of a split one the first part,
            ``NAME-00001-of-0000N.gguf``; the others are found beside it.

    Returns:
        `Gguf`; the tensors' data stay on disk until `read_tensor`.

    Raises:
        ValueError: not a GGUF file, another version, a header that the file cuts off, or a part
            that is missing or not the first.
        FileNotFoundError: no such file.
    """
    first = _read_one(Path(path))
    count = first.fields.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return first
    number = first.fields.get("split.no", 0)
    name = _PART.fullmatch(first.path.name)
    if name is None or int(name[3]) != count or not isinstance(number, int):
        raise ValueError(
            f"{path}: part {_counted(number)} of {count} by its header, expected a name that ends "
            f"in -00001-of-{count:05}.gguf"
        )
    if number != 0:
        beginning = first.path.with_name(f"{name[1]}-00001-of-{count:05}.gguf")
        raise ValueError(
            f"{path}: part {number + 1} of {count}, expected the first, {beginning.name}"
        )
    tensors = dict(first.tensors)
    for number in range(1, count):
        part = first.path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise ValueError(f"{path}: part 1 of {count}, expected {part.name} beside it")
        tensors |= _read_one(part).tensors
    total = first.fields.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ValueError(f"{path}: {len(tensors)} tensors in its {count} parts, expected {total}")
    return first._replace(tensors=tensors)


def _counted(number: Any) -> Any:
    return number + 1 if isinstance(number, int) else number


def _read_one(path: Path) -> Gguf:
    content = np.memmap(path, mode="r").data if path.stat().st_size else b""
    cursor = _Cursor(content)
    try:
        return _header(path, cursor)
    except (struct.error, OverflowError, MemoryError, RecursionError):
        raise ValueError(
            f"{path}: truncated GGUF, the header breaks off at byte {cursor.at} of {len(content)}"
        ) from None
    except KeyError as unknown:
        raise ValueError(
            f"{path}: value type {unknown} at byte {cursor.at}, expected 0 to 12 of GGUF 3"
        ) from None


def _header(path: Path, cursor: _Cursor) -> Gguf:
    magic = bytes(cursor.content[:4])
    if magic != b"GGUF":
        raise ValueError(f"{path}: expected a GGUF file (first bytes b'GGUF'), found {magic!r}")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version}, expected 2 or 3 (little-endian)")
    n_tensors, n_fields = cursor.scalar("Q"), cursor.scalar("Q")
    fields = {}
    for _ in range(n_fields):
        name = cursor.string()
        fields[name] = cursor.value(cursor.scalar("I"))
    rows = []
    for _ in range(n_tensors):
        name = cursor.string()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        rows.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    step = fields.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"{path}: general.alignment is {step!r}, expected a number of bytes")
    begin = -(-cursor.at // step) * step
    tensors = {n: Tensor(s, kind, begin + at, path) for n, s, kind, at in rows}
    return Gguf(path, fields, tensors)


def read_tensor(file: Gguf, name: str) -> Float[np.ndarray, "..."]:
    """One tensor in float32, whatever its quantisation.

    Args:
        file: from `read_gguf`.
        name: of the tensor.

    Returns:
        The numbers, the contiguous axis last.

    Raises:
        ValueError: a quantisation that the `gguf` package cannot undo, or a truncated file.
        KeyError: no tensor of this name.
    """
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    shape, number, start, path = file.tensors[name]
    kinds = {int(kind): (kind, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    problem = f"{path}: tensor {name} of shape {shape} is quantised as type {number}, which"
    if number not in kinds:
        raise ValueError(f"{problem} gguf cannot undo")
    kind, block, size = kinds[number]
    if not shape or 0 in shape or shape[-1] % block:
        raise ValueError(f"{problem} holds {block} numbers a block")
    data = _mapped(path, name, start, (*shape[:-1], shape[-1] // block * size))
    try:
        with np.errstate(all="ignore"):  # damaged scales: not finite, as anything from them
            return dequantize(data, kind).reshape(shape)
    except NotImplementedError:
        raise ValueError(f"{problem} gguf cannot undo") from None


def _mapped(path: Path, name: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
    found, expected = path.stat().st_size - start, math.prod(shape)
    if found < expected:
        raise ValueError(
            f"{path}: truncated GGUF, tensor {name}: expected {expected} bytes, found "
            f"{max(found, 0)}"
        )
    return np.memmap(path, mode="r", offset=start, shape=shape).view(np.ndarray)
