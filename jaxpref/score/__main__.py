"""Scores of every pair of a file of preferences, a row a pair.

Scores say before training which chosen responses will fall: larger, more likely. What a row of the
result is, and what each score costs: `jaxpref.score.score_pairs`. Finished batches are kept beside
the result until it is whole; the same command goes on after a kill.
"""

import collections
import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from scipy import stats

from jaxpref.data import files
from jaxpref.data.files import TextPair
from jaxpref.data.files._rows import needed
from jaxpref.data.pairs import encode
from jaxpref.models import pretrained
from jaxpref.score.pairs import DEFAULT, Score, score_pairs
from jaxpref.training import parallel


@dataclasses.dataclass(frozen=True)
class Options:
    """What to score, and where to put it."""

    data: str
    """A file of pairs: JSONL, HH-RLHF (.gz too) or Parquet; or ``tfds:NAME``."""
    out: Path
    """Parquet file of the scores."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file; by default SmolLM2-135M-Instruct."""
    columns: tuple[Score, ...] = DEFAULT
    """Which scores."""
    bad: Literal["error", "skip"] = "error"
    """A row with an empty response, or without a shared prompt: an error, or left out and told."""
    limit: int | None = None
    """Most tokens of prompt and response; by default any number."""
    too_long: Literal["error", "truncate_left"] = "error"
    """A pair over the limit: an error, or its prompt loses its first tokens, and it is told."""
    tokens: int = 2048
    """Tokens of a batch."""
    filter: Path | None = None
    """Write the rows with the lowest scores here, in the format of the data."""
    by: Score = "ches_length_normalised"
    """Score that the filter reads."""
    keep: float = 0.5
    """Share of the pairs that it keeps."""


def read(options: Options) -> list[TextPair]:
    """The pairs; says which rows were left out, and which come twice."""
    rows = list(files.rows(options.data))
    pairs = files.pairs_of(rows, bad="error" if options.bad == "error" else "drop")
    kept = {pair.row for pair in pairs}
    _tell("left out", [row for row in range(len(rows)) if row not in kept])
    seen = collections.defaultdict(list)
    for pair in pairs:
        seen[repr(pair[:3])].append(pair.row)
    _tell("the same as an earlier row", [row for same in seen.values() for row in same[1:]])
    return pairs


def _tell(what: str, rows: Sequence[Any]) -> None:
    if rows:
        some = ", ".join(map(str, rows[:20])) + ", ..." * (len(rows) > 20)
        print(f"{len(rows)} rows {what}: {some}", file=sys.stderr)


def main(options: Options) -> dict[str, np.ndarray]:
    """Reads, scores, writes; returns the columns."""
    for name in ("pyarrow", "rapidfuzz"):
        needed(name, f"{options.out}: to write the scores", name)
    if not 0 < options.keep <= 1:
        raise ValueError(f"keep: got {options.keep}, expected more than 0 and at most 1")
    if options.by not in options.columns and options.filter:
        raise ValueError(f"by: got {options.by}, expected one of the columns")
    pairs = read(options)
    # With the layers scanned a program compiles one of them; there is one for each length.
    path = options.model
    model = pretrained.load(path, scan=True) if path else pretrained.smollm2(scan=True)
    if model.tokenizer is None:
        raise ValueError(f"model: {options.model} has no tokenizer.json, expected one")
    encoded, counts = encode(
        pairs, model.tokenizer, end="eos", limit=options.limit, too_long=options.too_long
    )
    if counts.truncated:
        print(f"{counts.truncated} prompts lost their first tokens", file=sys.stderr)
    folder = options.out.with_name(options.out.name + ".parts")
    scores = score_pairs(
        model.policy, model.params, encoded, columns=options.columns, tokens=options.tokens,
        places=[pair.place for pair in pairs], folder=folder,
        mesh=parallel.data_mesh() if jax.device_count() > 1 else None,
    )  # fmt: skip
    scores = {"row": np.array([pair.row for pair in pairs]), **scores}
    _write(options.out, scores)
    print(f"{options.out}: {len(pairs)} pairs\n{table(scores, options.columns)}")
    if options.filter:
        kept = lowest(scores[options.by], options.keep)
        files.filter_file(options.data, scores["row"][kept], options.filter)
        print(f"{options.filter}: {len(kept)} rows with the lowest {options.by}")
    shutil.rmtree(folder)
    return scores


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


def _write(out: Path, columns: dict[str, np.ndarray]) -> None:
    import pyarrow
    import pyarrow.parquet

    partial = out.with_name(out.name + ".part")
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    partial.replace(out)


def run() -> None:
    """The command line."""
    try:
        main(tyro.cli(Options, prog="python -m jaxpref.score", description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"score: {error}")


if __name__ == "__main__":
    run()
