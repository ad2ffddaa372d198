"""The decoder's parts: norms, rotary positions, attention, MLP, one block."""

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key, Num

from jaxpref.models import attention

if TYPE_CHECKING:
    from jaxpref.models.decoder import DecoderConfig

Hidden = Float[Array, "batch time width"]
Attend = Bool[Array, "#batch time seen"]
Keys = Float[Array, "*layers batch kv seen head"]
KeysValues = tuple[Keys, Keys]
Rotation = tuple[Float[Array, "rows time half"], Float[Array, "rows time half"]]  # cosine, sine
Sight = tuple[Rotation | None, Attend | None]  # what a layer turns heads by, and who sees whom
Precision = Literal["highest", "high", "default"]  # of matrix products, as `jax.lax.Precision`
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
_normal = nnx.initializers.normal(0.02)


def wide(dtype: DTypeLike) -> jnp.dtype:
    """At least float32: what norms, angles and softmaxes are computed in."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def rope_frequencies(config: "DecoderConfig", *, local: bool = False) -> np.ndarray:
    """Radians a position for each rotated pair of dimensions, scaled ones too.

    Args:
        config: Of the decoder.
        local: Of the layers that slide a window, which may have a base of their own; that is never
            scaled.

    Returns:
        One a pair, ``[half]``.
    """
    rotated = 2 * int(config.head_width * config.rope_fraction / 2)
    if local and config.local_rope_base is not None:
        return config.local_rope_base ** (-np.arange(0, rotated, 2) / rotated)
    frequencies = config.rope_base ** (-np.arange(0, rotated, 2) / rotated)
    if config.rope_factors is not None:
        frequencies = frequencies / np.asarray(config.rope_factors)
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    turns = scaling.original_positions * frequencies / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rotation(frequencies: np.ndarray, positions: Num[Array, "rows time"], dtype) -> Rotation:
    """Cosine and sine of each position's angles.

    Args:
        frequencies: Radians a position, ``[half]``.
        positions: ``[rows time]``.
        dtype: Of the result, at least float32.

    Returns:
        Two arrays ``[rows time half]``.
    """
    angles = positions.astype(dtype)[:, :, None] * jnp.asarray(frequencies, dtype)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def windowed(
    window: int,
    positions: Int[Array, "rows time"],
    seen_positions: Int[Array, "rows seen"],
    attend: Attend | None,
) -> Attend:
    """What is left of `attend` where a token sees the last `window` positions, its own included.

    Args:
        window: At least 1.
        positions: Of the tokens that see, within their own sequences.
        seen_positions: Of those that are seen.
        attend: Which ones each sees; None: itself and all before it.

    Returns:
        Of the shape of `attend`.
    """
    near = positions[:, :, None] - seen_positions[:, None] < window
    return near & (attention.causal(positions.shape[1]) if attend is None else attend)


def rotate(x: Float[Array, "batch time heads head"], by: Rotation) -> Array:
    """Rotates the first dimensions of each head, paired half against half; the rest stay.

    Args:
        x: ``[batch time heads head]``.
        by: Of `rotation`; one row serves the whole batch.

    Returns:
        Of the shape of `x`.
    """
    cosine, sine = (part[:, :, None, :].astype(x.dtype) for part in by)
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


class Norm(nnx.Module):
    """RMS norm, LayerNorm, or LayerNorm without parameters; computed in at least float32."""

    def __init__(self, config: "DecoderConfig", width: int, *, kind: str, dtype, param_dtype):
        if kind != "layer_plain":
            self.scale = nnx.Param(jnp.full(width, 1.0 - config.norm_offset, param_dtype))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.kind, self.dtype = kind, dtype

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises the last axis."""
        x = x.astype(wide(x.dtype))
        if self.kind != "rms":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + (-1,)
        if self.kind != "layer_plain":
            x = x * (self.scale[...].astype(x.dtype) + self.offset).reshape(shape)
        if self.kind == "layer":
            x = x + self.bias[...].astype(x.dtype).reshape(shape)
        return x.astype(self.dtype)


class LowRank(NamedTuple):
    """A kernel and the adapter beside it, in the kernel's place: see `jaxpref.models.lora`.

    Attributes:
        kernel: ``[in out]``.
        a: ``[in rank]``.
        b: ``[rank out]``.
        scale: Of the product of both.
        key: Draws the entries of the input that `a` does not see; None drops nothing.
        kept: Share of those that it sees.
    """

    kernel: Float[Array, "... inputs outputs"]
    a: Float[Array, "... inputs rank"]
    b: Float[Array, "... rank outputs"]
    scale: Float[Array, "..."]
    key: Key[Array, "..."] | None = None
    kept: Float[Array, "..."] | None = None


def product(
    x: Float[Array, "tokens inputs"], kernel: Array | LowRank, dtype, precision: str
) -> Float[Array, "tokens outputs"]:
    """``x @ kernel``, and ``scale * (x @ a) @ b``: never a kernel that is their sum.

    Args:
        x: ``[tokens in]``.
        kernel: ``[in out]``, alone or with an adapter.
        dtype: That the matrices are rounded to.
        precision: Of the products.

    Returns:
        ``[tokens out]``.
    """

    def times(x, matrix):
        return jnp.matmul(x, matrix.astype(dtype), precision=precision)

    if not isinstance(kernel, LowRank):
        return times(x, kernel)
    seen = x
    if kernel.key is not None and kernel.kept is not None:
        kept = jax.random.bernoulli(kernel.key, kernel.kept, x.shape)
        seen = jnp.where(kept, x / kernel.kept.astype(x.dtype), jnp.zeros_like(x))
    added = times(times(seen, kernel.a), kernel.b)
    return times(x, kernel.kernel) + kernel.scale.astype(dtype) * added


class Linear(nnx.Module):
    """``x @ kernel + bias`` on the last axis; the kernel may be a `LowRank`."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, rngs, dtype, param_dtype, precision
    ):
        self.kernel = nnx.Param(_normal(rngs.params(), (inputs, outputs), param_dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, param_dtype))
        self.has_bias, self.dtype, self.precision = bias, dtype, precision

    def __call__(self, x: Float[Array, "batch time inputs"]) -> Float[Array, "batch time outputs"]:
        """One matrix product over all tokens of the batch."""
        # One axis of tokens: with two, XLA writes a transposed copy of the kernel's cotangent.
        tokens = x.reshape(-1, x.shape[-1])
        y = product(tokens, self.kernel.get_value(), self.dtype, self.precision)
        y = y.reshape(*x.shape[:-1], -1)
        return y + self.bias[...].astype(self.dtype)[None, None] if self.has_bias else y


class Attention(nnx.Module):
    """Grouped-query attention; keys and values are never repeated."""

    def __init__(
        self, config: "DecoderConfig", *, rngs: nnx.Rngs, dtype, param_dtype, precision, kind
    ):
        c, types = config, {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        types["precision"] = precision
        queries, keys = c.heads * c.head_width, c.kv_heads * c.head_width
        self.query = Linear(c.width, queries, bias=c.qkv_bias, **types)
        self.key = Linear(c.width, keys, bias=c.qkv_bias, **types)
        self.value = Linear(c.width, keys, bias=c.qkv_bias, **types)
        self.output = Linear(queries, c.width, bias=c.output_bias, **types)
        if c.query_key_norm:
            norm = partial(Norm, c, kind="rms", dtype=dtype, param_dtype=param_dtype)
            whole = c.query_key_norm == "whole"
            self.query_norm = norm(queries if whole else c.head_width)
            self.key_norm = norm(keys if whole else c.head_width)
        self.config, self.how = config, {"kind": kind, "precision": precision}

    def __call__(
        self,
        x: Hidden,
        by: Rotation | None,
        attend: Attend | None,
        past: KeysValues | None = None,
        at: int | Int[Array, ""] = 0,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Hidden, KeysValues]:
        """Mixes the tokens of each sequence.

        With `past`, the tokens' keys and values replace its own from column `at` on, and `attend`
        counts its columns; it may be of all layers, stacked, and then this one's number is `layer`.
        Returns the keys and values that were attended to as well, of all layers if they came so.
        """
        c, (batch, time, _) = self.config, x.shape
        query, key, value = self.query(x), self.key(x), self.value(x)
        if c.clip_qkv is not None:
            query, key, value = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (query, key, value))
        if c.query_key_norm == "whole":
            query, key = self.query_norm(query), self.key_norm(key)
        query = query.reshape(batch, time, c.heads, c.head_width)
        key = key.reshape(batch, time, c.kv_heads, c.head_width)
        value = value.reshape(batch, time, c.kv_heads, c.head_width)
        if c.query_key_norm is True:
            query, key = self.query_norm(query), self.key_norm(key)
        if by is not None:
            query, key = rotate(query, by), rotate(key, by)
        query = query.reshape(batch, time, c.kv_heads, -1, c.head_width)
        query = query / math.sqrt(c.score_width or c.head_width)
        key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        kept = (key, value)
        if past is not None:
            kept = (_write(past[0], key, layer, at), _write(past[1], value, layer, at))
            key, value = kept if layer is None else (x[layer] for x in kept)
        mixed = attention.mix(query, key, value, attend, **self.how, cap=c.score_cap)
        return self.output(mixed.reshape(batch, time, c.heads * c.head_width)), kept


def _write(past: Array, new: Array, layer: Array | None, at: int | Array) -> Array:
    """Columns of a cache from `at` on; in place where it is a loop's own."""
    if layer is None:
        return jax.lax.dynamic_update_slice_in_dim(past, new, at, axis=2)
    start = [jnp.asarray(x, jnp.int32) for x in (layer, 0, 0, at, 0)]
    return jax.lax.dynamic_update_slice(past, new[None], start)


class Mlp(nnx.Module):
    """``down(activation(gate x) * up x)``, or ``down(activation(up x))`` without a gate."""

    def __init__(self, config: "DecoderConfig", *, rngs: nnx.Rngs, dtype, param_dtype, precision):
        c, types = config, {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        linear = partial(Linear, bias=c.mlp_bias, precision=precision, **types)
        if c.gated:
            self.gate = linear(c.width, c.mlp_width)
        self.up = linear(c.width, c.mlp_width)
        self.down = linear(c.mlp_width, c.width)
        self.gated, self.activation = c.gated, c.activation

    def __call__(self, x: Hidden) -> Hidden:
        """Works on each token alone."""
        activation = ACTIVATIONS[self.activation]
        return self.down(
            activation(self.gate(x)) * self.up(x) if self.gated else activation(self.up(x))
        )


class Block(nnx.Module):
    """Attention and MLP, each between norms: of what it reads, of what it adds, or of both."""

    def __init__(
        self, config: "DecoderConfig", *, rngs: nnx.Rngs, dtype, param_dtype, precision, kind
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        norm = partial(Norm, config, config.width, kind=config.norm, **types)
        self.before, self.after = config.norms != "after", config.norms != "before"
        if self.before:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if self.after:
            self.attention_output_norm, self.mlp_output_norm = norm(), norm()
        self.attention = Attention(config, rngs=rngs, precision=precision, kind=kind, **types)
        self.mlp = Mlp(config, rngs=rngs, precision=precision, **types)
        self.parallel = config.parallel_residual

    def __call__(
        self,
        x: Hidden,
        by: Rotation | None,
        attend: Attend | None,
        past: KeysValues | None = None,
        at: int | Int[Array, ""] = 0,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Hidden, KeysValues]:
        """One layer; arguments and the second result as `Attention.__call__`."""
        read = self.attention_norm(x) if self.before else x
        mixed, kept = self.attention(read, by, attend, past, at, layer)
        mixed = x + (self.attention_output_norm(mixed) if self.after else mixed)
        read = x if self.parallel else mixed
        added = self.mlp(self.mlp_norm(read) if self.before else read)
        return mixed + (self.mlp_output_norm(added) if self.after else added), kept
