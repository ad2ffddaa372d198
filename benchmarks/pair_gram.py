"""The Gram matrices of preference pairs on SmolLM2-135M, by several ways.

``fast`` is `jaxpref.gradients.pair_grams` with the responses apart. It is held against one ordinary
forward and backward pass of a DPO loss over the same pairs (``training``, the prompt encoded once),
against two whole gradients a pair (``reference``, `jaxpref.gradients.pair_gram`), and against what
one would write in torch (``torch``): two backward passes a pair, all gradients flattened and
concatenated. Each has a process of its own on all cores of this process, and their turns alternate.
The token Gram of one pair is held against one backward pass for each of its tokens, without the
products that these would still need. A comparison is void unless the numbers agree: torch's
gradients are multiplied in pieces and float64 for that, and a line says how far off their one
float32 product of 134 million entries is, which is what is timed.

Run:     python -m benchmarks.pair_gram
Takes:   15 minutes on 2 cores, 8 GB of memory
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
from benchmarks.frameworks import Measured, Model, Running, Size, ratios
from jaxpref.score.command import one_line

HEADER = "pairs x tokens way          seconds     (min..max) peak GB"
ROW = "{:>14} {:<10} {:9.3f} {:7.3f}..{:6.3f} {:7.2f}"
TOLERANCE = 1e-3  # of the largest entry, float32: the rounding of 30 layers, in torch and here


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    pairs: int = 2
    time: tuple[int, ...] = (128, 512)
    """Tokens of a sequence, prompt and response."""
    prompt: float = 0.5
    """Share of the tokens that are the prompt."""
    against: tuple[str, ...] = ("training", "reference", "torch")
    tokens: int = 32
    """Tokens of each response of the token Gram; its prompt is as long. 0 leaves it out."""
    repeats: int = 3
    """Turns of each way, after the first, which compiles."""
    model: Model = "smollm2"


SMOKE = Config(time=(8,), against=("reference",), tokens=2, repeats=2, model="tiny")


def _arrays(size: Size, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, what is no padding, and what is scored, ``[pairs 2 time]``."""
    ids = frameworks.tokens(size, vocab)
    scored = np.broadcast_to(np.arange(size.time) >= size.prompt, ids.shape)
    return ids, np.full(ids.shape, True), scored


def _response_logp(policy: Any, size: Size) -> Any:
    """``(params, one response's arrays) ->`` its log-probability."""
    from jaxpref import logprobs

    def logp(params, response):
        one = (x[None] for x in response)
        longest = size.time - size.prompt
        return logprobs.response_scores(policy, params, *one, max_response=longest).logp[0]

    return logp


def run_training(size: Size, model: Model, folder: Path) -> Running:
    """Mean DPO loss and its gradient, the prompt encoded once; ours at its best."""
    import jax

    from jaxpref import logprobs, losses

    policy, params, config = frameworks.open_model(model)
    batch = _arrays(size, config.vocab)
    rows: dict[str, Any] = {
        "packed_time": int(logprobs.packed_lengths(*batch[:2]).max()),
        "max_response": size.time - size.prompt,
    }

    @jax.jit
    def slope(params):
        def loss(params):
            logp = logprobs.shared_prompt_scores(policy, params, *batch, **rows).logp
            return losses.dpo(logp, jax.lax.stop_gradient(logp), beta=0.1).mean()

        return jax.value_and_grad(loss)(params)

    return Running(np.zeros(0), lambda: float(jax.block_until_ready(slope(params))[0]))


def run_fast(size: Size, model: Model, folder: Path) -> Running:
    """`jaxpref.gradients.pair_grams`."""
    import jax

    from jaxpref import gradients

    policy, params, config = frameworks.open_model(model)
    batch, logp = _arrays(size, config.vocab), _response_logp(policy, size)
    grams = jax.jit(lambda params: gradients.pair_grams(logp, params, batch).gram)
    return Running(np.asarray(grams(params)), lambda: float(grams(params).sum()))


def run_reference(size: Size, model: Model, folder: Path) -> Running:
    """Two whole gradients a pair."""
    import jax

    from jaxpref import gradients

    policy, params, config = frameworks.open_model(model)
    batch, logp = _arrays(size, config.vocab), _response_logp(policy, size)
    one = functools.partial(gradients.pair_gram, logp)
    grams = jax.jit(lambda params: jax.lax.map(lambda pair: one(params, pair), batch))
    return Running(np.asarray(grams(params)), lambda: float(grams(params).sum()))


def run_torch(size: Size, model: Model, folder: Path) -> Running:
    """Two backward passes a pair, flattened and concatenated gradients."""
    torch, policy = frameworks.open_torch(folder)
    params = list(policy.parameters())
    ids = torch.from_numpy(frameworks.tokens(size, policy.config.vocab_size)).long()

    def gradient(response: Any) -> Any:
        logits = policy(input_ids=response[None], use_cache=False).logits[0, size.prompt - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, response[size.prompt :, None]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(logp, params)])

    def at_once(both: Any) -> Any:
        return both @ both.T

    def in_pieces(both: Any) -> Any:
        pieces = (part.double() for part in both.split(2**20, dim=1))
        return functools.reduce(operator.add, map(at_once, pieces))

    def grams(product: Any) -> np.ndarray:
        found = []
        for chosen, rejected in ids:
            both = torch.stack([gradient(chosen), gradient(rejected)])
            found.append(product(both).numpy())
        return np.stack(found)

    exact = grams(in_pieces)  # of the same gradients, which are not to blame
    off = np.abs(grams(at_once) - exact).max() / np.abs(exact).max()
    print(f"{size.name}: torch's float32 products are off by {off:.1e} of the largest", flush=True)
    return Running(exact, lambda: float(grams(at_once).sum()))


def run_token_gram(size: Size, model: Model, folder: Path) -> Running:
    """`jaxpref.gradients.token_gram` of one pair."""
    import jax

    from jaxpref import gradients

    policy, params, config = frameworks.open_model(model)
    ids, first = _arrays(size, config.vocab)[0][0], size.prompt - 1

    def hidden(params, response):
        return policy.hidden(params, response[None, :-1])[0, first:]

    targets = ids[:, size.prompt :]
    grams = jax.jit(
        lambda params: gradients.token_gram(hidden, policy.unembedding, params, ids, targets).gram
    )
    norms = np.diagonal(np.asarray(grams(params)).reshape(targets.size, targets.size))
    return Running(norms, lambda: float(grams(params).sum()))


def run_token_backward(size: Size, model: Model, folder: Path) -> Running:
    """The gradient of one token's log-probability after the other, and its squared norm."""
    import jax
    import jax.numpy as jnp

    from jaxpref import logprobs
    from jaxpref.training.step import tree_norm

    policy, params, config = frameworks.open_model(model)
    ids, first = _arrays(size, config.vocab)[0][0], size.prompt - 1

    @jax.jit
    def square(params, response, at):
        def logp(params):
            hidden = policy.hidden(params, response[None, :-1])[0, first:]
            table = policy.unembedding(params)
            return logprobs.token_logprobs(hidden, table, response[size.prompt :])[at]

        return tree_norm(jax.grad(logp)(params)) ** 2

    def squares() -> np.ndarray:
        tokens = range(size.time - size.prompt)
        return np.array([square(params, jnp.asarray(row), at) for row in ids for at in tokens])

    return Running(squares(), lambda: float(squares().sum()))


WAYS = {
    "training": run_training,
    "fast": run_fast,
    "reference": run_reference,
    "torch": run_torch,
    "token gram": run_token_gram,
    "backwards": run_token_backward,
}


def measure(config: Config, size: Size, ways: tuple[str, ...], folder: Path) -> dict[str, Measured]:
    """All ways at one size, with a row for each."""
    contenders = {way: (WAYS[way], size, config.model, folder) for way in ways}
    found = frameworks.measure(contenders, config.repeats, functools.partial(agree, size))
    for way, run in found.items():
        seconds = statistics.median(run.turns)
        print(ROW.format(size.name, way, seconds, min(run.turns), max(run.turns),
                         run.memory / 1e9), flush=True)  # fmt: skip
    return found


def agree(size: Size, numbers: dict[str, np.ndarray]) -> None:
    """Ends the program unless all numbers agree."""
    first, *others = (way for way in numbers if numbers[way].size)
    for other in others:
        apart = np.abs(numbers[first] - numbers[other]).max() / np.abs(numbers[other]).max()
        if not apart < TOLERANCE:
            sys.exit(f"{size.name}: void: {first} and {other} differ by {apart:.1e} of the largest")


def main(config: Config) -> dict[str, Any]:
    """Measures, prints the table and the JSON object, and returns the latter."""
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    against = tuple(
        way for way in config.against if way != "torch" or frameworks.installed(("torch",))
    )
    names = {"training": "training_pass", "reference": "reference", "torch": "obvious_torch"}
    result: dict[str, Any] = {}
    print(HEADER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "torch" in against:
            frameworks.spawn(frameworks.export, config.model, folder).join()
        for time in config.time:
            size = Size(config.pairs, time, int(config.prompt * time))
            found = measure(config, size, ("fast", *against), folder)
            result[size.name] = {"fast": statistics.median(found["fast"].turns)}
            for way in against:
                result[size.name] |= ratios(found["fast"], found[way], names[way])
        if config.tokens:
            size = Size(1, 2 * config.tokens, config.tokens)
            found = measure(config, size, ("token gram", "backwards"), folder)
            both = ratios(found["token gram"], found["backwards"], "backward_per_token")
            result["token_gram"] = both
            result["token_gram_vs_backward_per_token"] = both["vs_backward_per_token_time"]
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with one_line("pair_gram"):
        main(tyro.cli(Config))
