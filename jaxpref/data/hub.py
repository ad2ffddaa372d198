"""Models and data sets of the Hugging Face hub by name, pinned to a commit; the only network here.

``org/name`` or ``org/name@revision``. What was downloaded before is found again without a network,
in the cache that Hugging Face's own libraries use (``HF_HOME``).
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxpref.data.files import DataError

_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w./-]+))?(?:@([\w./-]+))?")
_MODEL = (
    "config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_FILES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".gz", ".parquet", ".pq", ".txt")
_CONVERTED = "refs/convert/parquet"  # the branch on which the hub keeps every data set as Parquet


class Name(NamedTuple):
    """What to look up."""

    repository: str
    part: str | None  # of a data set: its split, or configuration and split
    revision: str | None


class Snapshot(NamedTuple):
    """Files on this machine."""

    folder: Path
    revision: str  # 40 hexadecimal digits of the commit


def parse(name: str) -> Name | None:
    """A name of the hub, or None for what must be a path.

    >>> parse("org/name@main")
    Name(repository='org/name', part=None, revision='main')
    >>> parse("org/name:train").part
    'train'
    >>> parse("./folder/model") is parse("/folder/model") is parse("a/b.gguf") is None
    True
    """
    found = _NAME.fullmatch(name)
    if found is None or name.startswith(".") or name.endswith(_FILES):
        return None
    return Name(found[1], found[2], found[3])


def model(name: str) -> Snapshot:
    """The safetensors, configuration and tokenizer of a model, downloaded if they are not here.

    Args:
      name: ``org/name`` or ``org/name@revision``.

    Raises:
      DataError: no such model or revision, a gated one, or no network and no copy here; one line
        that says what to do.
    """
    return _snapshot(name, "model", _MODEL, None)


def is_named(path: str | Path) -> bool:
    """Whether a name of the hub stands where a path might: no such path is here.

    >>> is_named("org/name"), is_named("org/pairs.csv")
    (True, False)
    """
    return isinstance(path, str) and parse(path) is not None and not Path(path).exists()


def data_revision(path: str | Path | None) -> dict[str, str]:
    """For a provenance: the commit of a data set of the hub, nothing for a path."""
    named = path is not None and is_named(path)
    return {"data_revision": parquet(str(path))[1]} if named else {}


@functools.cache
def parquet(name: str) -> tuple[list[Path], str]:
    """The Parquet files of one split of a data set, in order, and its commit.

    Looked up once a process: what is read and what a provenance says are one commit.

    Args:
      name: ``org/name``, ``org/name:split`` or ``org/name:configuration/split``, with ``@revision``
        or without. A data set that has no Parquet files itself is read from the hub's own
        conversion.

    Raises:
      DataError: as `model`; or the data set has several splits and the name says none of them.
    """
    snapshot = _snapshot(name, "dataset", ("*.parquet",), None)
    files = sorted(snapshot.folder.rglob("*.parquet"))
    asked = parse(name)
    if not files and asked is not None and asked.revision is None:
        snapshot = _snapshot(name, "dataset", ("*.parquet",), _CONVERTED)
        files = sorted(snapshot.folder.rglob("*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split(file.relative_to(snapshot.folder)), []).append(file)
    if not splits:
        raise DataError(f"{name}: no Parquet files in this data set, expected some")
    part = asked.part if asked is not None else None
    chosen = part if part is not None else next(iter(splits)) if len(splits) == 1 else None
    if chosen not in splits:
        repository = name.partition(":")[0].partition("@")[0]
        known = ", ".join(f"{repository}:{split}" for split in splits)
        raise DataError(f"{name}: expected one split of this data set: {known}")
    return splits[chosen], snapshot.revision


def _split(file: Path) -> str:
    """The split that a file belongs to.

    >>> _split(Path("data/train-00000-of-00002.parquet")), _split(Path("default/test/0000.parquet"))
    ('train', 'test')
    >>> _split(Path("harmless-base/train/0001.parquet"))
    'harmless-base/train'
    """
    stem = re.sub(r"-\d{5}-of-\d{5}(-\w+)?$", "", file.with_suffix("").as_posix())
    stem = re.sub(r"/\d{4,5}$", "", stem)
    return re.sub(r"^(data|default)/", "", stem)


def _snapshot(name: str, kind: str, patterns: Sequence[str], revision: str | None) -> Snapshot:
    asked = parse(name)
    if asked is None:
        raise DataError(f"{name}: no name of the hub, expected org/name or org/name@revision")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise DataError(
            f"{name}: huggingface_hub is not installed. Run: pip install huggingface_hub"
        ) from None
    revision = revision or asked.revision
    where = f"{kind} {asked.repository}" + (f" at {revision}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            asked.repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)
        )
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{asked.repository}"
        reason = f"its owners ask for consent: agree on {page}, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "the hub has no such revision"
    except errors.RepositoryNotFoundError:
        reason = "no such path here, and the hub has none of this name (or `hf auth login` first)"
    except errors.HFValidationError as error:
        reason = " ".join(str(error).split())
    except OSError:  # no network, or none allowed, or the hub's own trouble
        reason = (
            "no such path here, no whole copy in the hub's cache, and the hub is out of reach: "
            f"download it where there is a network (`hf download {asked.repository}`)"
        )
    else:
        return Snapshot(Path(folder), Path(folder).name)
    raise DataError(f"{where}: {reason}")
