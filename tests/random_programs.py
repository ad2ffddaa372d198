"""A grammar of programs: what jax can do with a parameter, in any order and inside one another.

A piece maps parameters, states ``[5 4]`` and five ids to states. A program is some pieces one after
the other, some of them inside a `jit`, a checkpoint, a scan or a branch, and each with parameters
of its own or with those of the piece before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MODE = lax.GatherScatterMode
RANDOM = np.random.default_rng(11)
PARAMS = {
    "W": jnp.asarray(RANDOM.normal(size=(4, 4))),
    "V": jnp.asarray(RANDOM.normal(size=(4, 4))),
    "layers": jnp.asarray(RANDOM.normal(size=(2, 4, 4))),
    "table": jnp.asarray(RANDOM.normal(size=(5, 4))),
    "bias": jnp.asarray(RANDOM.normal(size=(4,))),
    "scale": jnp.asarray(0.7),
    "none": jnp.zeros((0, 4)),
}
EXAMPLES = (
    jnp.asarray(RANDOM.normal(size=(2, 5, 4))),
    jnp.array([[0, 3, 1, 4, 0], [2, 2, 4, 1, 2]], jnp.int32),
)


def rows_of(table, ids, mode, **numbers):
    """`lax.gather` of rows, ids of any dtype."""
    usual = {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}
    numbers = lax.GatherDimensionNumbers(**(usual | numbers))
    return lax.gather(table, ids[:, None], numbers, (1, 4), mode=mode, fill_value=0)


def as_type(dtype):
    return lambda p, x, i: x @ p["W"].astype(dtype).astype(x.dtype)


def beyond(dtype, mode):
    """One id is far out of range: the largest of its dtype, or one that wraps to a negative."""
    return lambda p, x, i: rows_of(p["table"], i.astype(dtype).at[1].set(250), mode)


@jax.custom_jvp
def own_tangent(W, x):
    return jnp.sin(x @ W)


@own_tangent.defjvp
def _(at, by):
    (W, x), (dW, dx) = at, by
    return own_tangent(W, x), jnp.cos(x @ W) * (dx @ W + x @ dW)


@jax.custom_vjp
def own_slope(W, x):
    return x @ W


own_slope.defvjp(lambda W, x: (x @ W, (W, x)), lambda kept, s: (kept[1].T @ s, s @ kept[0].T))


def heads(p, x, i):
    W = p["layers"]
    return jnp.einsum("htd,hde->the", jnp.stack([x, jnp.sin(x)]), W).sum(axis=1)


def carried(p, x, i):
    def step(W, row):
        return jnp.tanh(W * 0.9 + jnp.outer(row, row)), row @ W

    return lax.scan(step, p["W"], x)[1]


def turned_layers(p, x, i):
    step = lambda x, W: (jnp.tanh(x[:, :2] @ W), None)  # noqa: E731
    return lax.scan(step, x, p["layers"].transpose(1, 0, 2))[0]


def scan_of_scans(p, x, i):
    def outer(x, _):
        return lax.scan(lambda x, W: (jnp.tanh(x @ W), W.sum()), x, p["layers"], unroll=2)

    x, sums = lax.scan(outer, x, None, length=2)
    return x * sums.mean()


def plain_slice(p, x, i):
    return x @ lax.dynamic_slice_in_dim(p["layers"], i[0], 1).squeeze(0)


def updated(p, x, i):
    return x @ lax.dynamic_update_slice(p["W"], x[:1] * p["scale"], (i[1], i[2]))


def batched_rows(p, x, i):
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(), start_index_map=(1,),
        operand_batching_dims=(0,), start_indices_batching_dims=(0,),
    )  # fmt: skip
    return lax.gather(p["table"], i[:, None], numbers, (1, 2), mode="clip")[:, :1] * x


def by_pieces(p, x, i):
    def low(x):
        return x @ p["W"]

    return lax.switch(i[0] % 3, [low, lambda x: jnp.sin(x) * p["bias"][None], lambda x: x], x)


PIECES = {
    # Casts: only between floating dtypes is it a view, and only there has a product its rule.
    "to float32": as_type(jnp.float32),
    "to an integer": lambda p, x, i: x @ jnp.round(3 * p["W"]).astype(jnp.int32).astype(x.dtype),
    "straight to an integer": as_type(jnp.int8),
    "to a boolean": as_type(bool),
    "to complex": lambda p, x, i: jnp.abs(jnp.fft.fft(x) @ p["W"].astype(jnp.complex128)),
    "complex and turned": lambda p, x, i: jnp.imag(
        lax.complex(jnp.cos(x), jnp.sin(x)) @ p["W"].astype(jnp.complex128).T
    ),
    "of two": lambda p, x, i: jnp.abs(lax.complex(x, jnp.sin(x)) @ lax.complex(p["W"], p["V"])),
    "its spectrum": lambda p, x, i: x @ jnp.abs(jnp.fft.rfft2(p["W"], s=(4, 6))),
    "wider sums": lambda p, x, i: lax.dot(
        x.astype(jnp.float32), p["W"].astype(jnp.float32), preferred_element_type=jnp.float64
    ),
    "two dtypes": lambda p, x, i: lax.dot_general(
        x.astype(jnp.float32), p["W"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float64
    ),
    "table in two dtypes": lambda p, x, i: (
        rows_of(p["table"], i, MODE.CLIP)
        + (x.astype(jnp.float32) @ p["table"].astype(jnp.float32).T @ jnp.ones((5, 4), jnp.float32))
        .astype(x.dtype)
    ),
    # Gathers.
    "fill, int8": beyond(jnp.int8, MODE.FILL_OR_DROP),
    "fill, uint8": beyond(jnp.uint8, MODE.FILL_OR_DROP),
    "fill, uint32": lambda p, x, i: rows_of(
        p["table"], i.astype(jnp.uint32).at[0].set(2**32 - 1), MODE.FILL_OR_DROP
    ),
    "clip, int8": beyond(jnp.int8, MODE.CLIP),
    "clip, uint8": beyond(jnp.uint8, MODE.CLIP),
    "clip, uint32": lambda p, x, i: rows_of(
        p["table"], i.astype(jnp.uint32).at[0].set(2**32 - 1), MODE.CLIP
    ),
    "promised": lambda p, x, i: rows_of(p["table"], i, MODE.PROMISE_IN_BOUNDS),
    "from the end": lambda p, x, i: p["table"][-i],
    "columns": lambda p, x, i: p["table"][:4].T[:, i % 4].T,
    "entries": lambda p, x, i: x * p["W"][i % 4, (i + 1) % 4][:, None],
    "along": lambda p, x, i: jnp.take_along_axis(p["table"], (i % 4)[:, None], axis=1) * x,
    "batched": batched_rows,
    "two axes of ids": lambda p, x, i: p["table"][jnp.stack([i, i * 2 % 5])].sum(axis=0),
    "no ids": lambda p, x, i: x + p["table"][i[:0]].sum(),
    "rows of bits": lambda p, x, i: jnp.where((x > 0), rows_of(p["table"], i, MODE.CLIP), x),
    "slice": plain_slice,
    "index beyond": lambda p, x, i: x @ lax.dynamic_index_in_dim(p["layers"], 9, keepdims=False),
    "update": updated,
    # Products.
    "heads": heads,
    "outer": lambda p, x, i: lax.dot_general(x, p["bias"], (((), ()), ((), ()))).sum(axis=1),
    "by a number": lambda p, x, i: lax.dot_general(p["scale"], x, (((), ()), ((), ()))),
    "to a number": lambda p, x, i: x * jnp.vdot(p["W"], x[1:]),
    "on the left": lambda p, x, i: (p["W"] @ x.T).T,
    "with itself": lambda p, x, i: x @ p["W"] @ p["W"].T,
    "its square": lambda p, x, i: x @ jnp.sin(p["W"] @ p["W"]),
    "both at once": lambda p, x, i: x @ (p["W"] @ p["V"]),
    "convolution": lambda p, x, i: lax.conv_general_dilated(
        x[None], p["W"][None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "solve": lambda p, x, i: jnp.linalg.solve(p["W"] + 9 * jnp.eye(4), x.T).T,
    # Moves.
    "turned": lambda p, x, i: x @ p["W"].reshape(2, 8).reshape(4, 4).T,
    "reshaped": lambda p, x, i: (x @ p["W"].reshape(1, 4, 4, 1).squeeze((0, 3))[::-1]),
    "read as rows": lambda p, x, i: rows_of(p["layers"].reshape(8, 4), i, MODE.CLIP),
    "sorted": lambda p, x, i: x @ jnp.sort(jnp.roll(p["W"], 1, axis=0), axis=0),
    "joined": lambda p, x, i: x @ jnp.concatenate([p["W"][:2], p["V"][2:], p["none"]]),
    "stopped": lambda p, x, i: x @ lax.stop_gradient(p["W"]) + jnp.sin(x @ p["W"]),
    # Sizes of zero.
    "no width": lambda p, x, i: x + x[:, :0] @ p["none"],
    "no rows": lambda p, x, i: x + jnp.sum(x[:0] @ p["W"]),
    "no columns": lambda p, x, i: x + jnp.sum(x @ p["W"][:, :0]),
    # Programs inside.
    "scan": lambda p, x, i: lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, p["layers"])[0],
    "scan back": lambda p, x, i: lax.scan(
        lambda x, W: (jnp.tanh(x @ W.T + W[:1]), None), x, p["layers"], reverse=True
    )[0],
    "scan of none": lambda p, x, i: lax.scan(lambda x, W: (x @ W, None), x, p["layers"][:0])[0],
    "scan of scans": scan_of_scans,
    "turned layers": turned_layers,
    "carried": carried,
    "loop": lambda p, x, i: lax.fori_loop(0, 2, lambda n, x: jnp.tanh(x @ p["layers"][n]), x),
    "branch": lambda p, x, i: lax.cond(x[0, 0] > 0, lambda: x @ p["W"], lambda: x * p["scale"]),
    "switch": by_pieces,
    "own tangent": lambda p, x, i: own_tangent(p["W"], x),
    "own slope": lambda p, x, i: own_slope(p["W"], x),
    "saved": lambda p, x, i: jax.checkpoint(
        lambda W, x: jnp.sin(jnp.sin(x @ W) @ W), policy=jax.checkpoint_policies.dots_saveable
    )(p["W"], x),
    "its slope": lambda p, x, i: jax.grad(lambda x: jnp.sin(x @ p["W"]).sum())(x),
    "its tangent": lambda p, x, i: jax.jvp(lambda x: jnp.sin(x @ p["W"]), (x,), (x,))[1],
    "each row": lambda p, x, i: jax.vmap(lambda row: row @ p["W"])(x),
    "running": lambda p, x, i: lax.associative_scan(jnp.multiply, x * p["bias"][None]),
    "barrier": lambda p, x, i: x @ lax.optimization_barrier(p["W"]),
}  # fmt: skip
REVERSE_ONLY = {"own slope"}
ROUNDED = {"to float32", "wider sums", "two dtypes", "table in two dtypes"}

INSIDE = {  # a piece inside something
    "alone": lambda piece: piece,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "branch": lambda piece: (
        lambda p, x, i: lax.cond(x[1, 1] > -9, lambda p, x: piece(p, x, i), lambda p, x: x, p, x)
    ),
    "scan": lambda piece: (
        lambda p, x, i: lax.scan(
            lambda x, W: (piece(p | {"W": W, "V": W.T}, x, i), None), x, p["layers"]
        )[0]
    ),
}


class Part(NamedTuple):
    """A piece of a program."""

    name: str
    inside: str
    own: bool  # whether its parameters are its own


def deal(seed, size):
    """All pieces once, in programs of so many."""
    random = np.random.default_rng(seed)
    names = random.permutation(list(PIECES)).tolist()
    inside = random.choice(list(INSIDE), len(names), p=[0.4, 0.15, 0.15, 0.15, 0.15]).tolist()
    own = (random.random(len(names)) < 0.7).tolist()
    parts = [Part(*part) for part in zip(names, inside, own, strict=True)]
    return [parts[at : at + size] for at in range(0, len(parts), size)]


class Asked(dict):
    """Parameters that remember which of them were asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)


def asked_for(name):
    """Names of the parameters of a piece."""
    asked = Asked(PARAMS)
    jax.eval_shape(lambda x, ids: PIECES[name](asked, x, ids), *(x[0] for x in EXAMPLES))
    return asked.names


def build(parts):
    """``(params, (states, ids)) -> states`` of a program, and its parameters."""
    sets = np.cumsum([part.own or at == 0 for at, part in enumerate(parts)]) - 1
    params = [{} for _ in range(sets[-1] + 1)]
    for part, at in zip(parts, sets, strict=True):
        names = asked_for(part.name) | ({"layers"} if part.inside == "scan" else set())
        params[at] |= {name: PARAMS[name] * 0.9**at for name in sorted(names)}

    def program(params, example):
        x, ids = example
        for part, at in zip(parts, sets, strict=True):
            x = 0.5 * x + 0.3 * INSIDE[part.inside](PIECES[part.name])(params[at], x, ids)
        return x

    return program, params
