"""Scores of every pair of a file of preferences, a row a pair.

Scores say before training which chosen responses will fall: larger, more likely. What a row of the
result is, and what each score costs: `jaxpref.score.score_pairs`. Finished batches are kept beside
the result until it is whole; the same command goes on after a kill.
"""

import collections
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from scipy import stats

from jaxpref.data import chat, files, hub
from jaxpref.data.files import TextPair
from jaxpref.data.files._rows import needed
from jaxpref.models import pretrained
from jaxpref.score import command
from jaxpref.score.pairs import DEFAULT, Score, score_pairs
from jaxpref.training import parallel


@dataclasses.dataclass(frozen=True)
class Options:
    """What to score, and where to put it."""

    data: str
    """A file of pairs: JSONL, JSON, CSV, HH-RLHF (.gz too) or Parquet; ``tfds:NAME``; or a
    data set of the Hugging Face hub, ``org/name:split@revision``."""
    out: Path
    """Parquet file of the scores."""
    model: str | None = None
    """A Hugging Face folder, a GGUF file, or ``org/name@revision`` of the hub; by default
    SmolLM2-135M-Instruct."""
    scores: tuple[Score, ...] = DEFAULT
    """Which scores."""
    columns: str = ""
    """The file's own names of columns, ``chosen=good,rejected=bad``; ``system=`` is not read."""
    bad: Literal["error", "skip"] = "error"
    """A row that cannot be used: an error, or left out, counted and named."""
    end: str = "eos"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = str(chat.DATE)
    """Today, for a chat template that asks: the same text, and the same scores, on every day."""
    limit: int | None = None
    """Most tokens of prompt and response; by default any number."""
    too_long: Literal["error", "truncate_left"] = "error"
    """A pair over the limit: a bad row, or its prompt loses its first tokens, and it is told."""
    tokens: int = 2048
    """Tokens of a batch."""
    mesh: str = ""
    """Devices, ``data=2,fsdp=4``, `jaxpref.training.parallel`; by default pairs are spread over
    all."""
    filter: Path | None = None
    """Write the rows with the lowest scores here, in the format of the data."""
    by: Score = "alpha_weighted_ches"
    """Score that the filter reads; computed even if `--scores` does not name it. The default is
    what was measured: over pairs that were trained on (an epoch of DPO or IPO, SmolLM2-135M), its
    rank correlation with the change of the chosen log-probability was -0.89 on 128 pairs of HH-RLHF
    and -0.84 on 96 short ones, at equal chosen length -0.48 and -0.71. CHES had -0.47 and -0.41, as
    the difference of lengths alone has; ches_length_normalised +0.24 and -0.16. Other pairs than
    those trained on were not looked at. Tables: docs/ches_percentiles.md"""
    keep: float = 0.5
    """Share of the pairs that it keeps."""


def main(options: Options) -> dict[str, np.ndarray]:
    """Reads, scores, writes; returns the columns. Of several processes the first one writes."""
    parallel.start()
    columns, end, date = _check(options)
    several = parallel.mesh() if jax.device_count() > 1 else None
    mesh = parallel.parse(options.mesh) if options.mesh else several
    bad = "error" if options.bad == "error" else "drop"
    found = files.read(options.data, bad=bad, columns=columns)
    _tell_of_copies(found.rows)
    # With the layers scanned a program compiles one of them; there is one for each length.
    path = options.model
    model = pretrained.load(path, scan=True) if path else pretrained.smollm2(scan=True)
    if model.tokenizer is None:
        raise ValueError(f"model: {options.model} has no tokenizer.json, expected one")
    encoded, counts = command.encode(
        found.rows, model.policy, model.tokenizer, bad=options.bad, end=end, date=date,
        limit=options.limit, too_long=options.too_long,
    )  # fmt: skip
    if counts.truncated:
        print(f"{counts.truncated} prompts lost their first tokens", file=sys.stderr)
    skipped = [*found.faults, *counts.faults]
    command.tell("skipped", skipped)
    pairs = [found.rows[pair.index] for pair in encoded]
    wanted = _wanted(options)
    made_with = {name: getattr(options, name) for name in ("end", "date", "too_long", "limit")}
    folder = options.out.with_name(options.out.name + ".parts")
    scores = score_pairs(
        model.policy, model.params, encoded, columns=wanted, tokens=options.tokens,
        places=[pair.place for pair in pairs], folder=folder,
        mesh=mesh, made_with=made_with,
    )  # fmt: skip
    scores = {"row": np.array([pair.row for pair in pairs]), **scores}
    if jax.process_index():
        return scores
    about = {
        "model": model.source.name,
        "revision": model.revision,
        **hub.data_revision(options.data),
        **made_with,
        "skipped": skipped,
    }
    _write(options.out, scores, about)
    print(
        f"{options.out}: {len(pairs)} pairs, {len(skipped)} rows skipped\n{table(scores, wanted)}"
    )
    if options.filter:
        kept = lowest(scores[options.by], options.keep)
        files.filter_file(options.data, scores["row"][kept], options.filter)
        print(f"{options.filter}: {len(kept)} rows with the lowest {options.by}")
    shutil.rmtree(folder)
    return scores


def _wanted(options: Options) -> tuple[Score, ...]:
    """The scores asked for, and the filter's."""
    more = options.by if options.filter else None
    return (*options.scores, *((more,) if more and more not in options.scores else ()))


def _check(options: Options) -> tuple[Any, Any, Any]:
    """What can be known before anything is read; the options of text as what they mean."""
    for name in ("pyarrow", "rapidfuzz"):
        needed(name, f"{options.out}: to write the scores", name)
    if not 0 < options.keep <= 1:
        raise ValueError(f"keep: got {options.keep}, expected more than 0 and at most 1")
    for name, least in (("tokens", 1), ("limit", 2)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    if not options.scores and not options.filter:
        raise ValueError("scores: got none, expected one or more")
    for name, path in (("out", options.out), ("filter", options.filter)):
        if path is not None:
            _check_place(name, path)
    if options.filter:
        files.check_filter(options.data, options.filter)
    return (
        command.columns_of(options.columns),
        command.end_of(options.end),
        command.date_of(options.date),
    )


def _check_place(name: str, path: Path) -> None:
    """A file can be made there: asked before hours of work, not after."""
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder, expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name}: {path} is in no folder that exists, expected one")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{name}: {path} cannot be written, expected a folder that can")


def _tell_of_copies(pairs: Sequence[TextPair]) -> None:
    seen = collections.defaultdict(list)
    for pair in pairs:
        seen[repr((*pair[:3], pair.tools, pair.template_kwargs))].append(pair.place)
    copies = [place for same in seen.values() for place in same[1:]]
    command.tell("the same as an earlier row", copies)


def table(scores: Mapping[str, np.ndarray], columns: Sequence[str]) -> str:
    """Lowest, median and highest of each score, and what of its order the lengths alone tell."""
    longer = scores["rejected_tokens"] - scores["chosen_tokens"]
    head = f"{'':<24}{'lowest':>12}{'median':>12}{'highest':>12}"
    lines = [f"{head}  Spearman with rejected - chosen tokens"]
    for name in columns:
        three = "".join(f"{x:>12.4g}" for x in np.quantile(scores[name], (0, 0.5, 1)))
        lines.append(f"{name:<24}{three}  {_spearman(scores[name], longer):+.2f}")
    return "\n".join(lines)


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    both = np.ptp(x) > 0 and np.ptp(y) > 0
    return np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1] if both else float("nan")


def lowest(scores: np.ndarray, share: float) -> np.ndarray:
    """Places of that share of the scores, rounded up, in their order; ties by place."""
    number = int(np.ceil(share * len(scores)))
    return np.sort(np.argsort(scores, kind="stable")[:number])


def _write(out: Path, columns: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """The columns, and beside them, as the file's metadata, what made them."""
    import pyarrow
    import pyarrow.parquet

    partial = out.with_name(out.name + ".part")
    told = {"jaxpref": json.dumps(about)}
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(told), partial)
    partial.replace(out)


def run() -> None:
    """The command line."""
    with command.one_line("score", again="the same command goes on"):
        main(tyro.cli(Options, prog="python -m jaxpref.score", description=__doc__))


if __name__ == "__main__":
    run()
