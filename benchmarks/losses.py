"""Every loss of the catalogue on a million pairs, value and gradient, against DPO.

All get the same arrays, float32, and are compiled. Turns of a loss and of DPO alternate, and the
ratio is the median of those of neighbouring turns: what else the machine does falls on both. Losses
of tokens read 8 tokens a response here, so that their arrays are 8 times as large; those of a whole
batch sort all pairs.

Run:     python -m benchmarks.losses
Takes:   5 minutes on 2 cores, 2 GB of memory
Prints:  a table, slowest first, and as last line one JSON object
"""

import dataclasses
import functools
import json
import operator
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxpref.losses import __main__ as catalogue

HEADER = f"{'loss':<36} {'ms':>8} {'(min..max)':>17} {'of DPO':>7}  compiled in s"
ROW = "{:<36} {:8.1f} {:8.1f}..{:7.1f} {:7.2f} {:14.2f}"
LENGTHS = (8, 6)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: int = 1_000_000
    repeats: int = 7
    """Turns of each loss, after the first, which compiles."""
    losses: tuple[str, ...] = ()
    """Names; by default all of the catalogue."""


SMOKE = Config(pairs=8, repeats=2, losses=("dpo", "simpo", "aot", "confpo", "aft", "kto"))


@dataclasses.dataclass
class Measured:
    """One loss; seconds."""

    compiled: float
    turns: list[float] = dataclasses.field(default_factory=list)
    dpo: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Time against DPO's."""
        return statistics.median(map(operator.truediv, self.turns, self.dpo))


def main(config: Config) -> dict[str, Any]:
    """Measures, prints the table and the JSON object, and returns the latter."""
    found = catalogue.catalogue()
    names = config.losses or tuple(found)
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise SystemExit(f"losses: got {unknown[0]}, expected names of the catalogue")
    logp, reference = _pairs(config.pairs)
    dpo, of_dpo, _ = _compile(found["dpo"], logp, reference)
    measured = {}
    for name in names:
        turn, data, compiled = _compile(found[name], logp, reference)
        measured[name] = Measured(compiled)
        for _ in range(config.repeats):
            measured[name].turns.append(_seconds(turn, logp, data))
            measured[name].dpo.append(_seconds(dpo, logp, of_dpo))
    return report(config, measured)


def report(config: Config, measured: dict[str, Measured]) -> dict[str, Any]:
    """Prints the table and the JSON object, and returns the latter: times against DPO's."""
    print(HEADER)
    slowest = sorted(measured.items(), key=lambda item: -item[1].ratio)
    for name, run in slowest:
        milliseconds = sorted(1e3 * x for x in run.turns)
        print(ROW.format(name, statistics.median(milliseconds), milliseconds[0], milliseconds[-1],
                         run.ratio, run.compiled))  # fmt: skip
    result: dict[str, Any] = {f"{name}_vs_dpo_time": run.ratio for name, run in slowest}
    result |= {"pairs": config.pairs, "worst": slowest[0][1].ratio}
    print(json.dumps(result))
    return result


def _pairs(pairs: int) -> tuple[jax.Array, jax.Array]:
    draw = np.random.default_rng(0)
    reference = -20 * draw.random((pairs, 2), np.float32)
    logp = np.minimum(reference + draw.normal(size=(pairs, 2)).astype(np.float32), -1e-3)
    return jnp.asarray(logp), jnp.asarray(reference)


def _compile(
    loss: Callable, logp: jax.Array, reference: jax.Array
) -> tuple[Callable, dict[str, jax.Array], float]:
    """Value and gradient as one program, its data, and the seconds that compiling took."""
    data = catalogue.arguments(loss, reference, LENGTHS)
    whole = loss.__name__ in catalogue.BATCHWISE

    def both(x: jax.Array, data: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of = loss if whole else functools.partial(catalogue.of_pairs, loss)
        value, back = jax.vjp(lambda x: of(x, **data), x)
        return value, back(jnp.ones_like(value))[0]

    start = time.perf_counter()
    program = jax.jit(both).lower(logp, data).compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(program(logp, data))
    return program, data, seconds


def _seconds(program: Callable, *arrays: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Config))
