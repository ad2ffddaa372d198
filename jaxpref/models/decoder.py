"""One causal decoder for every family the papers use, as pure functions of its parameters.

The families differ in a `DecoderConfig` alone: Llama, Mistral, SmolLM2, GPT-2, GPT-NeoX (Pythia),
OLMo-1 and 2, Gemma 1 to 3, Qwen2 and Qwen3. Logits are never made here: a `Policy` gives the hidden
states after the final norm and, apart from them, the unembedding.

Parameters are addressed by dotted paths, kernels as ``[in, out]``::

    embedding                                        [vocab width]
    positions                                        [max_positions width]   learned only
    layers.0.attention_norm.{scale,bias}             [width]
    layers.0.attention.{query,key,value,output}.{kernel,bias}
    layers.0.attention.{query_norm,key_norm}.scale   [head_width], or of all heads
    layers.0.attention_output_norm.{scale,bias}      [width]                 norms after
    layers.0.mlp_norm.{scale,bias}                   [width]
    layers.0.mlp_output_norm.{scale,bias}            [width]                 norms after
    layers.0.mlp.{gate,up,down}.{kernel,bias}
    norm.{scale,bias}                                [width]
    unembedding                                      [vocab width]           untied only

With ``scan=True`` the number is left out, ``layers.attention...``, and axis 0 counts layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from jaxpref.models import attention as attentions
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
        norms: Where attention and MLP have norms: ``before``, of what they read; ``after``, of what
            they add to the residual stream (OLMo-2); ``both`` (Gemma 2 and 3).
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
        window: Positions that a token's attention sees, its own included; None sees all.
        sliding: Of each layer, whether it slides the window; None: all do.
        local_rope_base: Base in the layers that slide the window, unscaled (Gemma 3); None: as in
            the others.
        rotary: Of each layer, whether it turns heads by positions (SmolLM3); None: all do.
        parallel_residual: Attention and MLP read the same stream (GPT-NeoX).
        qkv_bias: Query, key and value have biases (GPT-2, GPT-NeoX, Qwen2).
        output_bias: So has attention's output.
        mlp_bias: So have the MLP's products.
        query_key_norm: RMS norm of each query and key head (Qwen3, Gemma 3), or with ``whole`` one
            over all heads of the queries and one over those of the keys (OLMo-2).
        clip_qkv: Bound on queries, keys and values (OLMo-1 7B), or None.
        score_width: Attention's scores are divided by its root; None: `head_width`.
        score_cap: Bound ``c`` of attention's scores ``s``, as ``c tanh(s / c)`` (Gemma 2), or None.
        logit_cap: Such a bound of the logits (Gemma 2), or None.
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
    norms: Literal["before", "after", "both"] = "before"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    positions: Literal["rope", "learned"] = "rope"
    max_positions: int = 2048
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] | None = None
    window: int | None = None
    sliding: tuple[bool, ...] | None = None
    local_rope_base: float | None = None
    rotary: tuple[bool, ...] | None = None
    parallel_residual: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool | Literal["whole"] = False
    clip_qkv: float | None = None
    score_width: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    tied: bool = True

    def __post_init__(self):
        sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
        for name in (*sizes, "max_positions", "window"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        for name in (
            "rope_base",
            "local_rope_base",
            "score_width",
            "score_cap",
            "logit_cap",
            "clip_qkv",
        ):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        choices = {
            "norm": ("rms", "layer", "layer_plain"),
            "norms": ("before", "after", "both"),
            "activation": tuple(blocks.ACTIVATIONS),
            "positions": ("rope", "learned"),
            "query_key_norm": (False, True, "whole"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {known}")
        for name in ("sliding", "rotary"):
            if (value := getattr(self, name)) is not None and len(value) != self.layers:
                raise ValueError(f"{name}: got {len(value)}, expected {self.layers}, one a layer")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {self.kv_heads}, expected a divisor of heads, {self.heads}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"head_width: got {self.head_width}, expected an even number for rope")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction: got {self.rope_fraction}, expected in (0, 1]")
        rotated = int(self.head_width * self.rope_fraction / 2)
        if self.rope_factors is not None and len(self.rope_factors) != rotated:
            raise ValueError(
                f"rope_factors: got {len(self.rope_factors)}, expected {rotated}, one for each "
                "rotated pair of axes"
            )


class Kind(NamedTuple):
    """How one layer differs from others of its decoder."""

    slides: bool  # the window
    turns: bool  # heads, by positions


def kinds(config: DecoderConfig) -> list[Kind]:
    """The kind of each layer.

    >>> config = DecoderConfig(*(9, 4, 2, 1, 1, 4, 8), window=2, sliding=(True, False))
    >>> [kind.slides for kind in kinds(config)]
    [True, False]
    """
    every = (True,) * config.layers
    sliding = (False,) * config.layers if config.window is None else config.sliding or every
    turning = (config.positions == "rope",) * config.layers
    turning = turning if config.rotary is None else config.rotary
    return [Kind(*both) for both in zip(sliding, turning, strict=True)]


class Cache(NamedTuple):
    """What new tokens see of those before them; columns are the second axis from the last.

    Attributes:
        layers: Keys and values of each, ``[batch kv seen head]``; with ``scan=True`` stacked,
            ``[layers batch kv seen head]``.
        positions: Of the tokens in the columns, where a layer slides a window; else None.
    """

    layers: PyTree
    positions: Int[Array, "batch seen 1"] | None


def _no_cache(*_: Any) -> Any:
    raise ValueError("policy: got one without `cached`, expected a decoder's")


class Capped(NamedTuple):
    """How a model whose logits are ``cap * tanh(hidden @ table.T / cap)`` is read."""

    table: Callable[[PyTree], Float[Array, "vocab width"]]
    cap: float


class Policy(NamedTuple):
    """A language model as pure functions of its parameters; ``logits = hidden @ unembedding.T``.

    But of a model that caps its logits (Gemma 2): its `unembedding` raises ValueError, so that
    nothing reads it as a plain one, and what knows the cap asks `head`.

    Attributes:
        hidden: ``(params, tokens, positions=None, attend=None)`` to the hidden states after the
            final norm, ``[batch time width]``; arguments as `Decoder.__call__`.
        unembedding: ``params`` to ``[vocab width]``; for what reads the logits as a product.
        cached: `hidden` of new tokens after others, for `jaxpref.models.sampling`:
            ``(params, tokens, positions, attend, cache=None, at=0)``, as `Decoder.cached`. Raises
            ValueError where a policy has no such path.
        bounds: Which ids and positions `hidden` reads; others make it NaN.
            `jaxpref.models.bounds.check` names the text before.
        capped: Of a model that caps its logits; else None.
    """

    hidden: Callable[..., Float[Array, "batch time width"]]
    unembedding: Callable[..., Float[Array, "vocab width"]]
    cached: Callable[..., tuple[Float[Array, "batch time width"], PyTree]] = _no_cache
    bounds: Bounds = Bounds()
    capped: Capped | None = None

    def head(self, params: PyTree) -> tuple[Float[Array, "vocab width"], float | None]:
        """The table of the logits and their cap, for what honours one: see `attention.capped`."""
        if self.capped is None:
            return jnp.asarray(self.unembedding(params)), None
        return jnp.asarray(self.capped.table(params)), self.capped.cap

    def with_table(self, table: Callable[[PyTree], Float[Array, "vocab width"]]) -> "Policy":
        """The same policy with its table found in another way."""
        if self.capped is None:
            return self._replace(unembedding=table)
        return self._replace(capped=self.capped._replace(table=table))


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
        attention: How (`jaxpref.models.attention.mix`). ``xla`` holds all scores of a layer.
            ``cudnn``, on GPUs, holds few and takes no float32; ``splash`` is a kernel for TPUs,
            slow elsewhere. Forward mode, Grams and decoding take ``xla`` in any case.
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
        attention: str = "xla",
        scan: bool = False,
        remat: bool = False,
    ):
        if precision not in (known := get_args(blocks.Precision)):
            raise ValueError(f"precision: got {precision!r}, expected one of {known}")
        if attention not in (known := get_args(attentions.Kind)):
            raise ValueError(f"attention: got {attention!r}, expected one of {known}")
        if attention == "cudnn" and jnp.dtype(compute_dtype).itemsize > 2:
            raise ValueError(f"attention: cudnn takes no {jnp.dtype(compute_dtype).name}, expected "
                             "compute_dtype bfloat16 or float16, or xla")  # fmt: skip
        if attention == "cudnn" and config.score_cap is not None:
            raise ValueError(
                "attention: cudnn bounds no scores, expected xla or splash for score_cap"
            )
        types = {"dtype": compute_dtype, "param_dtype": param_dtype}

        def table(rows: int) -> nnx.Param:
            shape = (rows, config.width)
            return nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype))

        def block(rngs: nnx.Rngs) -> blocks.Block:
            return blocks.Block(config, rngs=rngs, precision=precision, kind=attention, **types)

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
        learned = config.positions == "learned"
        self.bounds = Bounds(config.vocab, config.max_positions if learned else None)

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
                What sees a position outside a learned table is NaN. A sliding window counts them.
            attend: Which tokens (last axis) each token sees, causality included; None sees itself
                and all before it, which is right for padding on the right. A token that sees
                nothing gets finite numbers of no meaning.
        """
        attend = None if attend is None else jnp.asarray(attend)
        fits = positions is None and tokens.shape[1] <= (self.config.window or math.inf)
        if positions is None:
            positions = np.arange(tokens.shape[1])[None]
        tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
        x = self._embed(tokens, positions)
        sights = self._sights(positions, None if fits else positions, attend)
        return mark(self.norm(self._blocks(x, sights)), tokens, positions, attend, self.bounds)

    def cached(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        attend: Bool[Array, "batch time seen"],
        cache: Cache | None = None,
        at: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "batch time width"], Cache]:
        """Hidden states of tokens that also see cached ones: no token is encoded twice.

        Args:
            tokens: Token ids, the first of them in column `at` of the cache.
            positions: Of each token from 0.
            attend: Which columns of the cache each token sees, its own included. A sliding window
                hides more of them.
            cache: Of the tokens before; None for the tokens' own alone.
            at: Column of the first token.

        Returns:
            ``(hidden, cache)``, the tokens' keys and values written into the cache. Hidden states
            are NaN as of `__call__`, but cached tokens are not looked at again.
        """
        placed = None
        if any(kind.slides for kind in kinds(self.config)):
            placed = positions[..., None]
            if cache is not None and (before := cache.positions) is not None:
                placed = placed.astype(before.dtype)
                placed = jax.lax.dynamic_update_slice_in_dim(before, placed, at, axis=1)
        x = self._embed(tokens, positions)
        sights = self._sights(positions, None if placed is None else placed[..., 0], attend)
        past = None if cache is None else cache.layers
        if isinstance(self.layers, nnx.List):
            kept = []
            pasts = past or [None] * len(self.layers)
            for block, kind, one in zip(self.layers, kinds(self.config), pasts, strict=True):
                x, now = block(x, *sights[kind], one, at)
                kept.append(now)
        else:
            graph, stacked = nnx.split(self.layers)

            def apply(carry, layer):  # the cache is carried: a column of it is written, none copied
                (x, past), (params, kind, number) = carry, layer
                sight = _choice(sights, kind)
                x, now = nnx.merge(graph, params)(x, *sight, past, at, number)
                return (x, None if past is None else now), now if past is None else None

            numbers = None if past is None else jnp.arange(self.config.layers, dtype=jnp.int32)
            (x, past), kept = jax.lax.scan(
                apply, (x, past), (stacked, self._numbers(sights), numbers)
            )
            kept = kept if past is None else past
        inside = attend if cache is None else None
        hidden = mark(self.norm(x), tokens, positions, inside, self.bounds)
        return hidden, Cache(kept, placed)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        config = self.config
        x = jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(self.compute_dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.positions == "learned":
            placed = jnp.take(self.positions[...], positions, axis=0, mode="clip")
            x = x + jnp.broadcast_to(placed.astype(x.dtype), x.shape)
        return x

    def _sights(
        self, positions: Array, seen_positions: Array | None, attend: Array | None
    ) -> dict[Kind, blocks.Sight]:
        """What each kind of layer turns heads by and lets them see, in the order of the kinds.

        Without `seen_positions` no window hides anything.
        """
        config, found = self.config, {}
        for kind in sorted(set(kinds(config))):
            by, seen = None, attend
            if config.positions == "rope":
                frequencies = blocks.rope_frequencies(config, local=kind.slides)
                frequencies = frequencies if kind.turns else np.zeros_like(frequencies)
                by = blocks.rotation(frequencies, positions, blocks.wide(self.compute_dtype))
            if kind.slides and config.window is not None and seen_positions is not None:
                seen = blocks.windowed(config.window, positions, seen_positions, attend)
            found[kind] = by, seen
        return found

    def _numbers(self, sights: dict[Kind, blocks.Sight]) -> Int[np.ndarray, " layers"]:
        """The place of each layer's kind among all."""
        return np.array([list(sights).index(kind) for kind in kinds(self.config)], np.int32)

    def _blocks(self, x: Array, sights: dict[Kind, blocks.Sight]) -> Array:
        def apply(graph, params, x, by, attend):
            return nnx.merge(graph, params)(x, by, attend)[0]

        if self.remat:
            apply = jax.checkpoint(apply, static_argnums=0)
        if isinstance(self.layers, nnx.List):
            for block, kind in zip(self.layers, kinds(self.config), strict=True):
                x = apply(*nnx.split(block), x, *sights[kind])
            return x
        graph, stacked = nnx.split(self.layers)

        def step(x, layer):
            params, number = layer
            return apply(graph, params, x, *_choice(sights, number)), None

        return jax.lax.scan(step, x, (stacked, self._numbers(sights)))[0]


def _choice(sights: dict[Kind, blocks.Sight], number: Int[Array, ""]) -> blocks.Sight:
    """That of this number, inside a program."""
    each = list(sights.values())
    if len(each) == 1:
        return each[0]
    shapes = {attend.shape for _, attend in each if attend is not None}
    for shape in shapes:  # then all say it: they see what is before them
        whole = jnp.broadcast_to(attentions.causal(shape[1]), shape)
        each = [(by, whole if attend is None else attend) for by, attend in each]
    return jax.tree.map(lambda *found: jax.lax.select_n(number, *found), *each)


def functional(model: Decoder) -> tuple[Policy, PyTree]:
    """A decoder as a `Policy` and its parameters.

    Args:
        model: The module; later changes of it have no effect.

    Returns:
        ``(policy, params)``, ``params`` a pytree of arrays (see the module's docstring).
    """
    graph, params = nnx.split(model, nnx.Param)
    name = "embedding" if model.config.tied else "unembedding"
    cap = model.config.logit_cap

    def hidden(params, tokens, positions=None, attend=None):
        return nnx.merge(graph, params)(tokens, positions, attend)

    def cached(params, *arguments):
        return nnx.merge(graph, params).cached(*arguments)

    def table(params):
        return params[name][...]

    def refuse(params):
        raise ValueError(
            f"unembedding: this model caps its logits at {cap}, expected one whose logits are "
            "hidden @ unembedding.T"
        )

    if cap is None:
        return Policy(hidden, table, cached, model.bounds), params
    return Policy(hidden, refuse, cached, model.bounds, Capped(table, cap)), params


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
