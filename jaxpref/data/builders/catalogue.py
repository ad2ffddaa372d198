"""The data sets as builders of TFDS, which reads and writes them without TensorFlow.

Importing this module loads ``tensorflow_datasets`` and makes the builders known to it by name. Each
configuration is one published file and one split, whose rows keep their order.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from jaxpref.data.builders.sources import SOURCES, Source
from jaxpref.data.files import DataError, csv_rows, rows

_TEXT = tfds.features.Text()
_NUMBER = tfds.features.Scalar(np.float32)  # TFDS stores no float64
_MESSAGES = tfds.features.Sequence({"role": _TEXT, "content": _TEXT})


def _configs(name: str) -> list[Any]:
    parts = [source.partition("/")[2] for source in SOURCES if source.startswith(f"{name}/")]
    version = tfds.core.Version("1.0.0")
    return [tfds.core.BuilderConfig(name=part, version=version) for part in parts]


class _Published(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: TFDS wants subclasses."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Save the file at the address in jaxpref.data.builders.sources under the name given there."
    )
    COLUMNS: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, file_format: Any = "array_record", **options: Any):
        super().__init__(file_format=file_format, **options)

    def _source(self) -> tuple[str, Source]:
        name = "/".join(filter(None, (self.name, self.builder_config and self.builder_config.name)))
        return name, SOURCES[name]

    def _info(self) -> Any:
        _, source = self._source()
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{source.about} The file: {source.url}",
            features=tfds.features.FeaturesDict(self.COLUMNS),
            homepage=source.homepage,
            license=source.licence,
            citation=source.citation,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        name, source = self._source()
        return {source.split: self._generate_examples(_fetched(dl_manager, name, source))}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (place, row) in enumerate(self._rows(path)):
            missing = [column for column in self.COLUMNS if column not in row]
            if missing:
                found = ", ".join(map(repr, row))
                raise DataError(f"{place}: no column {missing[0]!r}, found {found}")
            yield number, {column: row[column] for column in self.COLUMNS}

    def _rows(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        return rows(path)


class Persona(_Published):
    """Statements of Perez et al. 2022, https://arxiv.org/abs/2212.09251."""

    name = "persona"
    BUILDER_CONFIGS = _configs("persona")
    COLUMNS: ClassVar = {
        "question": _TEXT,
        "statement": _TEXT,
        "label_confidence": _NUMBER,
        "answer_matching_behavior": _TEXT,
        "answer_not_matching_behavior": _TEXT,
    }


class HhRlhfHarmless(_Published):
    """Harmless-base transcripts of Bai et al. 2022, https://arxiv.org/abs/2204.05862."""

    name = "hh_rlhf_harmless"
    BUILDER_CONFIGS = _configs("hh_rlhf_harmless")
    COLUMNS: ClassVar = {"chosen": _TEXT, "rejected": _TEXT}


class XSTest(_Published):
    """Prompts of Röttger et al. 2023, https://arxiv.org/abs/2308.01263."""

    name = "xstest"
    COLUMNS: ClassVar = dict.fromkeys(("id", "prompt", "type", "label", "focus", "note"), _TEXT)

    def _rows(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        return csv_rows(path)


class UltrafeedbackBinarized(_Published):
    """Conversations of Tunstall et al. 2023, https://arxiv.org/abs/2310.16944."""

    name = "ultrafeedback_binarized"
    BUILDER_CONFIGS = _configs("ultrafeedback_binarized")
    COLUMNS: ClassVar = {
        "prompt": _TEXT,
        "prompt_id": _TEXT,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "score_chosen": _NUMBER,
        "score_rejected": _NUMBER,
    }


BUILDERS = {
    builder.name: builder for builder in (Persona, HhRlhfHarmless, XSTest, UltrafeedbackBinarized)
}


def _fetched(dl_manager: Any, name: str, source: Source) -> Path:
    """The file, from the manual folder or else downloaded, with its checksum checked."""
    by_hand = _by_hand(dl_manager, source)
    if by_hand:
        _check(by_hand, name, source)
        return by_hand
    # TFDS tries for minutes where there is no network.
    message = f"tfds:{name}: downloading {source.url}; without network, save it by hand"
    print(f"{message} (manual_dir) as {source.file}", file=sys.stderr)
    try:
        path = Path(os.fspath(dl_manager.download(source.url)))
    except (OSError, tfds.download.DownloadError) as error:
        fault = " ".join(str(error).split())
        raise DataError(f"tfds:{name}: no download ({fault}), {source.how()}") from None
    try:
        _check(path, name, source)
    except DataError:
        for broken in path.parent.glob(f"{path.name}*"):  # and TFDS's note about it
            broken.unlink()  # else it would be taken for the file forever
        raise
    return path


def _by_hand(dl_manager: Any, source: Source) -> Path | None:
    try:
        path = Path(os.fspath(dl_manager.manual_dir)) / source.file
    except AssertionError:  # TFDS: the folder does not exist or is empty
        return None
    return path if path.is_file() else None


def _check(path: Path, name: str, source: Source) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if source.sha256 not in (None, found):
        raise DataError(
            f"tfds:{name}: {path} has SHA-256 {found}, expected {source.sha256} of {source.url}"
        )
