"""One DPO step of SmolLM2-135M, forward, backward and update: ours beside plain torch.

Both get the same token arrays, float32, a reference computed once, no dropout, no recomputation of
layers, no clipping; each runs in a process of its own on all cores of this process, and their steps
alternate. A comparison is void unless all log-probabilities of all response tokens agree. What ours
leaves out is what the mathematics does not need: the prompt's second encoding and the logits of
tokens that are not scored. ``--prompt 1`` takes nearly all of the first away.

Run:     python -m benchmarks.train_step
Takes:   12 minutes on 2 cores, 8 GB of memory
Prints:  a table, and as last line one JSON object
"""

import dataclasses
import functools
import json
import operator
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import frameworks
from benchmarks.frameworks import Measured, Model, Optimizer, Size, ratios
from jaxpref.score.command import one_line

HEADER = "pairs x tokens framework   step s     (min..max) first s peak GB  of GEMM peak"
ROW = "{:>14} {:<9} {:8.3f} {:7.3f}..{:6.3f} {:7.1f} {:7.2f} {:13.2f}"
# Nats a token between two float32 programs of 30 layers: root mean square, and largest. Against
# float64, on 8 pairs of 512 tokens, ours is off by 9e-6 and 9e-5, torch by 6e-6 and 5e-5: rounding
# both, and of thousands of tokens one is always far out.
TOLERANCE, LARGEST = 2e-5, 3e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: tuple[int, ...] = (2, 8)
    time: tuple[int, ...] = (128, 512)
    """Tokens of a sequence, prompt and response."""
    prompt: float = 0.5
    """Share of the tokens that are the prompt, or a number of tokens if at least 1."""
    frameworks: tuple[str, ...] = tuple(frameworks.FRAMEWORKS)
    """The first is compared with each of the others."""
    repeats: int = 5
    """Steps of each framework at each size, after the first, which compiles."""
    optimizer: Optimizer = "adamw"
    model: Model = "smollm2"
    product: int = 2048
    """Rows of the square matrices whose product gives the machine's peak."""


SMOKE = Config(
    pairs=(2,), time=(8,), frameworks=("jaxpref",), repeats=2, model="tiny", product=64
)  # fmt: skip


def main(config: Config) -> dict[str, Any]:
    """Measures, prints the table and the JSON object, and returns the latter."""
    config = dataclasses.replace(config, frameworks=frameworks.installed(config.frameworks))
    # Huge pages for all: without them fresh memory costs more time than the arithmetic on it.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    result = {}
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        if config.frameworks != ("jaxpref",):
            frameworks.spawn(frameworks.export, config.model, Path(folder)).join()
        for pairs in config.pairs:
            for time in config.time:
                prompt = int(config.prompt if config.prompt >= 1 else config.prompt * time)
                size = Size(pairs, time, prompt)
                measured = measure(config, size, Path(folder))
                result[size.name] = report(config, size, measured)
    print(json.dumps(result))
    return result


def measure(config: Config, size: Size, folder: Path) -> dict[str, Measured]:
    """All frameworks at one size."""
    arguments = size, config.model, config.optimizer, config.product, folder
    contenders = {name: (frameworks.FRAMEWORKS[name], *arguments) for name in config.frameworks}
    return frameworks.measure(contenders, config.repeats, functools.partial(agree, size))


def agree(size: Size, logp: dict[str, np.ndarray]) -> None:
    """Ends the program unless all log-probabilities agree."""
    first, *others = logp
    for other in others:
        off = np.abs(logp[first].astype(float) - logp[other])
        mean, most = float(np.sqrt(np.square(off).mean())), float(off.max())
        if not (mean < TOLERANCE and most < LARGEST):
            sys.exit(
                f"{size.name}: void: {first} and {other} differ by {mean:.1e} nats a token, "
                f"root mean square, and {most:.1e} on one"
            )


def work(model: Model, size: Size, name: str) -> float:
    """Floating-point operations that a step needs as this framework lays it out.

    Two for each weight and token in the forward pass, four in the backward one; attention over the
    tokens that are seen; the unembedding where logits are made. Recomputation is not counted.
    """
    m, response = frameworks.MODELS[model], size.time - size.prompt
    weights = 3 * m["mlp_width"] + 2 * m["head_width"] * (m["heads"] + m["kv_heads"])
    if name == "jaxpref":  # each response's last token predicts nothing
        encoded, logits = size.prompt + 2 * (response - 1), 2 * response
        seen = size.prompt**2 / 2 + 2 * (response - 1) * (size.prompt + response / 2)
    else:
        encoded, logits, seen = 2 * size.time, 2 * size.time, size.time**2
    attention = 2 * m["heads"] * m["head_width"] * seen
    layers = m["layers"] * (m["width"] * weights * encoded + attention)
    return 6.0 * size.pairs * (layers + m["vocab"] * m["width"] * logits)


def report(config: Config, size: Size, measured: dict[str, Measured]) -> dict[str, Any]:
    """Prints the rows of one size and returns its ratios, ours over theirs."""
    ours = measured[config.frameworks[0]]
    result: dict[str, Any] = {}
    for name, run in measured.items():
        fastest = min(min(each.products) for each in measured.values())
        peak = 2.0 * config.product**3 / fastest
        step = statistics.median(run.turns)
        share = work(config.model, size, name) / step / peak
        print(ROW.format(size.name, name, step, min(run.turns), max(run.turns), run.first,
                         run.memory / 1e9, share))  # fmt: skip
        if run is ours:
            result |= {"step": step, "first_step": run.first, "of_gemm_peak": share}
            result |= {"memory": run.memory, "gemm_peak": peak}
            continue
        result |= ratios(ours, run, name)
        apart = map(abs, map(operator.sub, ours.returned, run.returned))
        result[f"vs_{name}_loss"] = max(apart)
    return result


if __name__ == "__main__":
    with one_line("train_step"):
        main(tyro.cli(Config))
