"""Prints what a model says to some unseen prompts before and after, from a run of `forecast`.

python -m experiments.protocol.texts runs/forecast/mine --seed 0
"""

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tyro

from experiments.protocol import settings
from jaxpref import runs
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.score import command

SPOKEN = ("greedy", "sampled")


def table(
    prompts: list[str], said: Mapping[str, np.ndarray], tokenizer: Tokenizer, arms: tuple[str, ...]
) -> str:
    """Markdown: a row for each prompt and way of speaking, a column for each model.

    Args:
        prompts: Texts.
        said: ``{arm}_{way} [prompts time]``, token ids padded by -1.
        tokenizer: Of the model.
        arms: Columns, the start first.
    """
    lines = [f"| prompt | | {' | '.join(arms)} |", "|---" * (2 + len(arms)) + "|"]
    for i, prompt in enumerate(prompts):
        for way in SPOKEN:
            cells = [_text(tokenizer, said[f"{arm}_{way}"][i]) for arm in arms]
            lines.append(f"| {_cell(prompt)} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return _cell(tokenizer.decode(ids[ids >= 0].tolist(), skip_special=True))


def _cell(text: str) -> str:
    """One line, with nothing that Markdown would read."""
    words = " ".join(text.split())
    return "".join(f"\\{x}" if x in "\\|`*_<>[]#" else x for x in words) or "(nothing)"


@dataclasses.dataclass(frozen=True)
class Options:
    """Which run."""

    run: tyro.conf.Positional[str]
    """Folder of a run of `experiments.forecast`."""
    seed: int = 0
    data: str | None = None
    """The run's file of pairs, if it lies elsewhere now."""


def main() -> None:
    """The command line."""
    options = tyro.cli(Options, prog="python -m experiments.protocol.texts", description=__doc__)
    with command.one_line("texts"):
        record = runs.load(options.run)
        lab = importlib.import_module("experiments.forecast")
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.config.items()
        }
        config = lab.Config(**kept | ({"data": options.data} if options.data else {}))
        if not 0 <= options.seed < config.seeds:
            raise ValueError(f"seed: got {options.seed}, expected 0 to {config.seeds - 1}")
        subject, pairs = settings.load(config)
        rows = record.arrays["rows"][options.seed, config.trained :][: config.texts]
        prompts = [subject.tokenizer.decode(pairs.pairs[row].tokens[0][: pairs.pairs[row].starts[0]]
                                            .tolist()) for row in rows]  # fmt: skip
        said = {name: x[options.seed] for name, x in record.arrays.items()
                if name.endswith(SPOKEN)}  # fmt: skip
        sys.stdout.write(table(prompts, said, subject.tokenizer, ("start", "dpo", "sft")) + "\n")


if __name__ == "__main__":
    main()
