"""Tokens a second drawn from SmolLM2-135M with a cache: ours beside transformers' ``generate``.

Both continue the same prompts of random tokens, without padding and without a stop token, in
float32, in a process of its own on all cores of this process; their turns alternate. A turn is the
whole call: the prompts' encoding and all new tokens. A comparison is void unless the greedy
continuations agree, but for what the rounding of close calls does.

Run:     python -m benchmarks.sampling
Takes:   5 minutes on 2 cores, 4 GB of memory
Prints:  a table, and as last line one JSON object
"""

import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from benchmarks import frameworks
from benchmarks.frameworks import Measured, Model, Running, ratios
from jaxpref.score.command import one_line

HEADER = "batch x new framework     tokens/s  seconds     (min..max) peak GB"
ROW = "{:>11} {:<12} {:9.1f} {:8.3f} {:7.3f}..{:6.3f} {:7.2f}"
SAME = 0.8  # share of equal greedy tokens: after one close call, a row goes its own way


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    batch: tuple[int, ...] = (1, 8)
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 64
    """Tokens drawn after it."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    frameworks: tuple[str, ...] = ("jaxpref", "transformers")
    """The first is compared with each of the others."""
    repeats: int = 5
    """Turns of each framework at each size, after the first, which compiles."""
    model: Model = "smollm2"


SMOKE = Config(batch=(2,), prompt=4, new=3, frameworks=("jaxpref",), repeats=2, model="tiny")


class Size(NamedTuple):
    """A batch of prompts, and how their continuations are drawn."""

    batch: int
    prompt: int
    new: int
    temperature: float
    top_p: float

    @property
    def name(self) -> str:
        """As in the table: batch x new tokens."""
        return f"{self.batch}x{self.new}"


def prompts(size: Size, vocab: int) -> np.ndarray:
    """Random ids ``[batch prompt]``."""
    shape = size.batch, size.prompt
    return np.random.default_rng(0).integers(vocab, size=shape, dtype=np.int32)


def run_jaxpref(size: Size, model: Model, folder: Path) -> Running:
    """`jaxpref.models.sampling.sample`."""
    import jax

    from jaxpref.models.sampling import sample

    policy, params, config = frameworks.open_model(model)
    ids = prompts(size, config.vocab)

    def draw(temperature: float, top_p: float) -> np.ndarray:
        options = {"temperature": temperature, "top_p": top_p, "key": jax.random.key(0)}
        whole = np.full(ids.shape, True)
        return np.asarray(sample(policy, params, ids, whole, max_new=size.new, **options).tokens)

    greedy = draw(0.0, 1.0)
    return Running(greedy, lambda: draw(size.temperature, size.top_p).size)


def run_transformers(size: Size, model: Model, folder: Path) -> Running:
    """``generate`` of transformers with its cache, in torch."""
    torch, policy = frameworks.open_torch(folder)
    policy.generation_config.eos_token_id = None
    ids = torch.from_numpy(prompts(size, policy.config.vocab_size)).long()

    def draw(temperature: float, top_p: float) -> np.ndarray:
        how = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.inference_mode():
            found = policy.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=size.new,
                pad_token_id=0,
                use_cache=True,
                **how,
            )
        return found[:, size.prompt :].numpy()

    greedy = draw(0.0, 1.0)
    return Running(greedy, lambda: draw(size.temperature, size.top_p).size)


FRAMEWORKS = {"jaxpref": run_jaxpref, "transformers": run_transformers}


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
        for batch in config.batch:
            size = Size(batch, config.prompt, config.new, config.temperature, config.top_p)
            result[size.name] = report(size, measure(config, size, Path(folder)))
    print(json.dumps(result))
    return result


def measure(config: Config, size: Size, folder: Path) -> dict[str, Measured]:
    """All frameworks at one size."""
    contenders = {
        name: (FRAMEWORKS[name], size, config.model, folder) for name in config.frameworks
    }
    return frameworks.measure(contenders, config.repeats, functools.partial(agree, size))


def agree(size: Size, tokens: dict[str, np.ndarray]) -> None:
    """Ends the program unless all greedy continuations agree nearly everywhere."""
    first, *others = tokens
    for other in others:
        same = float((tokens[first] == tokens[other]).mean())
        if not same >= SAME:
            sys.exit(f"{size.name}: void: of {first} and {other} only {same:.0%} of tokens agree")


def report(size: Size, measured: dict[str, Measured]) -> dict[str, Any]:
    """Prints the rows of one size and returns its ratios, ours over theirs."""
    ours, *others = measured
    result: dict[str, Any] = {}
    for name, run in measured.items():
        turn = statistics.median(run.turns)
        speed = size.batch * size.new / turn
        print(ROW.format(size.name, name, speed, turn, min(run.turns), max(run.turns),
                         run.memory / 1e9))  # fmt: skip
        result[f"{name}_tokens_per_second"] = speed
    for name in others:
        result |= ratios(measured[ours], measured[name], name)
    return result


if __name__ == "__main__":
    with one_line("sampling"):
        main(tyro.cli(Config))
