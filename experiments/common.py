"""What every experiment on text pairs starts from: a model, pairs as arrays, and a command line."""

import dataclasses
import functools
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxpref import runs
from jaxpref.data import batches, chat, files, hub, preferences
from jaxpref.data.files import TextPair
from jaxpref.data.pairs import Counts, TokenPair, TooLong
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import decoder, pretrained
from jaxpref.models.decoder import Policy
from jaxpref.score import command as line
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.pairset import PairSet
from jaxpref.training.step import init_state, make_step

SMALL: dict[str, Any] = {
    "width": 128,
    "layers": 4,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 32,
    "mlp_width": 384,
}


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def at_least(least: float, config: Any, *names: str) -> None:
    """Raises if one of these fields of a configuration, or a number of one, is smaller."""
    for name in names:
        for value in _each(getattr(config, name)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")


def above(bound: float, config: Any, *names: str) -> None:
    """Raises if one of these fields, or a number of one, is not larger; None passes."""
    for name in names:
        for value in _each(getattr(config, name)):
            if value is not None and not value > bound:
                raise ValueError(f"{name}: got {value}, expected above {bound}")


def finite(config: Any) -> None:
    """Raises if a number of a configuration is none, or infinite where its default is not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        allowed = _each(field.default)
        for each in _each(value):
            if isinstance(each, float) and not (math.isfinite(each) or each in allowed):
                raise ValueError(f"{field.name}: got {each}, expected a finite number")


Bad = Literal["error", "skip"]
"""What becomes of a row that cannot be used: an error, or left out, counted and named."""
DATE = str(chat.DATE)
"""Today, as far as chat templates know."""


def read(config: Any) -> files.Found:
    """The pairs of a run: those of ``config.data``, else the shipped ones.

    Of the configuration it reads ``data``, ``bad`` and ``columns``.
    """
    columns = line.columns_of(config.columns)
    if not config.data:
        return files.Found(preferences.load(), [])
    return files.read(config.data, bad=dropped(config), columns=columns)


def dropped(config: Any) -> Literal["error", "drop"]:
    """``bad`` of a configuration as readers of files take it."""
    return "error" if config.bad == "error" else "drop"


def encoded(
    config: Any, rows: Sequence[TextPair], subject: "Subject", *, too_long: TooLong
) -> tuple[list[TokenPair], Counts]:
    """Their token ids, by ``bad``, ``end``, ``date`` and ``limit`` of the configuration."""
    return line.encode(
        rows, subject.policy, subject.tokenizer, bad=config.bad, end=line.end_of(config.end),
        date=line.date_of(config.date), limit=config.limit, too_long=too_long,
    )  # fmt: skip


class Subject(NamedTuple):
    """A model to look at."""

    policy: Policy
    params: PyTree
    tokenizer: Tokenizer
    revision: str | None = None  # commit of a model of the hub


@functools.lru_cache(maxsize=1)  # a run asks for it twice: for its hash, and to train
def open_model(model: str | None, *, seed: int = 0, **options: Any) -> Subject:
    """SmolLM2-135M-Instruct by default, a folder, GGUF file or hub name, or ``small``.

    ``small`` is a decoder of 4 layers and width 128 with random weights of this seed, and SmolLM2's
    tokenizer: the experiment trains it from scratch. Options are the decoder's: with ``scan=True``
    a program compiles as fast for many layers as for one.
    """
    known = model not in (None, "small")
    found = pretrained.load(model, **options) if known else pretrained.smollm2(**options)
    if found.tokenizer is None:
        raise ValueError(f"model: {model} has no tokenizer.json, expected one")
    if model != "small":
        return Subject(found.policy, found.params, found.tokenizer, found.revision)
    config = decoder.DecoderConfig(vocab=found.config.vocab, **SMALL)
    policy, params = decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(seed), **options))
    return Subject(policy, params, found.tokenizer)


def enough(what: str, wanted: int, there: int) -> None:
    """Raises if a run draws more pairs than there are."""
    if wanted > there:
        raise ValueError(f"{what}: a run draws {wanted}, expected at most the {there} there are")


def hashes(subject: Subject, pairs: PairSet) -> dict[str, Any]:
    """Of model and pairs, a hub model's commit, and the rows that were skipped: a provenance."""
    found = {"model": pretrained.hash_params(subject.params), "data": pairs.digest}
    found |= {"model_revision": subject.revision} if subject.revision else {}
    return found | {"skipped": without_folders(pairs.skipped)}


def without_folders(faults: Sequence[str]) -> list[str]:
    """Faults of rows as a provenance keeps them: a file's name, and not where it lies."""
    return [re.sub(r"^(?!tfds:).*?([^/\\]+, (?:line|row) )", r"\1", fault) for fault in faults]


def supervise(
    pairs: PairSet,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch: int,
    seed: int,
    among: Array | np.ndarray | None = None,
) -> PyTree:
    """Supervised updates on the chosen responses, mean nats a response.

    Of all pairs, or of those `among`.
    """
    if steps == 0:
        return params

    def loss(scores, _):
        return -scores.logp[:, 0]

    step = make_step(pairs.score, loss, optimizer)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, key=jax.random.key(seed))
    some = np.arange(len(pairs)) if among is None else np.asarray(among)
    bar = tqdm(range(steps), "supervised phase", unit="update", leave=False)
    for number in bar:
        rows = some[batches.order(len(some), batch, seed, number)]
        state, metrics, _ = step(state, pairs.rows(rows))
        bar.set_postfix(loss=f"{float(metrics['loss']):.2f}")
    return state.params


Optimizer = Literal["sgd", "rmsprop", "adam"]
DECAY = {"sgd": None, "rmsprop": 0.99, "adam": 0.999}  # of the running mean of squares


def unit_optimizer(name: str) -> optax.GradientTransformation:
    """The optimizer at learning rate 1: its update scales with the learning rate."""
    if name == "adam":
        return optax.adam(1.0, b2=DECAY["adam"])
    return optax.sgd(1.0) if name == "sgd" else torch_rmsprop(1.0, decay=DECAY["rmsprop"])


@functools.partial(jax.jit, static_argnames="name", donate_argnames=("params", "state"))
def apply_update(name: str, params: PyTree, state: PyTree, gradient: PyTree, rate: Any) -> Any:
    """Parameters and optimizer state after one update; the old ones are used up."""
    update, state = unit_optimizer(name).update(gradient, state, params)
    return jax.tree.map(lambda p, u: p + jnp.asarray(rate, u.dtype) * u, params, update), state


Arrays = Mapping[str, np.ndarray]


def kept(folder: Path | None, name: str, make: Callable[[], Arrays]) -> dict[str, np.ndarray]:
    """The arrays of one part of a run: read if `folder` has them, else made and kept there."""
    file = folder / "parts" / f"{name}.npz" if folder else None
    if file and file.exists():
        return runs.load_arrays(file)
    arrays = {key: np.asarray(value) for key, value in make().items()}
    if file:
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
        parsed,
        prog=program,
        description=description,
        return_unknown_args=True,
    )
    if unknown:
        sys.exit(f"{experiment}: unknown {' '.join(unknown)}, expected what {program} --help lists")
    with line.one_line(experiment, again="--resume goes on"):
        finite(settings)
        shared = {"workers": options.workers} if isinstance(options, Shared) else {}
        at_least(1, options, *shared)
        made_of = {**hashes(settings), **hub.data_revision(getattr(settings, "data", None))}
        run_folder = runs.create(
            experiment,
            options.name,
            dataclasses.asdict(settings),
            resume=options.resume,
            provenance=made_of,
            wandb=options.wandb,
        )
        arrays = run(settings, run_folder.path, **shared)
        rows = summarise(settings, arrays)
        numbered = itertools.count()
        lines = [{"step": next(numbered), **each} for each in metrics(settings, arrays)]
        run_folder.save(arrays=arrays, summary={"rows": rows}, metrics=lines)
        print(report(settings, rows))
        print(f"\nfigure: {run_folder.save_figure(draw(settings, arrays))}")
        line.tell("skipped", made_of.get("skipped", ()))


def command_of(lab: ModuleType) -> None:
    """`command` of an experiment that is a folder, from what its package exports."""
    optional = {"metrics": lab.metrics} if hasattr(lab, "metrics") else {}
    command(
        lab.__name__.rpartition(".")[2], lab.Config, description=lab.__doc__, hashes=lab.hashes,
        run=lab.run, summarise=lab.summarise, report=lab.report, draw=lab.draw, **optional,
    )  # fmt: skip
