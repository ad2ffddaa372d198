"""Every loss of the catalogue on a million pairs, value and gradient, against DPO; its import.

All get the same arrays, float32, and are compiled. Turns of a loss and of DPO alternate, and the
ratio is the median of those of neighbouring turns: what else the machine does falls on both. Losses
of tokens read 8 tokens a response here, so that their arrays are 8 times as large; those of a whole
batch sort all pairs. A loss that takes more than thrice DPO's time is explained by what its
compiled program does more of: bytes, transcendental functions, other arithmetic, sorts or draws.

Importing `jaxpref.losses` is timed in new processes, alternating with importing jax alone.

Run:     python -m benchmarks.losses
Takes:   2 minutes on 2 cores, 2 GB of memory
Prints:  a table, slowest first, and as last line one JSON object
"""

import dataclasses
import functools
import json
import operator
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxpref.losses import __main__ as catalogue
from jaxpref.score.command import one_line

HEADER = f"{'loss':<36} {'ms':>8} {'(min..max)':>17} {'of DPO':>7}  compiled in s  why"
ROW = "{:<36} {:8.1f} {:8.1f}..{:7.1f} {:7.2f} {:14.2f}  {}"
LENGTHS = (8, 6)
SLOW = 3.0  # times DPO: from here on a reason is due
COSTS = {"bytes accessed": "bytes", "transcendentals": "exp and log", "flops": "other arithmetic"}
UNEXPLAINED = "more than its arithmetic needs"
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: int = 1_000_000
    repeats: int = 7
    """Turns of each loss, after the first, which compiles."""
    losses: tuple[str, ...] = ()
    """Names; by default all of the catalogue."""
    imports: int = 7
    """New processes of either kind."""


SMOKE = Config(
    pairs=8, repeats=2, losses=("dpo", "simpo", "aot", "confpo", "aft", "kto"), imports=1
)


@dataclasses.dataclass
class Measured:
    """One loss; seconds."""

    compiled: float
    more: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the program does, in units of what DPO's does."""
    orders: str = ""
    """That it sorts or draws."""
    turns: list[float] = dataclasses.field(default_factory=list)
    dpo: list[float] = dataclasses.field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Time against DPO's."""
        return statistics.median(map(operator.truediv, self.turns, self.dpo))

    @property
    def why(self) -> str:
        """The reason for a time far above DPO's, nothing for others."""
        if self.ratio <= SLOW:
            return ""
        if self.orders:
            return self.orders
        what, times = max(self.more.items(), key=lambda item: item[1])
        return f"{times:.1f} times the {what}" if 2 * times >= self.ratio else UNEXPLAINED


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
        measured[name] = Measured(compiled, _more(turn, dpo), _orders(turn))
        for _ in range(config.repeats):
            measured[name].turns.append(_seconds(turn, logp, data))
            measured[name].dpo.append(_seconds(dpo, logp, of_dpo))
    return report(config, measured, imports(config.imports))


def report(
    config: Config, measured: dict[str, Measured], seconds: dict[str, float]
) -> dict[str, Any]:
    """Prints the table and the JSON object, and returns the latter: times against DPO's."""
    print(HEADER)
    slowest = sorted(measured.items(), key=lambda item: -item[1].ratio)
    for name, run in slowest:
        milliseconds = sorted(1e3 * x for x in run.turns)
        print(ROW.format(name, statistics.median(milliseconds), milliseconds[0], milliseconds[-1],
                         run.ratio, run.compiled, run.why).rstrip())  # fmt: skip
    unexplained = sum(run.why == UNEXPLAINED for run in measured.values())
    print(
        f"import: jax {seconds['import_jax_s']:.2f} s, jaxpref.losses"
        f" {seconds['import_more_s']:+.2f} s"
    )
    result: dict[str, Any] = {f"{name}_vs_dpo_time": run.ratio for name, run in slowest}
    result |= {"pairs": config.pairs, "worst": slowest[0][1].ratio, "unexplained": unexplained}
    result |= seconds
    print(json.dumps(result))
    return result


def imports(turns: int) -> dict[str, float]:
    """Median seconds to import jax in a new process, and how many more `jaxpref.losses` takes."""

    def once(module: str) -> float:
        command = [sys.executable, "-c", IMPORT.format(module)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    once("jaxpref.losses")  # reads the files and compiles them
    pairs = [(once("jax"), once("jaxpref.losses")) for _ in range(turns)]
    return {
        "import_jax_s": statistics.median(jax for jax, _ in pairs),
        "import_more_s": statistics.median(both - jax for jax, both in pairs),
    }


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


def _more(program: Any, dpo: Any) -> dict[str, float]:
    """What the compiler says a program does, in units of what it says of DPO's."""
    own, base = program.cost_analysis(), dpo.cost_analysis()
    return {word: own.get(key, 0.0) / base[key] for key, word in COSTS.items()}


def _orders(program: Any) -> str:
    text = program.as_text()
    words = {"sorts": " sort(", "draws": "threefry"}
    return " and ".join(word for word, mark in words.items() if mark in text)


def _seconds(program: Callable, *arrays: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


if __name__ == "__main__":
    with one_line("losses"):
        main(tyro.cli(Config))
