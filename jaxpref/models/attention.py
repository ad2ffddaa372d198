"""Softmax attention of query groups: by plain products, by cuDNN, or by a TPU kernel."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref import plain

Kind = Literal["xla", "cudnn", "splash"]
Queries = Float[Array, "batch time kv group head"]
Keys = Float[Array, "batch kv seen head"]
Attend = Bool[Array, "#batch time seen"]


def causal(time: int) -> Bool[Array, "1 time time"]:
    """Each token sees itself and all before it."""
    return jnp.tril(jnp.ones((time, time), bool))[None]


def mix(
    query: Queries,
    key: Keys,
    value: Keys,
    attend: Attend | None,
    *,
    kind: str = "xla",
    cap: float | None = None,
    precision: str = "highest",
) -> Queries:
    """Values of the tokens that each token sees, weighted by the softmax of query times key.

    Who needs plain operations (forward mode, the rules of the Gram) gets ``xla`` whatever is asked
    for, and so do queries of other tokens than the keys', as in decoding.

    Args:
        query: Scaled; the queries of a group read the same key.
        key: Of all tokens that may be seen.
        value: Like it.
        attend: Which tokens each token sees; None sees itself and all before it.
        kind: ``xla`` holds all scores, in at least float32. ``cudnn`` and ``splash`` hold a few
            at a time.
        cap: Bound on scores, `capped`; cuDNN has none.
        precision: Of ``xla``'s products, as `jaxpref.models.decoder.Decoder`.

    Returns:
        Of the shape of `query`.
    """
    if kind == "xla" or plain.ASKED.value or query.shape[1] != key.shape[2]:
        return _xla(query, key, value, attend, cap, precision)
    if kind == "cudnn":
        return _cudnn(query, key, value, attend)
    attend = causal(query.shape[1]) if attend is None else attend
    return _splash(query, key, value, attend, cap)


def capped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap tanh(x / cap)``: about `x` where that is small, and never beyond the cap.

    Args:
        x: Any array.
        cap: None is none.

    Returns:
        Of the shape of `x`.

    >>> capped(jnp.array([0.0, 1e6]), 30.0).tolist()
    [0.0, 30.0]
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def _xla(query, key, value, attend, cap, precision):
    """Head by head, the queries of a group as rows of one product.

    That is the layout that XLA's products take without copies, forward and backward.
    """
    batch, time, kv, group, head = query.shape
    accumulate = jnp.float64 if key.dtype == jnp.float64 else jnp.float32
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv, group * time, head)
    product = partial(jnp.einsum, precision=precision)
    logits = product("bkqd,bksd->bkqs", query, key, preferred_element_type=accumulate)
    logits = capped(logits.reshape(batch, kv, group, time, -1), cap)
    seen = (causal(time) if attend is None else attend)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(accumulate).min), axis=-1)
    if attend is not None:  # a row that attends to nothing: zeros
        weights = jnp.where(seen, weights, jnp.zeros((), accumulate))
    weights = weights.astype(value.dtype).reshape(batch, kv, group * time, -1)
    mixed = product("bkqs,bksd->bkqd", weights, value)
    return mixed.reshape(batch, kv, group, time, head).transpose(0, 3, 1, 2, 4)


def _cudnn(query, key, value, attend):
    batch, time, kv, group, head = query.shape
    mixed = jax.nn.dot_product_attention(
        query.reshape(batch, time, kv * group, head), key.transpose(0, 2, 1, 3),
        value.transpose(0, 2, 1, 3), mask=None if attend is None else attend[:, None],
        is_causal=attend is None, scale=1.0, implementation="cudnn",
    )  # fmt: skip
    return mixed.reshape(query.shape)


BLOCK = 128  # of the kernel: tokens of a block, and entries of a head


def _splash(query, key, value, attend, cap):
    """Heads and texts padded to whole blocks; on other devices than a TPU it is interpreted."""
    batch, time, _, _, head = query.shape
    more, wider = -time % BLOCK, -head % BLOCK
    query = jnp.pad(query, [(0, 0), (0, more), (0, 0), (0, 0), (0, wider)])
    key, value = (jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, wider)]) for x in (key, value))
    # What sees nothing sees itself: the softmax of nothing is no number.
    attend = (
        jnp.pad(attend, [(0, 0), (0, more), (0, more)]) | jnp.eye(time + more, dtype=bool)[None]
    )
    attend = jnp.broadcast_to(attend, (batch, *attend.shape[1:]))
    mixed: Any = jax.lax.platform_dependent(
        query.transpose(0, 2, 3, 1, 4), key, value, attend,
        tpu=partial(_kernel, cap=cap, interpret=False),
        default=partial(_kernel, cap=cap, interpret=True),
    )  # fmt: skip
    return mixed.transpose(0, 3, 1, 2, 4)[:, :time, ..., :head]


def _kernel(query, key, value, attend, *, cap, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": BLOCK for name in names}
    sizes = splash.BlockSizes(**blocks)

    def one(query, key, value, attend):
        mask = jnp.broadcast_to(attend[None], (query.shape[1], *attend.shape))
        kernel = splash.make_splash_mqa(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
            attn_logits_soft_cap=cap,
        )  # fmt: skip
        return jax.vmap(kernel)(query, key, value)

    return jax.vmap(one)(query, key, value, attend)
