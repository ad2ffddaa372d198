"""One causal decoder for every family the papers use, as pure functions of its parameters.

The families differ in a `DecoderConfig` alone: Llama, Mistral, SmolLM2, GPT-2, GPT-NeoX (Pythia),
OLMo-1, Gemma-1, Qwen2 and Qwen3. Logits are never made here: a `Policy` gives the hidden states
after the final norm and, apart from them, the unembedding.

Parameters are addressed by dotted paths, kernels as ``[in, out]``::

    embedding                                        [vocab width]
    positions                                        [max_positions width]   learned only
    layers.0.attention_norm.{scale,bias}             [width]
    layers.0.attention.{query,key,value,output}.{kernel,bias}
    layers.0.attention.{query_norm,key_norm}.scale   [head_width]
    layers.0.mlp_norm.{scale,bias}                   [width]
    layers.0.mlp.{gate,up,down}.{kernel,bias}
    norm.{scale,bias}                                [width]
    unembedding                                      [vocab width]           untied only

With ``scan=True`` the number is left out, ``layers.attention...``, and axis 0 counts layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from jaxpref.models import blocks
from jaxpref.models.bounds import Bounds, mark


class RopeScaling(NamedTuple):
    """Llama 3's stretching of low rotary frequencies for long contexts."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Size and family of a decoder.

    Attributes:
        vocab: Rows of the embedding.
        width: Of the residual stream.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        head_width: Of each head; even with rope.
        mlp_width: Of the MLP's middle.
        norm: RMS norm, LayerNorm, or LayerNorm without parameters (OLMo-1).
        norm_epsilon: Added to the mean square.
        norm_offset: Added to the norms' scales; 1 for Gemma.
        activation: Of the MLP; ``gelu`` is the exact one.
        gated: ``activation(gate) * up``, else ``activation(up)``.
        positions: Rotary, or a learned table.
        max_positions: Rows of the learned table; with rope the longest text it was made for, which
            is no bound: angles go on.
        rope_base: Base of the rotary wave lengths.
        rope_fraction: Share of each head that is rotated (GPT-NeoX: 0.25).
        rope_scaling: Llama 3's, or None.
        rope_factors: Divisors of the rotary frequencies, one for each rotated pair of axes; None
            divides by nothing. GGUF files hold Llama 3's scaling in this form.
        window: Tokens that attention sees, its own included; None sees all. The window itself is
            not computed: texts that are longer are refused, for shorter ones it hides nothing.
        parallel_residual: Attention and MLP read the same stream (GPT-NeoX).
        qkv_bias: Query, key and value have biases (GPT-2, GPT-NeoX, Qwen2).
        output_bias: So has attention's output.
        mlp_bias: So have the MLP's products.
        query_key_norm: RMS norm of each query and key head (Qwen3).
        clip_qkv: Bound on queries, keys and values (OLMo-1 7B), or None.
        embedding_scale: Factor on the embedded tokens; ``sqrt(width)`` for Gemma.
        tied: The unembedding is the embedding.

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm: Literal["rms", "layer", "layer_plain"] = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    positions: Literal["rope", "learned"] = "rope"
    max_positions: int = 2048
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] | None = None
    window: int | None = None
    parallel_residual: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    clip_qkv: float | None = None
    embedding_scale: float = 1.0
    tied: bool = True

    def __post_init__(self):
        sizes = [
            "vocab",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "mlp_width",
            "max_positions",
        ]
        sizes += ["window"] if self.window is not None else []
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        choices = {
            "norm": ("rms", "layer", "layer_plain"),
            "activation": tuple(blocks.ACTIVATIONS),
            "positions": ("rope", "learned"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {known}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {self.kv_heads}, expected a divisor of heads, {self.heads}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"head_width: got {self.head_width}, expected an even number for rope")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction: got {self.rope_fraction}, expected in (0, 1]")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base: got {self.rope_base}, expected more than 0")
        rotated = int(self.head_width * self.rope_fraction / 2)
        if self.rope_factors is not None and len(self.rope_factors) != rotated:
            raise ValueError(
                f"rope_factors: got {len(self.rope_factors)}, expected {rotated}, one for each "
                "rotated pair of axes"
            )


def _no_cache(*_: Any) -> Any:
    raise ValueError("policy: got one without `cached`, expected a decoder's")


class Policy(NamedTuple):
    """A language model as pure functions of its parameters; ``logits = hidden @ unembedding.T``.

    Attributes:
        hidden: ``(params, tokens, positions=None, attend=None)`` to the hidden states after the
            final norm, ``[batch time width]``; arguments as `Decoder.__call__`.
        unembedding: ``params`` to ``[vocab width]``.
        cached: `hidden` of new tokens after others, for `jaxpref.models.sampling`:
            ``(params, tokens, positions, attend, cache=None, at=0)``, as `Decoder.cached`. Raises
            ValueError where a policy has no such path.
        bounds: Which ids and positions `hidden` reads; others make it NaN.
            `jaxpref.models.bounds.check` names the text before.
    """

    hidden: Callable[..., Float[Array, "batch time width"]]
    unembedding: Callable[..., Float[Array, "vocab width"]]
    cached: Callable[..., tuple[Float[Array, "batch time width"], PyTree]] = _no_cache
    bounds: Bounds = Bounds()


class Decoder(nnx.Module):
    """Tokens to the hidden states after the final norm.

    Args:
        config: Size and family.
        rngs: Keys of the initial parameters (normal, standard deviation 0.02; norms one).
        param_dtype: Of the parameters.
        compute_dtype: Of the matrix products and the residual stream; norms, rotary angles and
            softmaxes stay in at least float32.
        precision: Of the matrix products, forward and backward. ``highest`` is what the dtype says.
            On GPU and TPU the others round a float32 product's inputs, to TF32 or bfloat16, and
            then small updates of the parameters vanish or are invented; on CPU all are the same.
        scan: One block with stacked parameters, compiled once for all layers. Compiles faster and
            runs slower on CPU, where the stacked weights are sliced and their gradients stacked.
        remat: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
        precision: str = "highest",
        scan: bool = False,
        remat: bool = False,
    ):
        if precision not in (known := get_args(blocks.Precision)):
            raise ValueError(f"precision: got {precision!r}, expected one of {known}")
        types = {"dtype": compute_dtype, "param_dtype": param_dtype}

        def table(rows: int) -> nnx.Param:
            shape = (rows, config.width)
            return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype))

        def block(rngs: nnx.Rngs) -> blocks.Block:
            return blocks.Block(config, rngs=rngs, precision=precision, **types)

        self.embedding = table(config.vocab)
        if config.positions == "learned":
            self.positions = table(config.max_positions)
        if scan:
            self.layers = nnx.vmap(block)(rngs.split(config.layers))
        else:
            self.layers = nnx.List([block(rngs) for _ in range(config.layers)])
        self.norm = blocks.Norm(config, config.width, kind=config.norm, **types)
        if not config.tied:
            self.unembedding = table(config.vocab)
        self.config, self.compute_dtype = config, compute_dtype
        self.remat = remat
        table_end = config.max_positions if config.positions == "learned" else None
        ends = [end for end in (table_end, config.window) if end is not None]
        self.bounds = Bounds(config.vocab, min(ends, default=None))

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch time"],
        positions: Int[Array | np.ndarray, "batch time"] | None = None,
        attend: Bool[Array | np.ndarray, "batch time time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """Hidden states after the final norm.

        Args:
            tokens: Token ids. What sees an id outside the vocabulary is NaN.
            positions: Of each token from 0; None counts from the left. On padding any value does.
                What sees a position outside a learned table, or outside a sliding window, is NaN.
            attend: Which tokens (last axis) each token sees, causality included; None sees itself
                and all before it, which is right for padding on the right. A token that sees
                nothing gets finite numbers of no meaning.
        """
        if positions is None:
            positions = np.arange(tokens.shape[1])[None]
        tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
        attend = None if attend is None else jnp.asarray(attend)
        x, by = self._embed(tokens, positions)
        hidden = self.norm(self._blocks(x, by, attend))
        return mark(hidden, tokens, positions, attend, self.bounds)

    def cached(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        attend: Bool[Array, "batch time seen"],
        cache: PyTree = None,
        at: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "batch time width"], PyTree]:
        """Hidden states of tokens that also see cached ones: no token is encoded twice.

        Args:
            tokens: Token ids, the first of them in column `at` of the cache.
            positions: Of each token from 0.
            attend: Which columns of the cache each token sees, its own included.
            cache: Keys and values of all layers, each ``[batch kv seen head]`` (with ``scan=True``
                ``[layers batch kv seen head]``); None for the tokens' own alone.
            at: Column of the first token.

        Returns:
            ``(hidden, cache)``, the tokens' keys and values written into the cache. Hidden states
            are NaN as of `__call__`, but cached tokens are not looked at again.
        """
        inside = attend if cache is None else None
        mark_bad = partial(
            mark, tokens=tokens, positions=positions, attend=inside, bounds=self.bounds
        )
        x, by = self._embed(tokens, positions)
        if isinstance(self.layers, nnx.List):
            kept = []
            for block, past in zip(self.layers, cache or [None] * len(self.layers), strict=True):
                x, now = block(x, by, attend, past, at)
                kept.append(now)
            return mark_bad(self.norm(x)), kept
        graph, stacked = nnx.split(self.layers)

        if cache is None:
            x, cache = jax.lax.scan(
                lambda x, params: nnx.merge(graph, params)(x, by, attend), x, stacked
            )
            return mark_bad(self.norm(x)), cache

        def apply(carry, layer):  # the cache is carried: one column of it is written, none copied
            (x, cache), (params, number) = carry, layer
            return nnx.merge(graph, params)(x, by, attend, cache, at, number), None

        numbers = jnp.arange(self.config.layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(apply, (x, cache), (stacked, numbers))
        return mark_bad(self.norm(x)), cache

    def _embed(self, tokens: Array, positions: Array) -> tuple[Array, blocks.Rotation | None]:
        config = self.config
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(self.compute_dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.positions == "learned":
            placed = jnp.take(self.positions[...], positions, axis=0, mode="clip")
            return x + jnp.broadcast_to(placed.astype(x.dtype), x.shape), None
        frequencies = blocks.rope_frequencies(config)
        return x, blocks.rotation(frequencies, positions, blocks.wide(self.compute_dtype))

    def _blocks(self, x: Array, by: blocks.Rotation | None, attend: Array | None) -> Array:
        def apply(graph, params, x):
            return nnx.merge(graph, params)(x, by, attend)[0]

        if self.remat:
            apply = jax.checkpoint(apply, static_argnums=0)
        if isinstance(self.layers, nnx.List):
            for block in self.layers:
                x = apply(*nnx.split(block), x)
            return x
        graph, stacked = nnx.split(self.layers)
        return jax.lax.scan(lambda x, params: (apply(graph, params, x), None), x, stacked)[0]


def functional(model: Decoder) -> tuple[Policy, PyTree]:
    """A decoder as a `Policy` and its parameters.

    Args:
        model: The module; later changes of it have no effect.

    Returns:
        ``(policy, params)``, ``params`` a pytree of arrays (see the module's docstring).
    """
    graph, params = nnx.split(model, nnx.Param)
    name = "embedding" if model.config.tied else "unembedding"

    def hidden(params, tokens, positions=None, attend=None):
        return nnx.merge(graph, params)(tokens, positions, attend)

    def cached(params, *arguments):
        return nnx.merge(graph, params).cached(*arguments)

    return Policy(hidden, lambda params: params[name][...], cached, model.bounds), params


def abstract(config: DecoderConfig, **options: Any) -> tuple[Policy, PyTree]:
    """`functional` without numbers: each leaf a ``jax.ShapeDtypeStruct``.

    Args:
        config: Size and family.
        **options: Of `Decoder`.

    Returns:
        ``(policy, params)``; the policy works on real parameters of these shapes.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    return functional(model)


def stack_layers(params: PyTree) -> PyTree:
    """Parameters of an unrolled decoder as those of a scanned one."""
    flat, layers = _layers_apart(params)
    numbers = sorted({path[1] for path in layers})
    for path in [path for path in layers if path[1] == numbers[0]]:
        leaves = [layers[("layers", number, *path[2:])] for number in numbers]
        flat["layers", *path[2:]] = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
    return nnx.from_flat_state(flat)


def unstack_layers(params: PyTree) -> PyTree:
    """Parameters of a scanned decoder as those of an unrolled one."""
    flat, layers = _layers_apart(params)
    for path, stacked in layers.items():
        for number in range(jax.tree.leaves(stacked)[0].shape[0]):
            leaf = jax.tree.map(lambda x, number=number: x[number], stacked)
            flat["layers", number, *path[1:]] = leaf
    return nnx.from_flat_state(flat)


def _layers_apart(params: PyTree) -> tuple[dict, dict]:
    """Leaves by path: all but the layers' own, and those."""
    flat = dict(nnx.to_flat_state(params))
    layers = {path: leaf for path, leaf in flat.items() if path[0] == "layers"}
    return {path: leaf for path, leaf in flat.items() if path not in layers}, layers
