"""The same DPO step in several frameworks; each is imported only in the process that runs it."""

import dataclasses
import importlib
import importlib.util
import multiprocessing
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

BETA, LEARNING_RATE = 0.1, 1e-5
Model = Literal["smollm2", "small", "tiny"]
Optimizer = Literal["adamw", "sgd"]
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": dict(
        vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, mlp_width=1536
    ),
    # that of the experiments' `--model small`
    "small": dict(
        vocab=49152, width=128, layers=4, heads=4, kv_heads=4, head_width=32, mlp_width=384
    ),
    "tiny": dict(vocab=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48),
}


class Size(NamedTuple):
    """A batch: `pairs` pairs of sequences of `time` tokens, the first `prompt` of them shared."""

    pairs: int
    time: int
    prompt: int

    @property
    def name(self) -> str:
        """As in the table: pairs x tokens."""
        return f"{self.pairs}x{self.time}"


class Running(NamedTuple):
    """A contender that is ready.

    Attributes:
        numbers: What all contenders must agree on.
        step: One turn of what is measured; returns a number of it when it is done.
        product: One product of square float32 matrices, where the machine's peak is wanted.
    """

    numbers: np.ndarray
    step: Callable[[], float]
    product: Callable[[], Any] = lambda: None


@dataclasses.dataclass
class Measured:
    """One contender; seconds and bytes.

    Attributes:
        numbers: Those of `Running`.
        first: The first turn, with what was compiled for it.
        returned: What each turn returned, the first one's before the others'.
        turns: The turns after the first.
        products: A matrix product after each of them.
        memory: Peak since the first turn.
    """

    numbers: np.ndarray
    first: float
    returned: list[float]
    turns: list[float] = dataclasses.field(default_factory=list)
    products: list[float] = dataclasses.field(default_factory=list)
    memory: int = 0


def tokens(size: Size, vocab: int) -> np.ndarray:
    """Random ids ``[pairs 2 time]``, no padding; the responses differ from their first token on."""
    random = np.random.default_rng(0)
    ids = random.integers(vocab // 2, size=(size.pairs, 2, size.time), dtype=np.int32)
    ids[:, 1, : size.prompt] = ids[:, 0, : size.prompt]
    ids[:, 1, size.prompt] = ids[:, 0, size.prompt] + vocab // 2
    return ids


def open_model(model: Model, **options: Any) -> tuple[Any, Any, Any]:
    """Policy, parameters and configuration; options are the decoder's."""
    import jax
    from flax import nnx

    from jaxpref.models import decoder, pretrained

    if model == "smollm2":
        opened = pretrained.smollm2(**options)
        return opened.policy, jax.tree.map(jax.numpy.asarray, opened.params), opened.config
    config = decoder.DecoderConfig(**MODELS[model])
    return *decoder.functional(decoder.Decoder(config, rngs=nnx.Rngs(0), **options)), config


def export(model: Model, folder: Path) -> None:
    """Writes the model as transformers reads it."""
    from jaxpref.models import pretrained

    _, params, config = open_model(model)
    pretrained.save(folder, params, config, family="llama")


def open_torch(folder: Path) -> tuple[Any, Any]:
    """Torch, on all cores of this process, and the exported model without dropout."""
    # Not by `import`: a type checker need not find them.
    torch: Any = importlib.import_module("torch")
    llama: Any = importlib.import_module("transformers").LlamaForCausalLM
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch, llama.from_pretrained(folder, attn_implementation="sdpa").eval()


def run_jaxpref(size: Size, model: Model, optimizer: Optimizer, edge: int, folder: Path) -> Running:
    """Ours: the prompt encoded once, logits at scored positions only, in chunks."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxpref import logprobs, losses
    from jaxpref.data.batches import Batch
    from jaxpref.training.step import init_state, make_step

    policy, params, config = open_model(model)
    ids = tokens(size, config.vocab)
    scored = np.broadcast_to(np.arange(size.time) >= size.prompt, ids.shape)
    batch = Batch(ids, np.full(ids.shape, True), scored, None, np.arange(size.pairs))
    rows = {
        "packed_time": int(logprobs.packed_lengths(*batch[:2]).max()),
        "max_response": size.time - size.prompt,
    }

    @jax.jit
    def token_logp(params):
        found = logprobs.shared_prompt_hidden(policy, params, *batch[:3], **rows)
        table = policy.unembedding(params)
        return logprobs.token_logprobs_chunked(found.hidden, table, found.targets)

    def score(params, batch):
        return logprobs.shared_prompt_scores(policy, params, *batch[:3], **rows)

    def loss(scores, batch):
        return losses.dpo(scores.logp, batch.reference, beta=BETA)

    logp = np.asarray(token_logp(params))
    batch = jax.device_put(batch._replace(reference=logp.sum(axis=-1)))
    update = {"adamw": lambda rate: optax.adamw(rate, weight_decay=0.0), "sgd": optax.sgd}
    chosen = update[optimizer](LEARNING_RATE)
    train = make_step(score, loss, chosen)
    state = init_state(params, chosen, key=jax.random.key(0))

    def step() -> float:
        nonlocal state
        state, metrics, _ = train(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    square, multiply = jnp.ones((edge, edge), jnp.float32), jax.jit(jnp.matmul)
    return Running(logp, step, lambda: multiply(square, square).block_until_ready())


def run_torch(size: Size, model: Model, optimizer: Optimizer, edge: int, folder: Path) -> Running:
    """Plain torch: Llama of transformers, each sequence whole, all logits."""
    torch, policy = open_torch(folder)
    ids = torch.from_numpy(tokens(size, policy.config.vocab_size)).long().flatten(0, 1)

    def token_logp():
        logits = policy(input_ids=ids, use_cache=False).logits[:, size.prompt - 1 : -1]
        picked = logits.log_softmax(-1).gather(-1, ids[:, size.prompt :, None])
        return picked[..., 0].unflatten(0, (-1, 2))

    with torch.inference_mode():
        logp = token_logp().numpy()
    reference = torch.from_numpy(logp.sum(-1))
    if optimizer == "adamw":
        update = torch.optim.AdamW(policy.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
    else:
        update = torch.optim.SGD(policy.parameters(), LEARNING_RATE)

    def step() -> float:
        update.zero_grad(set_to_none=True)
        ratio = token_logp().sum(-1) - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
        loss.backward()
        update.step()
        return loss.item()

    square = torch.ones(edge, edge)
    return Running(logp, step, lambda: torch.mm(square, square))


FRAMEWORKS = {"jaxpref": run_jaxpref, "torch": run_torch}


def serve(pipe: Any, make: Callable[..., Running], *arguments: Any) -> None:
    """Runs one contender in this process, one command of the pipe after the other.

    First sends ``(numbers, seconds of the first step, its loss)``. Then answers ``step`` by
    ``(seconds, loss)``, ``product`` by seconds, ``memory`` by the peak bytes since the first step,
    and ends at ``end``.
    """
    running = make(*arguments)
    first, loss = _timed(running.step)
    reset_peak()
    pipe.send((running.numbers, first, loss))
    while (command := pipe.recv()) != "end":
        if command == "step":
            pipe.send(_timed(running.step))
        elif command == "product":
            pipe.send(_timed(running.product)[0])
        else:
            pipe.send(peak_memory())


def measure(contenders: Mapping[str, Sequence[Any]], repeats: int, agree: Callable[[dict], None]
            ) -> dict[str, Measured]:  # fmt: skip
    """All contenders, each in a process of its own, their turns alternating.

    Each is given as ``(make, *arguments)`` with ``make(*arguments) -> Running``. `agree` gets the
    numbers of all by name, and ends the program if they are too far apart.
    """
    pipes, found = {}, {}
    for name, contender in contenders.items():
        pipes[name] = start(*contender)
        numbers, first, value = receive(pipes[name], name)
        found[name] = Measured(numbers, first, [value])
    agree({name: run.numbers for name, run in found.items()})
    for _ in range(repeats):
        for name, run in found.items():
            seconds, value = ask(pipes[name], name, "step")
            run.turns.append(seconds)
            run.returned.append(value)
            run.products.append(ask(pipes[name], name, "product"))
    for name, run in found.items():
        run.memory = ask(pipes[name], name, "memory")
        pipes[name].send("end")
    return found


def ratios(ours: Measured, theirs: Measured, name: str) -> dict[str, float]:
    """Ours over theirs: the median of neighbouring turns, and of the peaks of memory."""
    return {
        f"vs_{name}_time": statistics.median(map(operator.truediv, ours.turns, theirs.turns)),
        f"vs_{name}_memory": ours.memory / theirs.memory,
    }


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The frameworks that can be imported, with a line for each that cannot."""
    packages = {"torch": "transformers"}
    found = tuple(n for n in names if importlib.util.find_spec(packages.get(n, n)))
    for name in set(names) - set(found):
        print(f"{name}: not installed, left out")
    return found


def start(make: Callable[..., Running], *arguments: Any) -> Connection:
    """A contender in a fresh process, and the pipe to it."""
    here, there = multiprocessing.Pipe()
    spawn(serve, there, make, *arguments)
    there.close()  # so that a child's death ends the wait for it
    return here


def spawn(function: Any, *arguments: Any) -> Any:
    """Starts the function in a fresh Python process."""
    process = multiprocessing.get_context("spawn").Process(
        target=function, args=arguments, daemon=True
    )
    process.start()
    return process


def ask(pipe: Connection, name: str, command: str) -> Any:
    """The answer of a contender's process."""
    pipe.send(command)
    return receive(pipe, name)


def receive(pipe: Connection, name: str) -> Any:
    """What a contender's process sends; ends the program if that one has ended."""
    try:
        return pipe.recv()
    except EOFError:
        sys.exit(f"{name}: its process ended early, see above (or short of memory)")


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def reset_peak() -> None:
    """Lets the kernel count this process's peak memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident memory of this process in bytes, since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
