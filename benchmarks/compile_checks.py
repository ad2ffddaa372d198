"""What the compilers of accelerators make of this library's programs, on a machine without one.

Run:     make compile-checks   (installs the compilers, 0.5 GB of wheels, in an environment of its
         own; a check takes 10 seconds to 4 minutes)

XLA compiles for a GPU that is described to it, and libtpu for a TPU by its name. What is read off
the result: memory, collectives, precision of products, copies in loops. No speed.
"""

import argparse
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.configs import CONFIGS
from jaxpref import losses
from jaxpref.data.batches import Batch
from jaxpref.logprobs import shared_prompt_scores
from jaxpref.models import decoder, sampling
from jaxpref.training import parallel
from jaxpref.training.step import State, init_state, make_step

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GB = 1e9


def gpus(number: int) -> list[Any]:
    """So many H100 of one host, described and not there."""
    shape = f"1x1x{number}"
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name=shape, target_config=H100, topology=shape
    ).devices)  # fmt: skip


def mesh_of(devices: list[Any], fsdp: int, tensor: int = 1) -> Mesh:
    """A mesh of devices that are not there."""
    sizes = (len(devices) // (fsdp * tensor), fsdp, tensor)
    return Mesh(np.array(devices).reshape(sizes), parallel.AXES, axis_types=(AxisType.Auto,) * 3)


def nbytes(tree: Any) -> float:
    """Of all arrays but keys, in GB."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) / GB


def step_of(
    name: str, mesh: Mesh, *, pairs: int, tokens: int, optimizer: Any = None, **options: Any
) -> tuple[Any, State]:
    """The lowered step of DPO on a mesh, and its state's shapes, placed by the rules."""
    policy, params = decoder.abstract(CONFIGS[name], scan=True, **options)
    policy = parallel.spread(policy, mesh, options.get("compute_dtype"))
    optimizer = optimizer or optax.adam(1e-6)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, key=jax.random.key(0)), params)
    where = parallel.shardings(state, mesh)
    state = jax.tree.map(placed, state, where)
    spread = NamedSharding(mesh, PartitionSpec(parallel.BATCH))

    def shape(*axes: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((pairs, *axes), dtype, sharding=spread)

    ids, real, scored = (shape(2, tokens, dtype=x) for x in (jnp.int32, jnp.bool_, jnp.bool_))
    batch = Batch(ids, real, scored, shape(2, dtype=jnp.float32), shape(dtype=jnp.int32))

    def score(params, batch):
        rooms = {"packed_time": 3 * tokens // 2, "max_response": tokens // 2}
        return shared_prompt_scores(policy, params, *batch[:3], **rooms)

    def loss(scores, batch):
        return losses.dpo(scores.logp, batch.reference, beta=0.1)

    step = make_step(score, loss, optimizer, mesh=mesh, shardings=where)
    return step.lower(state, batch), state


def placed(leaf: Any, sharding: Any) -> Any:
    """A shape with its place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def memory(compiled: Any) -> dict[str, float]:
    """Of one device, in GB."""
    found = compiled.memory_analysis()
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    more = found.output_size_in_bytes - found.alias_size_in_bytes
    return {"arguments": arguments / GB, "temporary": temporary / GB,
            "total": (arguments + temporary + more) / GB}  # fmt: skip


def one_billion() -> dict[str, Any]:
    """1B, Adam, bf16 compute, remat, 4 x 128 tokens on one H100: parameters 4.3 times at most."""
    mesh = mesh_of(gpus(1), 1)
    lowered, state = step_of(
        "1B", mesh, pairs=4, tokens=128, compute_dtype=jnp.bfloat16, remat=True
    )
    found = memory(lowered.compile())
    times = found["total"] / nbytes(state.params)
    return {**found, "parameters": nbytes(state.params), "times": times, "ok": times <= 4.3}


def long_texts() -> dict[str, Any]:
    """135M, bf16, cuDNN, remat, 8 x 1,024 on one H100: 2 GB of temporaries, no scores held."""
    mesh, packed = mesh_of(gpus(1), 1), 3 * 1024 // 2
    options = {"compute_dtype": jnp.bfloat16, "remat": True}
    found = {}
    for kind in ("xla", "cudnn"):
        lowered, _ = step_of("135M", mesh, pairs=8, tokens=1024, attention=kind, **options)
        compiled = lowered.compile()
        shape = rf"f32\[\d+,\d+,(?:\d+,)*{packed},{packed}\]"  # the MLP is as wide
        scores = re.findall(shape, compiled.as_text())
        found |= {f"{kind}: temporary": memory(compiled)["temporary"],
                  f"{kind}: scores in float32": len(scores)}  # fmt: skip
    good = found["cudnn: temporary"] <= 2 and not found["cudnn: scores in float32"]
    return {**found, "ok": good}


def eight_gpus() -> dict[str, Any]:
    """8B, Adam, bf16 compute, remat, 8 x 512 on 8 H100: 22 GB each, all stays in its slices."""
    return _sharded(gpus(8), 8, 22.0)


def tpus() -> dict[str, Any]:
    """The same on a TPU v5e 4x4, 16 GB each."""
    devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    return _sharded(list(devices), 16, 16.0)


def _sharded(devices: list[Any], pairs: int, room: float) -> dict[str, Any]:
    mesh = mesh_of(devices, len(devices))
    lowered, state = step_of(
        "8B", mesh, pairs=pairs, tokens=512, compute_dtype=jnp.bfloat16, remat=True
    )
    compiled = lowered.compile()
    found, text, config = memory(compiled), compiled.as_text(), CONFIGS["8B"]
    gathers = [line for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    table = f"[{config.vocab},{config.width}]"
    whole = [line for line in gathers if table in line.split(" all-gather")[0]]
    flat = zip(jax.tree.leaves(compiled.output_shardings[0]), jax.tree.leaves(state), strict=True)
    moved = sum(not out.is_equivalent_to(leaf.sharding, leaf.ndim) for out, leaf in flat)
    counts = {
        "table gathered": len(whole),
        "in a loop": sum("while/body" in line for line in whole),
        "gathers for the norm": sum("tree_norm" in line for line in gathers),
        "leaves that move": moved,
    }
    good = found["total"] <= room and not any(list(counts.values())[1:])
    return {**found, **counts, "ok": good}


def precision() -> dict[str, Any]:
    """135M in float32 on an H100: no matrix product is left to the device's default."""
    lowered, _ = step_of("135M", mesh_of(gpus(1), 1), pairs=2, tokens=128)
    found = re.findall(r"stablehlo\.dot_general.*precision = \[(\w+), \w+\]", lowered.as_text())
    count = len(re.findall(r"stablehlo\.dot_general", lowered.as_text()))
    highest = found.count("HIGHEST")
    return {"products": count, "highest": highest, "ok": count == highest > 0}


def decoding() -> dict[str, Any]:
    """Sampling, 135M, 8 x (64 + 64) on an H100: no copy of cache or weights in the loop."""
    config = CONFIGS["135M"]
    policy, params = decoder.abstract(config, scan=True, compute_dtype=jnp.bfloat16)
    where = parallel.replicated(mesh_of(gpus(1), 1))
    params = jax.tree.map(lambda x: placed(x, where), params)
    prompt = np.ones((8, 64), np.int32)
    draw = functools.partial(sampling.sample, policy, max_new=64, key=jax.random.key(0))
    program = jax.jit(lambda p: draw(p, prompts=prompt, is_prompt=prompt > 0))
    text = str(program.lower(params).compile().as_text())
    cache = f"[{config.layers},8,{config.kv_heads},127,{config.head_width}]"
    made = re.findall(rf"= \S*{re.escape(cache)}\S* (?:copy|broadcast)\(", text)
    weights = re.findall(rf"= \S*\[{config.layers},\d+,\d+\]\S* (?:copy|fusion)\(", text)
    return {"copies of the cache": len(made), "of stacked weights": len(weights),
            "ok": not made and not weights}  # fmt: skip


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "precision": precision, "one_billion": one_billion, "decoding": decoding,
    "long_texts": long_texts,
    "eight_gpus": eight_gpus, "tpus": tpus,
}  # fmt: skip


def main() -> None:
    """Runs the checks named, or all, and says each number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", help="names, by default all")
    found = {}
    for name in parser.parse_args().checks or CHECKS:
        began = time.time()
        try:
            found[name] = CHECKS[name]()
        except Exception as error:  # a compiler's own, of any kind: the next check goes on
            found[name] = {"ok": False, "error": str(error).splitlines()[0][:300]}
        said = ", ".join(
            f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found[name].items()
        )
        print(f"{CHECKS[name].__doc__}\n  {said} ({time.time() - began:.0f} s)", flush=True)
    print(json.dumps(found))
    sys.exit(not all(each["ok"] for each in found.values()))


if __name__ == "__main__":
    main()
