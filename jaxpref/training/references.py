r"""References that are not the first policy: moved in training, or averaged from several models.

Parameters are averaged, never log-probabilities. A reference that moves makes log-probabilities
that were computed before it worthless: none may come from a cache, and the score function computes
them with the policy's. In a loop of one's own, a reference is one variable more::

    def score(params, batch):
        return Scores(logp_of(params.policy, batch), logp_of(params.reference, batch))

    def loss(scores, batch):  # the losses of jaxpref stop the gradient of the reference
        return losses.dpo(scores.logp, scores.reference, beta=0.1)

    optimizer = policy_only(optax.adamw(1e-6))
    step = make_step(score, loss, optimizer)
    step = following(step, functools.partial(tr_dpo_soft, alpha=0.6, every=512))
    state = init_state(tracked(params), optimizer, key=key)

which `jaxpref.training.loop.fit` takes like any other: the reference is in `State.params`, so that
checkpoints hold it and a run that was killed goes on with the right one. A reference that does not
move in training (`soup`, `average_by_block`, the iterate of SPIN) needs nothing of this: compute
its log-probabilities once, as for any reference. SPIN's is the policy at the end of the iteration
before, ``copied(state.params)``, from which the rejected responses are sampled, too; its loss is
`losses.dpo`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from jaxpref.training.step import Metrics, State, Step

Steps = int | Int[Array, ""]


class Tracked(NamedTuple):
    """Parameters of the policy and of the reference that follows it; both are in checkpoints."""

    policy: PyTree
    reference: PyTree


def tracked(params: PyTree) -> Tracked:
    """A policy and itself for a reference, in arrays of their own: a step uses up what it gets."""
    return Tracked(params, copied(params))


def copied(params: PyTree) -> PyTree:
    """The same numbers in new arrays: the reference of SPIN's next iteration.

    >>> params = {"w": jnp.ones(2)}
    >>> copied(params)["w"] is params["w"]
    False
    """
    return jax.tree.map(jnp.copy, params)


def tr_dpo_soft(
    reference: PyTree, policy: PyTree, step: Steps, *, alpha: float | int = 0.6, every: int = 512
) -> PyTree:
    r"""The reference of TR-DPO, drawn towards the policy now and then.

    .. math:: \theta_{ref} \leftarrow \alpha\,\theta + (1 - \alpha)\,\theta_{ref}
        \quad \text{after every } \tau \text{ updates}

    Averages are of at least float32 and come back in the reference's dtype.

    Args:
        reference: Its parameters.
        policy: The policy's.
        step: Number of updates done, `State.step` after an update; may be traced.
        alpha: ``α``, above 0, at most 1 (`tr_dpo_hard`).
        every: ``τ``, a whole number above 0. With 1 and ``α = 1`` reference and policy never
            differ: all margins are 0, the loss stays where it began and its pull never ends.

    Returns:
        The reference for the next update.

    Raises:
        ValueError: `alpha` or `every` out of range.

    >>> reference, policy = jnp.array([0.0]), jnp.array([1.0])
    >>> [tr_dpo_soft(reference, policy, n, alpha=0.25, every=3).tolist() for n in (2, 3)]
    [[0.0], [0.25]]

    References:
        Gorbatovski et al. (2024), the soft update, https://arxiv.org/abs/2404.09656
    """
    _require_share("alpha", alpha, above=0.0)
    due = _due(step, every)
    return jax.lax.cond(due, lambda r, p: _mix(p, r, alpha), lambda r, _: r, reference, policy)


def tr_dpo_hard(reference: PyTree, policy: PyTree, step: Steps, *, every: int = 512) -> PyTree:
    r"""The reference of TR-DPO, replaced by the policy now and then.

    .. math:: \theta_{ref} \leftarrow \theta \quad \text{after every } \tau \text{ updates}

    Args:
        reference: Its parameters.
        policy: The policy's.
        step: Number of updates done, `State.step` after an update; may be traced.
        every: ``τ``, a whole number above 0. With 1 reference and policy never differ (see
            `tr_dpo_soft`).

    Returns:
        The reference for the next update.

    Raises:
        ValueError: `every` is not a whole number above 0.

    References:
        Gorbatovski et al. (2024), the hard update, https://arxiv.org/abs/2404.09656
    """
    due = _due(step, every)

    def replace(reference: PyTree, policy: PyTree) -> PyTree:
        return jax.tree.map(lambda r, p: p.astype(r.dtype), reference, policy)

    return jax.lax.cond(due, replace, lambda r, _: r, reference, policy)


def soup(models: Sequence[PyTree], weights: Sequence[float | int]) -> PyTree:
    r"""A weighted average of models: as a reference, that of SALSA, of two fine-tuned ones.

    .. math:: \theta_{ref} = \sum_i w_i \theta_i

    Of policies that are log-linear in their parameters it is the geometric mean, normalised: the
    divergence from it is the mean divergence from each, less a constant.

    Args:
        models: Parameters of the same shapes; of models fine-tuned from one, or an average means
            nothing.
        weights: At least 0, with a sum of 1: a half each in SALSA (our transcription).

    Returns:
        Parameters, in the dtypes of the first; averaged in at least float32.

    Raises:
        ValueError: not one weight a model, or weights below 0 or of another sum.

    >>> soup([jnp.array([0.0, 2.0]), jnp.array([1.0, 4.0])], [0.5, 0.5]).tolist()
    [0.5, 3.0]

    References:
        Chegini et al. (2024), the soup as a reference, https://arxiv.org/abs/2411.01798
    """
    fit = len(models) == len(weights) > 0 and min(weights) >= 0
    if not fit or abs(sum(weights) - 1) > 1e-6:
        expected = "one a model, at least 0, with a sum of 1"
        raise ValueError(
            f"weights: got {list(weights)} of {len(models)} models, expected {expected}"
        )

    def average(*leaves: Array) -> Array:
        total = sum(w * _wide(leaf) for w, leaf in zip(weights, leaves, strict=True))
        return jnp.asarray(total).astype(leaves[0].dtype)

    return jax.tree.map(average, *models)


def block_shares(
    logits: Float[Array, " blocks"], *, mean: float | int = 0.2, epsilon: float | int = 0.2
) -> Float[Array, " blocks"]:
    r"""Shares of adaptive model averaging: one a block of layers, with a mean that is fixed.

    .. math:: a_k = \bar a K \frac{\sigma(s_k) + \epsilon}{\sum_j (\sigma(s_j) + \epsilon)}

    Args:
        logits: ``s``, trained (the authors start at equal ones).
        mean: ``ā``, from 0 to 1.
        epsilon: Above 0: keeps a block from having no share at all.

    Returns:
        ``a``, for `average_by_block`.

    Raises:
        ValueError: `mean` or `epsilon` out of range.

    >>> block_shares(jnp.zeros(3)).round(3).tolist()
    [0.2, 0.2, 0.2]

    References:
        Lin et al. (2023), adaptive model averaging, https://arxiv.org/abs/2309.06256
    """
    _require_share("mean", mean, above=-1.0)
    if not 0 < epsilon < np.inf:
        raise ValueError(f"epsilon: got {epsilon}, expected a finite number above 0")
    size = jax.nn.sigmoid(logits) + epsilon
    return mean * len(logits) * size / size.sum()


def average_by_block(
    first: PyTree, second: PyTree, shares: Float[Array, " blocks"], blocks: PyTree
) -> PyTree:
    r"""An average of two models with a share for each block of layers.

    .. math:: \theta = a_{b} \theta_0 + (1 - a_{b}) \theta_1, \quad b \text{ the leaf's block}

    The authors average the model before alignment and the one after in this way, to keep abilities
    that alignment loses. As a reference it is our composition.

    Args:
        first: ``θ0``, before alignment.
        second: ``θ1``, after it, of the same shapes.
        shares: ``a``, of `block_shares`; gets a gradient.
        blocks: Of the same structure: for each leaf the number of its block, or, for layers stacked
            in a first axis, an array of them.

    Returns:
        Parameters, in the dtypes of `first`; averaged in at least float32.

    Raises:
        ValueError: an array of `blocks` is not as long as the leaf's first axis.

    >>> first, second = {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}
    >>> shares = jnp.array([0.25, 0.5])
    >>> average_by_block(first, second, shares, {"w": np.array([0, 1])})["w"].tolist()
    [[0.75], [0.5]]

    References:
        Lin et al. (2023), adaptive model averaging, https://arxiv.org/abs/2309.06256
    """

    def mix(one: Array, other: Array, block: Any) -> Array:
        block = np.asarray(block)
        if block.ndim and block.shape != one.shape[:1]:
            got = f"blocks: got shape {block.shape} for a leaf of shape {one.shape}"
            raise ValueError(f"{got}, expected {one.shape[:1]} or one number")
        wide = _wide(one)
        share = shares[block].astype(wide.dtype)
        share = share.reshape(*block.shape, *(1,) * (one.ndim - block.ndim))
        if block.ndim == 0:
            share = share.reshape(())
        return (share * wide + (1 - share) * _wide(other).astype(wide.dtype)).astype(one.dtype)

    return jax.tree.map(mix, first, second, blocks)


def policy_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of `Tracked` parameters that moves the policy and nothing else.

    Args:
        optimizer: Of the policy's parameters; it has slots for these only, and its weight decay
            leaves the reference alone.

    Returns:
        One for `init_state` and `make_step`.
    """

    def init(params: Tracked) -> Any:
        return optimizer.init(params.policy)

    def update(gradient: Tracked, state: Any, params: Tracked | None = None) -> tuple[Tracked, Any]:
        policy = None if params is None else params.policy
        change, state = optimizer.update(gradient.policy, state, policy)
        return Tracked(change, jax.tree.map(jnp.zeros_like, gradient.reference)), state

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType] -- Tracked is a pytree


def following(step: Step, update: Callable[[PyTree, PyTree, Array], PyTree]) -> Step:
    """A step after which the reference follows the policy.

    Args:
        step: Of `make_step`, on a state whose ``params`` are `Tracked`.
        update: ``(reference, policy, number of updates done) -> reference``, such as `tr_dpo_soft`
            with its settings bound. The optimizer's state stays as it is.

    Returns:
        A step with the same metrics and scores.
    """
    move = functools.partial(jax.jit, donate_argnums=0)(update)

    @functools.wraps(step)
    def followed(state: State, batch: Any) -> tuple[State, Metrics, Any]:
        state, metrics, scores = step(state, batch)
        policy, reference = state.params
        params = Tracked(policy, move(reference, policy, state.step))
        return state._replace(params=params), metrics, scores

    return followed


def _due(step: Steps, every: int) -> Array:
    """Whether this many updates are a whole number of periods, above none."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every: got {every!r}, expected a whole number above 0")
    step = jnp.asarray(step)
    return (step > 0) & (step % every == 0)


def _require_share(name: str, value: float | int, *, above: float) -> None:
    if not isinstance(value, Tracer) and not (above < value <= 1 and value >= 0):
        span = "above 0, at most 1" if above >= 0 else "from 0 to 1"
        raise ValueError(f"{name}: got {value}, expected a number {span}")


def _mix(one: PyTree, other: PyTree, share: float | int) -> PyTree:
    """``share * one + (1 - share) * other``, in the dtypes of the other."""

    def mix(a: Array, b: Array) -> Array:
        wide = _wide(b)
        return (share * _wide(a).astype(wide.dtype) + (1 - share) * wide).astype(b.dtype)

    return jax.tree.map(mix, one, other)


def _wide(x: Array) -> Array:
    """At least float32."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
