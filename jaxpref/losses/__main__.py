"""Prints docs/losses.md: the table of the catalogue, made from the functions themselves."""

import inspect
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses

HELPERS = (  # public, but no losses
    "margin",
    "kto_baseline",
    "bco_running_mean",
    "bco_prompt_weight",
    "kldo_log_average",
    "mean_token_probability",
    "sampo_positions",
    "sparsepo_activation_mask",
    "sparsepo_learned_mask",
    "tis_weights",
    "feature_distance",
    "pooled_codes",
    "log_rbf_kernel",
    "log_polynomial_kernel",
    "log_mahalanobis_kernel",
    "log_spectral_kernel",
    "log_kernel_mixture",
    "kl_divergence",
    "js_divergence",
    "renyi_divergence",
    "bhattacharyya_divergence",
    "hellinger_divergence",
    "wasserstein_divergence",
    "f_divergence",
)

PAGE = r"""# Losses

Every loss keeps its batch axes and averages nothing: pairs are `[*pairs 2] -> [*pairs]`, chosen
first; single examples `[*examples] -> [*examples]`; a loss of a whole batch is one number.
Arguments are data, keywords hyperparameters. Token arrays are `[*pairs 2 response]`.

| symbol | meaning |
|---|---|
| $\log\pi_w$, $\log\pi_l$ | `logp` of the chosen and the rejected response, a sum, nats |
| $u = \log\pi - \log\pi_{ref}$ | log-ratio, `logp - reference`; the reference gets no gradient |
| $n$, $a = \log\pi / n$ | `lengths`, scored tokens, and the mean log-probability of a token |
| $\sigma$ | logistic function |

*Value* and *pull* are measured where the policy equals its reference, `logp` = %(logp)s nats
over %(lengths)s tokens, hyperparameters as shown. The pull is `jax.grad(loss)(logp)`, which is
`[-d_w, +d_l]`: gradient descent raises a log-probability whose pull is negative. For single
examples the two numbers belong to two examples, for `kto`, `bco` and `kldo` a desirable and an
undesirable one at a baseline of 0; of losses of tokens the pulls are means over a response's
tokens, of `flat_*` they are by the probabilities, 0.6 and 0.3.

| loss | formula | inputs | source | value | pull |
|---|---|---|---|---|---|
%(losses)s

Numbers are float32 at least, and finite at margins of ±10,000 nats and at probability one. The mean
of an empty response is 0. Plain hyperparameters are checked; traced ones cannot be. Where a paper
and its code differ, the docstring says which one this is: `help(losses.orpo)`.

Not losses, but made for them:

| function | formula | inputs | source |
|---|---|---|---|
%(helpers)s

## Another loss

1. Write the function in the file of its kind, formula and source in its docstring as in the others.
2. Name it in `jaxpref/losses/__init__.py`.
3. Add its row to the table in `tests/test_losses.py`: a point, its value and both pulls by hand.
4. `make docs` prints this page anew.
5. `make test` says which of these was forgotten.
"""

POINT = {
    "logp": jnp.array([-12.0, -15.0], jnp.float32),
    "reference": jnp.array([-12.0, -15.0], jnp.float32),
    "lengths": jnp.array([8, 12]),
    "desirable": jnp.array([True, False]),
    "kl_baseline": jnp.zeros((), jnp.float32),
    "delta": jnp.zeros((), jnp.float32),
    "log_average": jnp.zeros((), jnp.float32),
    "aligned": jnp.full((2, 1), -1.5, jnp.float32),
    "probability": jnp.array([0.6, 0.3], jnp.float32),
    "kl": jnp.zeros(2, jnp.float32),
    "distance": jnp.zeros(2, jnp.float32),
    "log_kernel": jnp.zeros(2, jnp.float32),
    "divergence": jnp.zeros(2, jnp.float32),
    "prompt_divergence": jnp.zeros((), jnp.float32),
}
TOKENS = jnp.arange(12) < POINT["lengths"][:, None]  # the same log-probabilities, token by token
POINT_OF_TOKENS = {
    "token_logp": jnp.where(TOKENS, jnp.array([[-1.5], [-1.25]], jnp.float32), 0),
    "token_reference": jnp.where(TOKENS, jnp.array([[-1.5], [-1.25]], jnp.float32), 0),
    "token_kl": jnp.zeros((2, 12), jnp.float32),
    "token_reverse_kl": jnp.zeros((2, 12), jnp.float32),
    "mask": jnp.ones((2, 12), jnp.float32),
    "kl_mask": jnp.ones((2, 12), jnp.float32),
    "weights": jnp.ones((2, 12), jnp.float32),
    "is_target": TOKENS,
    "key": jax.random.key(0),
}


def catalogue() -> dict[str, Callable]:
    """Every loss by its name."""
    found = {name: value for name, value in vars(losses).items() if inspect.isfunction(value)}
    return {name: loss for name, loss in found.items() if name not in HELPERS}


def page() -> str:
    """The whole of docs/losses.md."""
    rows = [[*_words(loss), *_numbers(loss)] for loss in catalogue().values()]
    helpers = [_words(getattr(losses, name)) for name in HELPERS]
    values = {"losses": _table(rows), "helpers": _table(helpers)}
    return PAGE % {**{k: v.tolist() for k, v in POINT.items()}, **values}


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(function: Callable) -> list[str]:
    """Name, formula, inputs and source."""
    text = inspect.getdoc(function) or ""
    formula = re.search(r"\.\. math::(.*?)\n\n", text, re.DOTALL)
    source = re.search(r"References:\n(.*?)(\n\n|\Z)", text, re.DOTALL)
    if formula is None or source is None:
        raise ValueError(f"{function.__name__}: expected '.. math::' and 'References:' in its text")
    cited, _, link = _one_line(source[1]).rpartition(", ")
    read = inspect.signature(function).parameters.values()
    data = ", ".join(f"`{p.name}`" for p in read if p.kind is not p.KEYWORD_ONLY)
    shown = ", ".join(f"`{p.name}={p.default:g}`" for p in read if p.kind is p.KEYWORD_ONLY)
    inputs = f"{data}; {shown}" if shown else data
    return [f"`{function.__name__}`", f"${_one_line(formula[1])}$", inputs, f"[{cited}]({link})"]


def _numbers(loss: Callable) -> list[str]:
    """Value and pull at `POINT`, the pull by the first argument."""
    names = list(inspect.signature(loss).parameters)
    point = POINT | POINT_OF_TOKENS
    data = {name: point[name] for name in names[1:] if name in point}
    value = loss(point[names[0]], **data)
    pull = jax.grad(lambda x: loss(x, **data).sum())(point[names[0]])
    if pull.ndim == 2:  # of tokens
        pull = pull.sum(axis=-1) / TOKENS.sum(axis=-1, dtype=pull.dtype)
    return [_shown(value), _shown(pull)]


def _shown(x: jax.Array) -> str:
    return ", ".join(f"{v + 0.0:.4g}" for v in np.ravel(x))  # + 0.0: no negative zero


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
