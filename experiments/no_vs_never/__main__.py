"""The command line: runs, saves, prints the table and the verdict, draws the figure."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import tyro

import experiments.no_vs_never as lab
from experiments import common
from experiments.no_vs_never.measure import prompt_rows
from experiments.no_vs_never.protocol import (
    Config,
    answer_ids,
    cells,
    digest,
    load_model,
    load_questions,
    read_questions,
    tokenizer_of,
)
from jaxpref import runs
from jaxpref.data import hub
from jaxpref.models import bounds, pretrained
from jaxpref.score import command


def _validate(config: Config) -> None:
    """Every error that the settings can have, before any time is spent."""
    tokenizer = tokenizer_of(config)
    common.at_least(1, config, "prompts", "updates", "sft_batch")
    common.at_least(0, config, "seed")
    for name in ("pairs", "losses", "sft_steps", "learning_rates", "train"):
        if not getattr(config, name):
            raise ValueError(f"{name}: got none, expected one or more")
    if not 0 < config.decay < 1:
        raise ValueError(f"decay: got {config.decay}, expected a number between 0 and 1")
    for name in ("beta", "tau", *("learning_rates", "sft_learning_rate")):
        for value in np.atleast_1d(getattr(config, name)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected a positive number")
    if min(config.sft_steps) < 0:
        raise ValueError(f"sft_steps: got {min(config.sft_steps)}, expected 0 or more")
    for pair in config.pairs:
        chosen, rejected = answer_ids(pair, tokenizer)
        if chosen == rejected:
            raise ValueError(f"pairs: {pair!r} prefers a word to itself")
        prompt_rows(config, pair)
    # The question, the end of its line, and any one token as the answer.
    asked = [tokenizer.encode(x.question + "\n") for x in load_questions(config)]
    places = [f"question {number}" for number in range(len(asked))]
    bounds.check(load_model(config.model).policy.bounds, [[*ids, 0] for ids in asked], places)


def _metrics(config: Config, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A line for each update of each cell, numbered through."""
    steps = itertools.count()
    for i, cell in enumerate(cells(config)):
        for update, (loss, logp) in enumerate(
            zip(arrays["loss"][i], arrays["logp"][i], strict=True)
        ):
            yield {
                "step": next(steps),
                **cell._asdict(),
                "update": update,
                "loss": float(loss),
                "logp_chosen": float(logp[0]),
                "logp_rejected": float(logp[1]),
                "entropy": float(arrays["entropy"][i][update]),
                "top": int(arrays["top"][i][update]),
            }


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the run goes, and how."""

    config: tyro.conf.OmitArgPrefixes[Config] = dataclasses.field(default_factory=Config)
    name: str = "mine"
    """Folder under runs/no_vs_never."""
    resume: bool = False
    """Continue a run that was stopped, from its finished cells; its settings must be the same."""
    workers: int = 1
    """Processes that share the cells, each with its own cores. Two are faster than one on CPU."""
    wandb: Literal["off", "offline", "online"] = "off"


def main() -> None:
    """Runs, saves, prints the table and the verdict, and draws the figure."""
    program = "python -m experiments.no_vs_never"
    options, unknown = tyro.cli(
        Options, prog=program, description=lab.__doc__, return_unknown_args=True
    )
    if unknown:
        sys.exit(f"no_vs_never: unknown {' '.join(unknown)}, expected what {program} --help lists")
    config = options.config
    with command.one_line("no_vs_never", again="--resume goes on"):
        common.at_least(1, options, "workers")
        _validate(config)
        common.finite(config)
        skipped = read_questions(config.data, config.bad).faults
        model = load_model(config.model)
        made_of = {
            "model": pretrained.hash_params(model.params),
            "data": digest(load_questions(config)),
            "skipped": common.without_folders(skipped),
            **({"model_revision": model.revision} if model.revision else {}),
            **hub.data_revision(config.data),
        }
        run_folder = runs.create(
            "no_vs_never",
            options.name,
            dataclasses.asdict(config),
            resume=options.resume,
            provenance=made_of,
            wandb=options.wandb,
        )
        arrays = lab.run(config, run_folder.path, workers=options.workers)
        rows = lab.summarise(config, arrays)
        run_folder.save(arrays=arrays, summary={"rows": rows}, metrics=_metrics(config, arrays))
        figure = lab.draw(config, arrays)
        print(lab.table(rows, config), lab.verdict(rows), sep="\n\n")
        print(f"\nfigure: {run_folder.save_figure(figure)}")
        command.tell("skipped", skipped)


if __name__ == "__main__":
    main()
