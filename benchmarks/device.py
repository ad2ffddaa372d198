"""What one accelerator does with this library, in under ten minutes; no weights, no download.

Run:     python -m benchmarks.device [--minutes 9] [--tiny] [--only PART ...]
Writes:  $OUT/device.json after each part (without OUT, ./device.json); a line a measurement.

Parts come in the order of what is learnt a second; those that no time is left for are named.
Weights are random, normal with standard deviation 0.02, in bfloat16's values as a checkpoint's are.
A part that fails is told, the next goes on, and the exit status says so.
"""

import argparse
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.configs import CONFIGS
from jaxpref import gradients, logprobs, losses
from jaxpref.data.batches import Batch
from jaxpref.models import attention, decoder
from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.sampling import sample
from jaxpref.training.pairset import NOTHING
from jaxpref.training.step import init_state, make_step

PEAK, BANDWIDTH = 989e12, 4.8e12  # of an H200: bfloat16 operations and bytes a second
BEGUN = time.perf_counter()
TINY = DecoderConfig(512, 64, 2, 4, 2, 16, 128)
Found = dict[str, Any]


def seconds_of(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median of calls that are waited for, and the first one's."""
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:]), took[0]


@functools.cache
def config_of(size: str, *, tiny: bool) -> DecoderConfig:
    """Of one of the sizes, or a small stand-in for it."""
    return TINY if tiny else CONFIGS[size]


def drawn(config: DecoderConfig, **options: Any) -> tuple[Any, Any]:
    """A policy and its parameters, drawn on the device."""
    policy, shapes = decoder.abstract(config, scan=True, **options)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    @jax.jit
    def draw(key):
        def one(number, path, leaf):
            if "norm" in jax.tree_util.keystr(path):
                return jnp.ones(leaf.shape, leaf.dtype)
            own = jax.random.fold_in(key, number)
            return (0.02 * jax.random.normal(own, leaf.shape, jnp.bfloat16)).astype(leaf.dtype)

        return tree.unflatten([one(n, *each) for n, each in enumerate(leaves)])

    return policy, draw(jax.random.key(0))


def batch_of(pairs: int, length: int, vocab: int) -> Batch:
    """Pairs that share the first half of their tokens."""
    random, half = np.random.default_rng(0), length // 2
    ids = random.integers(vocab, size=(pairs, 2, length), dtype=np.int32)
    ids[:, 1, :half] = ids[:, 0, :half]
    ids[:, 1, half] = (ids[:, 0, half] + 1) % vocab
    scored = np.broadcast_to(np.arange(length) >= half, ids.shape)
    reference, index = np.zeros((pairs, 2), np.float32), np.arange(pairs, dtype=np.int32)
    return Batch(*jax.device_put((ids, np.ones_like(scored), scored, reference, index)))


def scorer(policy: Any, length: int, **options: Any) -> Callable[[Any, Batch], logprobs.Scores]:
    """Log-probabilities of `batch_of`."""
    rooms = {"packed_time": -(-3 * length // 128) * 64, "max_response": length // 2}

    def score(params, batch):
        return logprobs.shared_prompt_scores(policy, params, *batch[:3], **rooms, **options)

    return score


def environment(*, tiny: bool) -> Iterator[Found]:
    """What it runs on."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) / 1e9
    yield {"device": device.device_kind, "jax": jax.__version__, "memory_GB": limit}


def ceilings(*, tiny: bool) -> Iterator[Found]:
    """Products of square matrices in each precision, and a copy."""
    size = 256 if tiny else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    exact = np.asarray(x[:64], np.float64) @ np.asarray(x, np.float64)
    for name, dtype, precision in (
        ("float32 highest", jnp.float32, "highest"), ("float32 high", jnp.float32, "high"),
        ("float32 default", jnp.float32, "default"), ("bfloat16", jnp.bfloat16, "default"),
    ):  # fmt: skip
        product, y = jax.jit(functools.partial(jnp.matmul, precision=precision)), x.astype(dtype)
        took, _ = seconds_of(functools.partial(product, y, y), 5)
        off = np.abs(np.asarray(product(y, y)[:64], np.float64) - exact).max()
        yield {"product": name, "TFLOP_a_second": 2 * size**3 / took / 1e12,
               "relative_error": float(off / np.abs(exact).max())}  # fmt: skip
    long = jnp.ones(2**16 if tiny else 2**30, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    took, _ = seconds_of(functools.partial(add, long), 5)
    yield {"copy_TB_a_second": 2 * long.nbytes / took / 1e12}


def precision(*, tiny: bool) -> Iterator[Found]:
    """Adam's first update at rates of the papers: whether scores see what theory says."""
    config = config_of("135M", tiny=tiny)
    batch = batch_of(4, 64, config.vocab)
    for dtype, kind in (("float32", "highest"), ("float32", "default"), ("bfloat16", "highest")):
        policy, params = drawn(config, compute_dtype=jnp.dtype(dtype), precision=kind)
        told, moved = _first_update(policy, params, batch)
        for rate in (1e-7, 1e-6, 1e-5):
            change, theory = moved(rate), rate * told
            off = np.abs(change - theory).mean() / np.abs(theory).mean()
            yield {"dtype": dtype, "precision": kind, "rate": rate,
                   "told": float(np.abs(theory).mean()),
                   "measured_along": float((change * np.sign(theory)).mean()),
                   "relative_error": float(off)}  # fmt: skip


def _first_update(policy: Any, params: Any, batch: Batch) -> tuple[np.ndarray, Any]:
    """What theory says of log-probabilities per unit of rate, and ``rate ->`` what they do."""
    score, plain = scorer(policy, 64), scorer(policy, 64, head=logprobs.token_logprobs)

    @jax.jit
    def at(params, update, rate):
        return score(jax.tree.map(lambda p, u: p + rate * u, params, update), batch).logp

    @jax.jit
    def first(params, base):
        def loss(params):
            return losses.dpo(score(params, batch).logp, base, beta=0.1).mean()

        return jax.tree.map(lambda g: -g / (jnp.abs(g) + 1e-12), jax.grad(loss)(params))

    @jax.jit
    def along(params, update):
        return gradients.directional(lambda p: plain(p, batch).logp, params, update)[1]

    base = at(params, jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    update = first(params, base)
    return np.asarray(along(params, update)), lambda rate: np.asarray(
        at(params, update, jnp.float32(rate)) - base
    )


def attentions(*, tiny: bool) -> Iterator[Found]:
    """Errors of each way in bfloat16 against plain products in float32, forward and backward."""
    time_, head = (64, 16) if tiny else (1024, 64)
    random = np.random.default_rng(0)
    query = jnp.asarray(random.normal(size=(2, time_, 3, 3, head)) / 8, jnp.float32)
    key, value = (jnp.asarray(random.normal(size=(2, 3, time_, head)), jnp.float32) for _ in "kv")
    attend = np.tril(np.ones((2, time_, time_), bool))
    attend[:, time_ // 2 :, time_ // 4 : time_ // 2] = False

    def both(kind, dtype):
        def total(query, key, value):
            found = attention.mix(query, key, value, jnp.asarray(attend), kind=kind)
            found = found.astype(jnp.float32)
            return jnp.square(found).sum(), found

        states = [x.astype(dtype) for x in (query, key, value)]
        found = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*states)
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(found)]

    exact, errors = both("xla", jnp.float32), {}
    kinds = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla", "splash")
    for kind in kinds:
        off = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(
            both(kind, jnp.bfloat16), exact, strict=True)]  # fmt: skip
        errors[kind] = float(max(off))
    yield {"relative_error": errors, "within_twice": errors[kinds[1]] <= 2 * errors["xla"]}


def step(
    size: str, pairs: int, length: int, *, tiny: bool, optimizer: str = "adam",
    param_dtype: str = "float32", compute_dtype: str = "bfloat16", **options: Any,
) -> Found:  # fmt: skip
    """Time, memory and utilisation of an update of DPO."""
    pairs, length = (2, 32) if tiny else (pairs, length)
    config = config_of(size, tiny=tiny)
    types = {"param_dtype": jnp.dtype(param_dtype), "compute_dtype": jnp.dtype(compute_dtype)}
    policy, params = drawn(config, **types, **options)
    batch, count = (
        batch_of(pairs, length, config.vocab),
        sum(x.size for x in jax.tree.leaves(params)),
    )
    chosen = {"adam": optax.adam, "sgd": optax.sgd}[optimizer](1e-6)

    def loss(scores, batch):
        return losses.dpo(scores.logp, batch.reference, beta=0.1)

    update = make_step(scorer(policy, length), loss, chosen)
    held = [init_state(params, chosen, key=jax.random.key(0))]
    del params
    compiled = update.lower(held[0], batch).compile()
    found = compiled.memory_analysis()
    peak = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    peak -= found.alias_size_in_bytes

    def run():
        held[0], metrics, _ = compiled(held[0], batch)
        return metrics["loss"]

    took, first = seconds_of(run, 3)
    tokens = pairs * (-(-3 * length // 128) * 64)
    return {"size": size, "pairs": pairs, "length": length, "optimizer": optimizer, **options,
            "param_dtype": param_dtype, "compute_dtype": compute_dtype, "ms": 1e3 * took,
            "tokens_a_second": tokens / took, "flop_utilisation": 6 * count * tokens / took / PEAK,
            "memory_GB": peak / 1e9, "first_s": first}  # fmt: skip


def steps(*, tiny: bool) -> Iterator[Found]:
    """Updates of 135M: float32 with TF32 off and on, bfloat16, cuDNN."""
    on_gpu = jax.default_backend() == "gpu"
    plain: dict[str, Any] = {"compute_dtype": "float32", "remat": True}
    yield step("135M", 8, 1024, tiny=tiny, precision="highest", **plain)
    yield step("135M", 8, 1024, tiny=tiny, precision="default", **plain)
    yield step("135M", 8, 1024, tiny=tiny, remat=True)
    if on_gpu:
        yield step("135M", 8, 1024, tiny=tiny, remat=True, attention="cudnn")


def large_steps(*, tiny: bool) -> Iterator[Found]:
    """Updates of 1B and 8B."""
    kind = "cudnn" if jax.default_backend() == "gpu" else "xla"
    fast: dict[str, Any] = {"remat": True, "attention": kind}
    yield step("1B", 8, 1024, tiny=tiny, **fast)
    yield step("8B", 4, 1024, tiny=tiny, optimizer="sgd", param_dtype="bfloat16", **fast)


def grams(*, tiny: bool) -> Iterator[Found]:
    """Pair Grams of 1B in float32 against one backward pass of the same pairs."""
    config, length = config_of("1B", tiny=tiny), 32 if tiny else 256
    policy, params = drawn(config, remat=True)
    batch = batch_of(4, length, config.vocab)
    plain = scorer(policy, length, head=logprobs.token_logprobs)

    def logp(params, pair):
        tokens, real, scored = (x[None] for x in pair)
        return plain(params, Batch(tokens, real, scored, None, NOTHING)).logp[0]

    gram = jax.jit(lambda p: gradients.pair_grams(logp, p, batch[:3], responses="together").gram)
    score = scorer(policy, length)
    back = jax.jit(jax.grad(lambda p: score(p, batch).logp.sum()))
    took, first = seconds_of(functools.partial(gram, params), 3)
    one, _ = seconds_of(functools.partial(back, params), 3)
    finite = bool(np.isfinite(np.asarray(gram(params))).all())
    yield {"ms_a_pair": 250 * took, "over_one_backward": took / one, "finite": finite,
           "first_s": first}  # fmt: skip


def sampling(*, tiny: bool) -> Iterator[Found]:
    """Tokens of 1B in bfloat16 against the time to read its weights once a token."""
    config, new = config_of("1B", tiny=tiny), 8 if tiny else 128
    policy, params = drawn(config, compute_dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    weights = 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    for rows in (8, 64):
        prompts = np.random.default_rng(0).integers(config.vocab, size=(rows, 32), dtype=np.int32)
        draw = functools.partial(
            sample, policy, params, prompts, prompts >= 0, max_new=new, key=jax.random.key(0)
        )
        took, first = seconds_of(draw, 2)
        yield {"rows": rows, "tokens_a_second": rows * new / took, "ms_a_token": 1e3 * took / new,
               "floor_ms_a_token": 1e3 * weights / BANDWIDTH, "first_s": first}  # fmt: skip


PARTS = (environment, ceilings, precision, attentions, steps, grams, sampling, large_steps)


def said(found: Found) -> str:
    """A measurement in a line."""
    each = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
    return ", ".join(each)


def main() -> None:
    """All parts, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--tiny", action="store_true", help="small stand-ins, to try the script")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS])
    options = parser.parse_args()
    out, found, failed = Path(os.environ.get("OUT", ".")) / "device.json", {}, []
    for part in PARTS:
        name = part.__name__
        if options.only and name not in options.only:
            continue
        if time.perf_counter() - BEGUN > 60 * options.minutes - 45:
            print(f"{name}: not run, the time is up", flush=True)
            continue
        print(part.__doc__, flush=True)
        try:
            for each in part(tiny=options.tiny):
                found.setdefault(name, []).append(each)
                said = (
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in each.items()
                )
                print(f"  [{time.perf_counter() - BEGUN:4.0f} s] {', '.join(said)}", flush=True)
                out.write_text(json.dumps(found, indent=1))
        except Exception as error:  # of a device: out of memory, an algorithm that it lacks
            failed.append(name)
            print(
                f"  failed: {type(error).__name__}: {str(error).splitlines()[0][:300]}", flush=True
            )
        gc.collect()
    print(json.dumps(found))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
