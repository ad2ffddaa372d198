"""A run on disk: ``runs/<experiment>/<name>/``, written so that nothing good is ever lost.

========================  ==================================================================
``config.json``           all that decides the numbers, written once
``provenance.json``       commit, versions, device, hashes of data and model: no host, user, path
``metrics.jsonl``         a line a step
``arrays.npz``            what the figure is drawn from
``summary.json``          what the table shows, numbers only
``figure.png``, ``.svg``  the figure
========================  ==================================================================

A file appears whole or not at all: it is written beside its place, then moved there. In JSON a
number that is not finite is the string ``"nan"``, ``"inf"`` or ``"-inf"``. With several processes
only the first one writes. This module imports nothing of jaxpref.
"""

import dataclasses
import importlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import jax
import numpy as np


class Record(NamedTuple):
    """A run read back by `load`; a file that is not there is an empty container.

    Attributes:
      config: as given to `create`, in JSON's types.
      provenance: what made the numbers.
      metrics: one dict a step, with its ``step``; `columns` turns them into arrays.
      arrays: by name.
      summary: by name.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    summary: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is being written; made by `create`.

    Attributes:
      path: its folder; ``figure_png`` and ``figure_svg`` are where the figure goes.
      writes: False in all processes but the first, where nothing is written.
      mirror: the wandb run, if one was asked for.
    """

    path: Path
    writes: bool = True
    mirror: Any = None

    figure_png = property(lambda self: self.path / "figure.png")
    figure_svg = property(lambda self: self.path / "figure.svg")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it is in the file when this returns.

        Args:
          step: number of the update, from 0; comes first in the line.
          metrics: scalars, or small arrays, by name.

        Raises:
          OSError: the disk is full, say; names the path. The file ends with its last whole line.
        """
        if not self.writes:
            return
        values = {name: _plain(value) for name, value in metrics.items()}
        line = json.dumps({"step": int(step), **values}) + "\n"
        _append(self.path / "metrics.jsonl", line.encode())
        if self.mirror is not None:
            self.mirror.log(values, step=int(step))

    def truncate(self, step: int) -> None:
        """Drop the metrics of ``step`` and later, and a last line that a kill cut short."""
        file = self.path / "metrics.jsonl"
        if not self.writes or not file.exists():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole if json.loads(line)["step"] < step]
        if kept != lines:
            _replace(file, b"".join(kept))

    def save(
        self,
        *,
        arrays: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
        metrics: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        """Save what is given, each file whole.

        Args:
          arrays: by name.
          summary: what the table shows: numbers, in dicts and lists.
          metrics: all lines at once, each with its ``step``, instead of one `log` a step.

        Raises:
          OSError: it could not be saved; names the path. The file's old content is kept.
        """
        if not self.writes:
            return
        if arrays is not None:
            save_arrays(self.path / "arrays.npz", arrays)
        if metrics is not None:
            lines = "".join(json.dumps(_plain(line)) + "\n" for line in metrics)
            _replace(self.path / "metrics.jsonl", lines.encode())
        if summary is not None:
            _save_json(self.path / "summary.json", summary)
            if self.mirror is not None:
                self.mirror.summary.update(_plain(summary))

    def save_figure(self, figure: Any) -> Path:
        """Save a matplotlib figure as PNG and SVG; returns the PNG's path."""
        for file, options in (
            (self.figure_png, {"format": "png", "dpi": 150}),
            (self.figure_svg, {"format": "svg", "metadata": {"Date": None}}),
        ):
            if self.writes:
                content = io.BytesIO()
                figure.savefig(content, bbox_inches="tight", **options)
                _replace(file, content.getbuffer())
        return self.figure_png

    def close(self) -> None:
        """End the wandb mirror, if there is one."""
        if self.mirror is not None:
            self.mirror.finish()


def create(
    experiment: str,
    name: str,
    config: Any,
    *,
    root: str | Path = "runs",
    resume: bool = False,
    provenance: Mapping[str, str | Sequence[str] | None] | None = None,
    wandb: Literal["off", "offline", "online"] = "off",
) -> Run:
    """Make the folder of a run, or come back to it; never overwrites.

    Args:
      experiment: a folder under ``root``.
      name: of the run, a folder under the experiment.
      config: a dict or dataclass of all that decides the numbers.
      root: where runs live.
      resume: continue a run that exists. One that does not is made, so that the command that
        started a job also starts it again.
      provenance: hashes of data and model by name, rows that were left out: what the code's commit
        does not say.
      wandb: mirror metrics, config and summary there. ``"off"`` does not import it.

    Returns:
      The run, open for writing.

    Raises:
      FileExistsError: the run exists, without ``resume``; or the folder is not a run's.
      ValueError: a name that is not one folder's; an absolute path in ``provenance``; with
        ``resume``, another config, data or model: names what differs.
      ImportError: a mirror is asked for and wandb is not installed.
    """
    for argument, value in (("experiment", experiment), ("name", name)):
        if value in ("", "..") or PurePath(value).name != value:
            raise ValueError(f"{argument} is {value!r}, expected the name of one folder")
    hashes = dict(provenance or {})
    for key, value in hashes.items():
        if any(PurePath(each).is_absolute() for each in _several(value)):
            raise ValueError(f"provenance {key} is the absolute path {value!r}, expected a hash")
    module = _wandb(wandb)
    path, settings = Path(root) / experiment / name, _plain(config)
    if jax.process_index() > 0:
        return Run(path, writes=False)
    if path.exists() and any(path.iterdir()):
        _come_back(path, settings, hashes, resume=resume)
    else:
        _make(path, {"config": settings, "provenance": {**_environment(), **hashes}})
    if module is None:
        return Run(path)
    identity = _read_json(path / "wandb.json", {"id": uuid.uuid4().hex[:8]})
    _save_json(path / "wandb.json", identity)
    where = {"project": experiment, "name": name, "dir": str(path), "mode": wandb}
    return Run(path, mirror=module.init(**where, **identity, config=settings, resume="allow"))


def _several(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or ()


def load(path: str | Path) -> Record:
    """Read a run back. A last line of the metrics that a kill cut short is left out.

    Raises:
      FileNotFoundError: no run there.
      ValueError: a file that cannot be read: names the file, and the line of metrics.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not a run, expected a folder with config.json")
    arrays = path / "arrays.npz"
    return Record(
        _read_json(path / "config.json"),
        _read_json(path / "provenance.json", {}),
        _read_metrics(path / "metrics.jsonl"),
        load_arrays(arrays) if arrays.exists() else {},
        _numbers(_read_json(path / "summary.json", {})),
    )


def columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The metrics by name, an entry a line; NaN where a line has none of that name.

    >>> columns([{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25, "accuracy": 1.0}])
    {'step': array([0, 1]), 'loss': array([0.5 , 0.25]), 'accuracy': array([nan,  1.])}
    """
    names = dict.fromkeys(name for line in metrics for name in line)
    return {name: np.array([line.get(name, math.nan) for line in metrics]) for name in names}


def save_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Save arrays by name as npz, whole or not at all; the same arrays give the same bytes.

    Args:
      path: of the file.
      arrays: of numbers, by name.

    Raises:
      OSError: it could not be saved; names the path. The file's old content is kept.
      ValueError: an array of objects.
    """

    def write(file: Any) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                # A ZipInfo has a fixed date.
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, np.asarray(array), allow_pickle=False)

    _replace(Path(path), write)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of `save_arrays`, by name.

    Raises:
      ValueError: not a whole npz file.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy raise what they meet in a damaged file
        raise ValueError(f"{path} is not a whole npz file: {error}") from None


def _save_json(path: Path, value: Any) -> None:
    _replace(path, (json.dumps(_plain(value), indent=2) + "\n").encode())


def _read_json(path: Path, default: Any = None) -> Any:
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_numbers(json.loads(line)))
        except ValueError as error:
            if line.endswith(b"\n"):
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def _replace(path: Path, content: bytes | memoryview | Callable[[Any], Any]) -> None:
    """Write beside ``path``, then move there: a kill or a full disk leaves the old file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _not_saved(error, path, "its last good content is kept") from error
    finally:
        temporary.unlink(missing_ok=True)


def _append(path: Path, line: bytes) -> None:
    try:
        with open(path, "ab", buffering=0) as file:
            before, left = file.seek(0, os.SEEK_END), memoryview(line)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise _not_saved(error, path, "the lines before are kept") from error


def _not_saved(error: OSError, path: Path, kept: str) -> OSError:
    return OSError(error.errno, f"{error.strerror}; not saved, {kept}", str(path))


def _plain(value: Any) -> Any:
    """The value in JSON's types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    """The inverse of `_plain` for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _make(path: Path, files: Mapping[str, Any]) -> None:
    """The folder with its first files, in one move: of two runs of one name, one fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new.chmod(0o755)
    try:
        for name, value in files.items():
            _save_json(new / f"{name}.json", value)
        os.rename(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _come_back(path: Path, settings: Any, hashes: dict[str, Any], *, resume: bool) -> None:
    if not resume:
        raise FileExistsError(f"{path} exists; expected resume, or a name that is free")
    if not (path / "config.json").exists():
        raise FileExistsError(f"{path} exists and is not a run; expected a name that is free")
    for part in path.glob(".*.part"):  # of a process that was killed
        part.unlink()
    before, made = (_read_json(path / f"{name}.json") for name in ("config", "provenance"))
    for what, was, now in (
        ("config", before, settings),
        ("data or model", {name: made.get(name) for name in hashes}, hashes),
    ):
        names = [n for n in {**was, **now} if was.get(n, "absent") != now.get(n, "absent")]
        said = [f"{n} is {now.get(n, 'absent')!r}, was {was.get(n, 'absent')!r}" for n in names]
        if said:
            raise ValueError(f"{path} was made with another {what}: {'; '.join(said)}")
    here = {**_environment(), **hashes}
    seen = [{k: v for k, v in made.items() if k != "resumed"}, *made.get("resumed", [])]
    if here not in seen:
        _save_json(path / "provenance.json", {**made, "resumed": [*made.get("resumed", []), here]})


def _environment() -> dict[str, Any]:
    """What made the numbers, as far as this process can see: nothing of who or where."""
    device = jax.devices()[0]
    return {
        **_commit(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jaxpref")},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
    }


def _commit() -> dict[str, Any]:
    """The commit this file belongs to, and whether tracked files were changed since."""

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):  # installed from a wheel, or no git
        return {"commit": None, "dirty": None}


def _wandb(mode: str) -> Any:
    if mode not in ("off", "offline", "online"):
        raise ValueError(f"wandb is {mode!r}, expected 'off', 'offline' or 'online'")
    if mode == "off":
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError:
        message = f"wandb is {mode!r}, but it is not installed: pip install 'jaxpref[wandb]'"
        raise ImportError(message) from None
