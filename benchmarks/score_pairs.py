"""Similarity scores of preference pairs with SmolLM2-135M: ours beside the obvious torch way.

Ours is `jaxpref.score.score_pairs`: pairs of similar length in one batch, the prompt encoded once
for both responses, no logits. The other way takes one pair at a time, runs each response with its
prompt through the model with all hidden states and logits, and sums. Lengths are drawn like those
of HH-RLHF (log-normal), tokens at random. Each way has a process of its own on all cores of this
process, and their turns alternate. A comparison is void unless all scores agree.

Run:     python -m benchmarks.score_pairs
Takes:   12 minutes on 2 cores, 4 GB of memory
Prints:  a table, and as last line one JSON object
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import frameworks
from benchmarks.frameworks import MODELS, Measured, Model, Running, ratios
from jaxpref.data.pairs import TokenPair
from jaxpref.score.command import one_line

HEADER = "pairs way        seconds     (min..max)  pairs/s peak GB  of GEMM peak"
ROW = "{:>5} {:<9} {:8.3f} {:7.3f}..{:6.3f} {:8.2f} {:7.2f} {:13.2f}"
COLUMNS = ("ches", "ches_length_normalised", "last_hidden_similarity")
TOLERANCE = 1e-3  # of the largest score, float32: the rounding of 30 layers


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: tuple[int, ...] = (32, 64)
    prompt: int = 80
    """Median tokens of a prompt."""
    response: int = 30
    """Median tokens of a response."""
    spread: float = 0.7
    """Standard deviation of the logarithm of both."""
    longest: int = 400
    """Most tokens of a prompt or response."""
    tokens: int = 2048
    """Of our batches, padding included."""
    against: tuple[str, ...] = ("torch",)
    repeats: int = 3
    """Turns of each way, after the first, which compiles."""
    model: Model = "smollm2"
    product: int = 2048
    """Rows of the square matrices whose product gives the machine's peak."""


SMOKE = Config(
    pairs=(3,), prompt=5, response=3, longest=9, tokens=64, against=(), repeats=2, model="tiny",
    product=64,
)  # fmt: skip


def draw(config: Config, number: int) -> list[TokenPair]:
    """Pairs of random tokens, as `jaxpref.data.pairs.encode` gives them."""
    random, vocab = np.random.default_rng(0), MODELS[config.model]["vocab"]

    def ids(median: int) -> list[int]:
        length = int(np.clip(random.lognormal(np.log(median), config.spread), 1, config.longest))
        return random.integers(vocab, size=length).tolist()

    pairs = []
    for _ in range(number):
        prompt = ids(config.prompt)
        both = [np.array([*prompt, *ids(config.response), 0], np.int32) for _ in range(2)]
        starts = len(prompt), len(prompt)
        pairs.append(TokenPair((both[0], both[1]), starts, (False, False)))
    return pairs


def run_jaxpref(config: Config, number: int, folder: Path) -> Running:
    """`jaxpref.score.score_pairs`."""
    import jax
    import jax.numpy as jnp

    from jaxpref import score

    policy, params, _ = frameworks.open_model(config.model, scan=True)
    pairs = draw(config, number)

    def scores() -> np.ndarray:
        found = score.score_pairs(policy, params, pairs, columns=COLUMNS, tokens=config.tokens)
        return np.stack([found[name] for name in COLUMNS])

    square = jnp.ones((config.product, config.product), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return Running(
        scores(),
        lambda: float(scores().sum()),
        lambda: multiply(square, square).block_until_ready(),
    )


def run_torch(config: Config, number: int, folder: Path) -> Running:
    """Two forward passes a pair, all hidden states and logits."""
    torch, policy = frameworks.open_torch(folder)
    pairs = draw(config, number)

    def states(ids: np.ndarray, start: int) -> Any:
        found = policy(torch.from_numpy(ids[None, :-1]).long(), output_hidden_states=True)
        return found.hidden_states[-1][0, start - 1 :]

    def scores() -> np.ndarray:
        rows = []
        with torch.inference_mode():
            for pair in pairs:
                w, l = (states(*one) for one in zip(pair.tokens, pair.starts, strict=True))
                sums, means = (w.sum(0), l.sum(0)), (w.mean(0), l.mean(0))
                ches, normalised = (float(a @ b - a @ a) for a, b in (sums, means))
                rows.append([ches, normalised, float(w[-1] @ l[-1])])
        return np.array(rows).T

    square = torch.ones(config.product, config.product)
    return Running(scores(), lambda: float(scores().sum()), lambda: torch.mm(square, square))


WAYS = {"jaxpref": run_jaxpref, "torch": run_torch}


def measure(config: Config, number: int, ways: tuple[str, ...], folder: Path
            ) -> dict[str, Measured]:  # fmt: skip
    """All ways on as many pairs."""
    contenders = {way: (WAYS[way], config, number, folder) for way in ways}
    return frameworks.measure(contenders, config.repeats, agree)


def agree(numbers: dict[str, np.ndarray]) -> None:
    """Ends the program unless all scores agree."""
    first, *others = numbers
    for other in others:
        largest = np.abs(numbers[other]).max(axis=1)
        apart = (np.abs(numbers[first] - numbers[other]).max(axis=1) / largest).max()
        if not apart < TOLERANCE:
            sys.exit(f"void: {first} and {other} differ by {apart:.1e} of the largest score")


def work(config: Config, number: int, way: str) -> float:
    """Floating-point operations that the scores need as this way lays them out, no padding."""
    m = MODELS[config.model]
    weights = 3 * m["mlp_width"] + 2 * m["head_width"] * (m["heads"] + m["kv_heads"])
    total = 0.0
    for pair in draw(config, number):
        prompt, lengths = pair.starts[0], [len(ids) - 1 for ids in pair.tokens]
        if way == "jaxpref":
            encoded, logits = sum(lengths) - prompt, 0
            seen = (sum(n**2 for n in lengths) - prompt**2) / 2
        else:
            encoded, logits = sum(lengths), sum(lengths)
            seen = sum(n**2 for n in lengths) / 2
        attention = 2 * m["heads"] * m["head_width"] * seen
        layers = m["layers"] * (m["width"] * weights * encoded + attention)
        total += 2.0 * (layers + m["vocab"] * m["width"] * logits)
    return total


def main(config: Config) -> dict[str, Any]:
    """Measures, prints the table and the JSON object, and returns the latter."""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    ways = ("jaxpref", *(frameworks.installed(config.against) if config.against else ()))
    result: dict[str, Any] = {}
    print(HEADER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if len(ways) > 1:
            frameworks.spawn(frameworks.export, config.model, folder).join()
        for number in config.pairs:
            found = measure(config, number, ways, folder)
            result[str(number)] = report(config, number, found)
    result |= result[str(config.pairs[-1])]  # of the most pairs
    print(json.dumps(result))
    return result


def report(config: Config, number: int, found: dict[str, Measured]) -> dict[str, float]:
    """Prints the rows and returns the ratios, ours over theirs."""
    ours, result = found["jaxpref"], {}
    fastest = min(min(run.products) for run in found.values())
    for way, run in found.items():
        seconds = statistics.median(run.turns)
        share = work(config, number, way) / seconds / (2.0 * config.product**3 / fastest)
        print(ROW.format(number, way, seconds, min(run.turns), max(run.turns), number / seconds,
                         run.memory / 1e9, share), flush=True)  # fmt: skip
        if run is ours:
            result = {"pairs_a_second": number / seconds, "of_gemm_peak": share}
            continue
        result |= ratios(ours, run, f"obvious_{way}")
    return result


if __name__ == "__main__":
    with one_line("score_pairs"):
        main(tyro.cli(Config))
