"""Prints docs/losses.md: the catalogue's tables, made from the functions themselves."""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses

HELPERS = (  # public, but no losses
    "bco_prompt_weight",
    "bco_running_mean",
    "bhattacharyya_divergence",
    "f_divergence",
    "feature_distance",
    "hellinger_divergence",
    "js_divergence",
    "kl_divergence",
    "kldo_log_average",
    "kto_baseline",
    "ld_logp",
    "log_kernel_mixture",
    "log_mahalanobis_kernel",
    "log_polynomial_kernel",
    "log_rbf_kernel",
    "log_spectral_kernel",
    "margin",
    "mean_token_probability",
    "pooled_codes",
    "renyi_divergence",
    "sampo_positions",
    "sparsepo_activation_mask",
    "sparsepo_learned_mask",
    "tis_weights",
    "wasserstein_divergence",
    "wpo_weight",
)
OTHER_NAMES = {  # what has a name in the field, but is a loss of ours at these arguments
    "AFT, ranking and alignment loss": "`aft`, graded by more than two grades or by two",
    "Comp-sum, logistic": "`dpo`",
    "DPKD": "`ln_dpo` with the teacher's log-probabilities as `reference`",
    "f-DPO, reverse Kullback-Leibler": "`dpo`",
    "InfoNCA of a pair": "`dpo`",
    "LD-DPO": "`dpo` of `ld_logp` of the policy's tokens and of the reference's",
    "RSO, hinge-norm; SLiC in TRL": "`hinge`",
    "sigmoid_norm in TRL": "`ln_dpo`",
    "SPIN": "`dpo`: chosen is human, rejected is drawn from the last iterate, the `reference`",
    "TR-DPO": "`dpo`, its `reference` computed anew from an updated model",
    "TraceAlign CBD": "`dpo`: the penalty of the published code has no gradient",
    "WPO": "`wpo_weight` times `dpo`",
}
AGREES = "agrees"
COMPARED = {  # the parity tests hold values and pulls against these, and assert what is said here
    "TRL 0.28.0": {
        "alphapo": AGREES,
        "aot": AGREES,
        "aot_unpaired": AGREES,
        "apo_down": AGREES,
        "apo_zero": AGREES,
        "cdpo": AGREES,
        "cpo": "agrees without likelihood term",
        "discopop": "agrees; not a number where the pair is far wrong",
        "dpo": AGREES,
        "exo_pair": "agrees; 0.001 for an `epsilon` of 0",
        "f_dpo_alpha": AGREES,
        "f_dpo_forward_kl": "agrees, as the alpha divergence of 1",
        "f_dpo_jensen_shannon": "agrees; is `dpo` if named by a string",
        "hinge": AGREES,
        "ipo": "agrees, of sums",
        "ipo_length_normalised": AGREES,
        "nca_pair": AGREES,
        "orpo": "agrees, in float32, value only",
        "robust_dpo": AGREES,
        "simpo": "agrees without likelihood term",
        "sppo": AGREES,
    },
    "TRL 1.16.0": {
        "alphapo": AGREES,
        "aot": AGREES,
        "aot_unpaired": AGREES,
        "apo_down": AGREES,
        "apo_zero": AGREES,
        "bco": "agrees at a `delta` of 0; has no other",
        "cdpo": "ignores the smoothing: is `dpo`",
        "cpo": "agrees without likelihood term",
        "discopop": "agrees; not a number where the pair is far wrong",
        "dpo": AGREES,
        "exo_pair": "agrees; its trainer refuses an `epsilon` of 0",
        "f_dpo_alpha": "agrees at a coefficient of `1 - alpha`; beyond an exponent of 80 no pull",
        "f_dpo_forward_kl": AGREES,
        "f_dpo_jensen_shannon": AGREES,
        "hinge": AGREES,
        "ipo": "is `ipo_length_normalised`",
        "ipo_length_normalised": AGREES,
        "kto": "agrees, with `kto_baseline`",
        "ld_logp": AGREES,
        "ln_dpo": "agrees, as ``sigmoid_norm``",
        "nca_pair": AGREES,
        "orpo": "agrees, in float32, value only",
        "robust_dpo": AGREES,
        "sft_token_mean": "takes the mean over the batch's tokens",
        "simpo": "agrees without likelihood term",
        "sppo": AGREES,
        "wpo_weight": AGREES,
    },
    "tunix 0.1.7": {
        "cdpo": AGREES,
        "dpo": AGREES,
        "orpo": "agrees at one token; has odds of sums, infinite where certain",
    },
}

PAGE = r"""# Losses

Every loss keeps its batch axes and averages nothing: pairs are `[*pairs 2] -> [*pairs]`, chosen
first; single examples `[*examples] -> [*examples]`. Token arrays are `[*pairs 2 response]`, lists
`[*prompts responses]`. Arguments are data, keywords hyperparameters.

| symbol | meaning |
|---|---|
| $\log\pi_w$, $\log\pi_l$ | `logp` of the chosen and the rejected response, a sum, nats |
| $u = \log\pi - \log\pi_{ref}$ | log-ratio, `logp - reference`; the reference gets no gradient |
| $n$, $a = \log\pi / n$ | `lengths`, scored tokens, and the mean log-probability of a token |
| $P = e^a$ | the mean probability of a token |
| $\sigma$ | logistic function |
| $d_w$, $d_l$ | the pull, `jax.grad(loss)(logp)`, is $[-d_w, d_l]$ |

Gradient descent raises the chosen response while $d_w > 0$, the rest of the model permitting, and
lowers the rejected one while $d_l > 0$.

## Formulas

| loss | formula | inputs | source |
|---|---|---|---|
%(formulas)s

Numbers are float32 at least, and finite at margins of ±10,000 nats and at probability one. The mean
of an empty response is 0. Plain hyperparameters are checked; traced ones cannot be. Where a paper
and its code differ, the docstring says which one this is: `help(losses.orpo)`.

## Pulls

Hyperparameters are the defaults. *At reference*: the policy equals its reference, `logp` =
%(logp)s nats over %(lengths)s tokens. *Range*: over all log-ratios from -10,000 to 10,000 nats,
without reference over all log-probabilities from -10,000 to -0.01; ∞ is a pull that still grows at
the edge. *Rejected fell*, *chosen fell*: the limits of $d_w$, $d_l$ as the margin grows to either
side because that response fell, the other staying. *Equal*: whether $d_w = d_l$ everywhere, or, by
token, $n_w d_w = n_l d_l$. For single examples the two numbers belong to two examples, for `kto` a
desirable and an undesirable one at a baseline of 0. Rewards and win probabilities are 1 and 0. Of
losses of tokens the pull is that on a response's sum, of which a token has a fixed part, the later
the larger.

| loss | value | at reference | range of $d_w$ | of $d_l$ | rejected fell | chosen fell | equal |
|---|---|---|---|---|---|---|---|
%(pulls)s

The same as a picture, made by `python -m experiments.loss_pulls`: $d_w$ and $d_l$ as one response
moves and the other stays.

![Pull of every loss on the chosen and on the rejected response](figures/losses.png)

## Differences

Where the same name means something else, in a paper, in its authors' code or in other libraries.

%(differences)s

Values and pulls on random pairs against TRL 0.28.0, the last version whose losses are functions,
TRL 1.16.0 and tunix 0.1.7. `make parity-losses` runs the tests that hold what each row says.

%(compared)s

## The logic of preferences

%(logic)s

## Other names

| name | here |
|---|---|
%(names)s

## Parts that compose

A loss is an array of the pairs, so a supervised term is added, a weight multiplied, a token mean
divided, and smoothed labels are a mean with the swapped pair:

```python
import jax.numpy as jnp

from jaxpref import losses

logp, reference = jnp.array([[-12.3, -15.1]]), jnp.array([[-13.0, -14.2]])
lengths, weight = jnp.array([[9.0, 12.0]]), jnp.array([0.5])


def apo(logp, reference):
    return losses.apo_zero(logp, reference, beta=0.1)


plain = apo(logp, reference)
with_likelihood = plain + 0.2 * losses.sft(logp[..., 0])
weighted = weight * plain
by_token = apo(logp / lengths, reference / lengths)
smoothed = 0.9 * plain + 0.1 * apo(logp[..., ::-1], reference[..., ::-1])
with_margin = apo(logp - jnp.array([[2.0, 0.0]]), reference)  # chosen is to lead by 2 nats more
```

Not losses, but made for them:

| function | formula | inputs | source |
|---|---|---|---|
%(helpers)s

[A training loop of your own](own_loop.md) shows three losses in plain JAX and optax.

## Another loss

1. Write the function in the file of its kind, formula and source in its docstring as in the others.
2. Name it in `jaxpref/losses/__init__.py`.
3. Add its rows to the table in `tests/loss_points.py`: value and both pulls at two points, by hand.
4. `make docs` prints this page anew; an input that no loss had before gets a value in
   `jaxpref/losses/__main__.py`.
5. `make test` says which of these was forgotten.
"""

LENGTHS = (8, 12)
LOGP = (-12.0, -15.0)
PER_RESPONSE = {  # what losses read besides `logp`, `reference`, `lengths`; chosen, rejected
    "desirable": [True, False],
    "distance": [0.0, 0.0],
    "divergence": [0.0, 0.0],
    "kl": [0.0, 0.0],
    "log_kernel": [0.0, 0.0],
    "rewards": [1.0, 0.0],
    "win_probability": [1.0, 0.0],
}
PER_TOKEN = {"kl_mask": 1.0, "mask": 1.0, "token_kl": 0.0, "token_reverse_kl": 0.0, "weights": 1.0}
PER_PAIR = {"log_average": 0.0, "prompt_divergence": 0.0}
SINGLE_NUMBER = {"delta": 0.0, "kl_baseline": 0.0}
NEEDED = {"token_logp": ("shares",), "probability": ("lengths",)}  # to make a loss's first input
BATCHWISE = ("aot", "aot_unpaired")  # each point is taken for a batch of one pair
EDGES = (1e-2, 1e4)  # of the grid, nats
GRID = 25  # points to either side
SINGLE = np.array([[0, 0], [0, 1e3], [0, 1e4], [1e3, 0], [1e4, 0]])  # nats below LOGP


class Pulls(NamedTuple):
    """The numbers of a loss; pulls are ``(d_w, d_l)``."""

    value: np.ndarray
    here: np.ndarray  # [2], at the reference
    low: np.ndarray  # [2], -inf where it still falls at the edge
    high: np.ndarray
    right: np.ndarray  # [2], the rejected response fell
    wrong: np.ndarray
    equal: str


def catalogue() -> dict[str, Callable]:
    """Every loss by its name."""
    found = {name: value for name, value in vars(losses).items() if inspect.isfunction(value)}
    return {name: loss for name, loss in sorted(found.items()) if name not in HELPERS}


def page() -> str:
    """The whole of docs/losses.md."""
    found = catalogue()
    logic = [[f"`{name}`", *_logic(loss)] for name, loss in found.items() if _part(loss, "Logic")]
    numbers = pulls(found)
    differs = {name: _one_line(_part(loss, "Differs")) for name, loss in found.items()}
    values = {
        "logp": list(LOGP),
        "lengths": list(LENGTHS),
        "formulas": _table([_words(loss) for loss in found.values()]),
        "pulls": _table([[f"`{name}`", *_numbers(numbers[name])] for name in found]),
        "differences": "\n".join(f"- `{name}`: {text}" for name, text in differs.items() if text),
        "compared": _compared(),
        "logic": LOGIC % _table(logic),
        "names": _table([list(row) for row in OTHER_NAMES.items()]),
        "helpers": _table([_words(getattr(losses, name)) for name in HELPERS]),
    }
    return PAGE % values


LOGIC = r"""Each response is valid or not. *Both* and *neither* say where that world counts: for the
preference, against it, both ways or not at all. The loss is that of the statement, given the
condition, with the exception counting both ways. $\oplus$ is exclusive or,
$\top$ always, $\bot$ never.

| loss | both valid | neither valid | statement | condition | exception |
|---|---|---|---|---|---|
%s"""


def pulls(found: dict[str, Callable]) -> dict[str, Pulls]:
    """The numbers of every loss with the default hyperparameters."""
    made = {}
    for held in (True, False):
        some = {k: loss for k, loss in found.items() if ("reference" in _inputs(loss)) == held}
        points, reference = _points(held)
        with jax.enable_x64(True):  # so that digits do not depend on how it is compiled
            measured = values_and_pulls(some, jnp.asarray(points), jnp.asarray(reference))
        size = np.abs(points[len(SINGLE) :])
        is_inner = ((size >= 10 * EDGES[0]) & (size <= EDGES[1] / 10)).all(axis=-1)
        for name, (value, d) in measured.items():
            here, right, right_far, wrong, wrong_far = d[: len(SINGLE)]
            grid = d[len(SINGLE) :]
            low, high = (_extreme(grid, grid[is_inner], side) for side in (-1, 1))
            right, wrong = _limit(right, right_far), _limit(wrong, wrong_far)
            made[name] = Pulls(np.asarray(value[0]), here, low, high, right, wrong, equality(grid))
    return made


def _points(held: bool) -> tuple[np.ndarray, np.ndarray]:  # noqa: FBT001
    """``[points 2]``: SINGLE, then a grid of log-ratios, or without reference of log-probabilities.

    One shape for all losses, so that all share what is compiled.
    """
    side = np.geomspace(*EDGES, GRID if held else 2 * GRID + 1)
    axis = np.concatenate([-side[::-1], [0], side]) if held else -side
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    points = np.concatenate([np.array(LOGP) - SINGLE, grid])
    reference = np.concatenate([np.tile(LOGP, (len(SINGLE), 1)), 0 * grid])
    return points, reference


def arguments(
    loss: Callable, reference: jax.Array, lengths: tuple[int, int] = LENGTHS
) -> dict[str, jax.Array]:
    """What `of_pairs` needs besides `logp`, at log-probabilities like ``reference [*points 2]``.

    Raises:
        ValueError: the loss reads something that has no value here.
    """
    shape, dtype = reference.shape, reference.dtype
    tokens = (*shape, max(lengths))

    def value(name: str) -> jax.Array:
        if name in PER_RESPONSE:
            return jnp.broadcast_to(jnp.array(PER_RESPONSE[name]), shape)
        if name in PER_TOKEN:
            return jnp.full(tokens, PER_TOKEN[name], dtype)
        if name in PER_PAIR:
            return jnp.full(shape[:-1], PER_PAIR[name], dtype)
        if name in SINGLE_NUMBER:
            return jnp.array(SINGLE_NUMBER[name], dtype)
        if name not in special:
            raise ValueError(f"{loss.__name__}: no value for {name}, expected one in {__file__}")
        return special[name]()

    def shares() -> jax.Array:
        part = np.arange(1, max(lengths) + 1) * (
            np.arange(max(lengths)) < np.array(lengths)[:, None]
        )
        return jnp.broadcast_to(jnp.asarray(part / part.sum(1, keepdims=True), dtype), tokens)

    special: dict[str, Callable[[], jax.Array]] = {
        "aligned": lambda: jnp.full((*shape, 1), sum(LOGP) / sum(LENGTHS), dtype),
        "is_target": lambda: shares() > 0,
        "key": lambda: jax.random.key(0),
        "lengths": lambda: jnp.broadcast_to(jnp.array(lengths), shape),
        "reference": lambda: reference,
        "shares": shares,
        "token_reference": lambda: reference[..., None] * shares(),
    }
    first, *rest = _inputs(loss)
    return {name: value(name) for name in [*rest, *NEEDED.get(first, ())]}


def of_pairs(loss: Callable, logp: jax.Array, **data: jax.Array) -> jax.Array:
    """The loss of ``logp [*points 2]``: tokens by their shares, of a batch each pair alone."""
    (first, *_), data = _inputs(loss), dict(data)
    if first == "token_logp":
        return loss(logp[..., None] * data.pop("shares"), **data)
    if first == "probability":
        return loss(jnp.exp(logp / data.pop("lengths").astype(logp.dtype)), **data)
    if loss.__name__ in BATCHWISE:
        return loss(logp[..., None, :], data["reference"][..., None, :])[..., 0]
    return loss(logp, **data)


def values_and_pulls(
    found: dict[str, Callable],
    logp: jax.Array,
    reference: jax.Array,
    lengths: tuple[int, int] = LENGTHS,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every loss the value and ``(d_w, d_l)`` at ``logp [*points 2]``, in one program."""

    def one(loss: Callable, logp: jax.Array, data: dict[str, jax.Array]) -> tuple:
        value, back = jax.vjp(lambda x: of_pairs(loss, x, **data), logp)
        (pull,) = back(jnp.ones_like(value))
        return value, jnp.stack([-pull[..., 0], pull[..., 1]], axis=-1)

    def every(logp: jax.Array, data: dict[str, dict[str, jax.Array]]) -> dict[str, tuple]:
        return {name: one(loss, logp, data[name]) for name, loss in found.items()}

    data = {name: arguments(loss, reference, lengths) for name, loss in found.items()}
    return jax.tree.map(np.asarray, jax.jit(every)(logp, data))


def _extreme(whole: np.ndarray, inside: np.ndarray, side: int) -> np.ndarray:
    """The least or the largest pulls; infinite where only the edges of the grid have them."""
    most, known = (side * (side * d).max(axis=0) for d in (whole, inside))
    grows = side * (most - 1.05 * known) > 1e-6
    return np.where(grows & (side * most > 0) | (np.abs(most) > 1e9), side * np.inf, most)


def _limit(near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The pulls as one response falls, from those 1,000 and 10,000 nats below."""
    grows = np.abs(far) > 1.05 * np.abs(near) + 1e-6
    return np.where(grows | (np.abs(far) > 1e9), np.copysign(np.inf, far), far)


def equality(d: np.ndarray, lengths: tuple[int, int] = LENGTHS) -> str:
    """Whether ``d_w = d_l`` in all rows of ``[points 2]``, or ``n_w d_w = n_l d_l``."""
    if np.allclose(d[:, 0], d[:, 1], rtol=1e-4, atol=1e-7):
        return "yes"
    by_token = d * np.array(lengths)
    return "by token" if np.allclose(*by_token.T, rtol=1e-4, atol=1e-7) else "no"


def _numbers(found: Pulls) -> list[str]:
    ends = zip(found.low.tolist(), found.high.tolist(), strict=True)
    ranges = [f"{_number(low)} to {_number(high)}" for low, high in ends]
    limits = [_shown(found.right), _shown(found.wrong)]
    return [_shown(found.value), _shown(found.here), *ranges, *limits, found.equal]


def _compared() -> str:
    names = sorted(set().union(*COMPARED.values()))
    rows = [[f"`{name}`", *(found.get(name, "") for found in COMPARED.values())] for name in names]
    return _table([["loss", *COMPARED], ["---"] * (1 + len(COMPARED)), *rows])


def _inputs(loss: Callable) -> list[str]:
    read = inspect.signature(loss).parameters.values()
    return [p.name for p in read if p.kind is not p.KEYWORD_ONLY]


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(function: Callable) -> list[str]:
    """Name, formula, inputs and source."""
    text = inspect.getdoc(function) or ""
    formula = re.search(r"\.\. math::(.*?)\n\n", text, re.DOTALL)
    source = _part(function, "References")
    if formula is None or not source:
        raise ValueError(f"{function.__name__}: expected '.. math::' and 'References:' in its text")
    cited, _, link = _one_line(source).rpartition(", ")
    read = inspect.signature(function).parameters.values()
    data = ", ".join(f"`{name}`" for name in _inputs(function))
    shown = ", ".join(f"`{p.name}={p.default:g}`" for p in read if p.kind is p.KEYWORD_ONLY)
    inputs = f"{data}; {shown}" if shown else data
    return [f"`{function.__name__}`", f"${_one_line(formula[1])}$", inputs, f"[{cited}]({link})"]


def _logic(loss: Callable) -> list[str]:
    """Where "both" and "neither" count; statement, condition, exception."""
    text = _one_line(_part(loss, "Logic"))
    found = re.fullmatch(
        r"S = (.+), given (.+), except (.+); both valid: (.+); neither: (.+)\.", text
    )
    if found is None:
        raise ValueError(f"{loss.__name__}: cannot read its Logic: {text}")
    return [found[4], found[5], found[1], found[2], found[3]]


def _part(function: Callable, title: str) -> str:
    """The text under ``title:`` in a docstring, or nothing."""
    found = re.search(
        rf"^{title}:\n(.*?)(\n\n|\Z)", inspect.getdoc(function) or "", re.DOTALL | re.M
    )
    return found[1] if found else ""


def _shown(x: np.ndarray) -> str:
    return ", ".join(_number(float(v)) for v in np.ravel(x))


def _number(v: float) -> str:
    if not np.isfinite(v):
        return "-∞" if v < 0 else "∞"
    return "0" if abs(v) < 1e-6 else f"{v:.4g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
