"""The command line of an experiment, and the parts of a run on disk."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.protocol import checks, inputs
from jaxpref import runs
from jaxpref.data import hub
from jaxpref.score import command as line
from jaxpref.training import parallel

Arrays = Mapping[str, np.ndarray]
STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
"""Of all figures."""


def kept(folder: Path | None, name: str, make: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """The arrays of one part of a run: read if `folder` has them, else made and kept there."""
    file = folder / "parts" / f"{name}.npz" if folder else None
    if file and parallel.agreed(file.exists):
        return runs.load_arrays(file)
    arrays = {key: np.asarray(value) for key, value in parallel.to_host(dict(make())).items()}
    if file and jax.process_index() == 0:
        file.parent.mkdir(exist_ok=True)
        runs.save_arrays(file, arrays)
    return arrays


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the run goes, and how."""

    name: str = "mine"
    """Folder under runs/."""
    resume: bool = False
    """Continue a run that was stopped, from its finished parts; its settings must be the same."""
    wandb: Literal["off", "offline", "online"] = "off"


@dataclasses.dataclass(frozen=True)
class Shared(Options):
    """The same of an experiment whose runs can be shared out."""

    workers: int = 1
    """Processes that share the runs, each with its own cores. Two are faster than one on CPU."""


def command(
    experiment: str,
    config: type,
    *,
    description: str | None,
    hashes: Callable[[Any], Mapping[str, Any]],
    run: Callable[..., Arrays],
    summarise: Callable[[Any, Arrays], list[dict[str, Any]]],
    report: Callable[[Any, list[dict[str, Any]]], str],
    draw: Callable[[Any, Arrays], Figure],
    metrics: Callable[[Any, Arrays], Iterable[Mapping[str, Any]]] = lambda config, arrays: (),
) -> None:
    """The command line of an experiment: runs, saves, prints table and verdict, draws.

    Args:
        experiment: Its name, the folder of its runs.
        config: Frozen dataclass of all that decides the numbers; its fields become flags.
        description: For ``--help``.
        hashes: ``config ->`` hashes of model and data and ``skipped`` rows, for the provenance. It
            may raise for bad settings, before any time is spent.
        run: ``(config, folder) -> arrays``; ``--workers`` is there if it takes ``workers=``.
        summarise: ``(config, arrays) -> rows`` of the table, numbers and names only.
        report: ``(config, rows) ->`` the table and the verdict in words.
        draw: ``(config, arrays) -> figure``.
        metrics: ``(config, arrays) ->`` lines of ``metrics.jsonl``, without their ``step``.
    """
    program = f"python -m experiments.{experiment}"
    shares = "workers" in inspect.signature(run).parameters
    kind = Shared if shares else Options

    def parsed(
        settings: tyro.conf.OmitArgPrefixes[config],  # pyright: ignore[reportInvalidTypeForm]  # tyro reads the class at run time
        options: tyro.conf.OmitArgPrefixes[kind],  # pyright: ignore[reportInvalidTypeForm]
    ) -> tuple[Any, Options]:
        return settings, options

    (settings, options), unknown = tyro.cli(
        parsed, prog=program, description=description, return_unknown_args=True
    )
    with line.one_line(experiment, again="--resume goes on"):
        if unknown:
            given = " ".join(unknown)
            raise ValueError(f"unknown {given}, expected what {program} --help lists")
        parallel.start()
        checks.finite(settings)
        shared = {"workers": options.workers} if isinstance(options, Shared) else {}
        checks.at_least(1, options, *shared)
        if shared.get("workers", 1) > 1 and jax.default_backend() != "cpu":
            raise ValueError(f"workers: got {shared['workers']} on {jax.default_backend()}, "
                             "expected 1: each would take the device whole")  # fmt: skip
        made_of = {**hashes(settings), **hub.data_revision(getattr(settings, "data", None))}
        run_folder = runs.create(
            experiment, options.name, dataclasses.asdict(settings), resume=options.resume,
            provenance=made_of, wandb=options.wandb,
        )  # fmt: skip
        arrays = run(settings, run_folder.path, **shared)
        rows = summarise(settings, arrays)
        numbered = itertools.count()
        lines = [{"step": next(numbered), **each} for each in metrics(settings, arrays)]
        run_folder.save(arrays=arrays, summary={"rows": rows}, metrics=lines)
        if not run_folder.writes:
            return
        print(report(settings, rows))
        with plt.rc_context(STYLE):
            print(f"\nfigure: {run_folder.save_figure(draw(settings, arrays))}")
        line.tell("skipped", made_of.get("skipped", ()))


def command_of(lab: ModuleType) -> Callable[[], None]:
    """`command` of an experiment that is a folder, from what its package exports.

    Where that has no ``hashes``, they are of the model and the pairs of its ``load``.
    """

    def main() -> None:
        optional = {"metrics": lab.metrics} if hasattr(lab, "metrics") else {}
        hashes = getattr(lab, "hashes", lambda config: inputs.hashes(*lab.load(config)))
        command(
            lab.__name__.rpartition(".")[2], lab.Config, description=lab.__doc__, hashes=hashes,
            run=lab.run, summarise=lab.summarise, report=lab.report, draw=lab.draw, **optional,
        )  # fmt: skip

    return main
