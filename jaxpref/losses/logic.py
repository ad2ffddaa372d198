r"""The preference losses that two propositions make: each response is valid, or it is not.

``P = e^a`` is the mean probability of a token, taken for the probability that a response is valid,
independently of the other. Of the four worlds, "only the chosen is valid" counts for the preference
and "only the rejected" against it. "Both" and "neither" may count for, against, both ways or not at
all, which makes sixteen losses: ``ρ = log(weight for) - log(weight against)`` and
``-log σ(βρ)``. The line under ``Logic:`` gives the statement ``S`` whose truth is learned, given a
condition and, for worlds that count both ways, an exception:
``for = (S ∨ exception) ∧ condition`` and ``against = (¬S ∨ exception) ∧ condition``.

Length matters: a sum of log-probabilities makes ``P`` zero and most of these losses flat. Where a
response is nearly certain, ``1 - P`` counts as the spacing of the dtype in value and slope. A
`beta` that is not a finite number above 0 is refused. Every loss is ``[*pairs 2] -> [*pairs]``.

Our transcription: names and table are from memory, and were held against the logic world by world;
the last five have no name in our source.
"""

import jax
from jaxtyping import Array, Float, Num

from jaxpref.losses._inputs import AnyArray, Hyperparameter, below_one, per_token, positive, wide


def logic_orpo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: exactly one response is valid, and it is the chosen one.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w(1-P_l)}{(1-P_w)P_l}\right)

    The odds-ratio term of `orpo`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given w ⊕ l, except ⊥; both valid: not at all; neither: not at all.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="", neither="")


def logic_cpo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: a preferred response is valid, and may not be alone.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w}{P_l}\right)

    The preference term of `cpo` on token means; `simpo` with a target of 0.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given w ∨ l, except w ∧ l; both valid: both ways; neither: not at all.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="nd", neither="")


def logic_ccpo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: one response at least is valid, the rejected one only with the other.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w}{(1-P_w)P_l}\right)

    `logic_cpo` in which both valid counts only for the preference.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given w ∨ l, except ⊥; both valid: for; neither: not at all.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="n", neither="")


def logic_cunl(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: one response at least is valid, and not the rejected one.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w(1-P_l)}{P_l}\right)

    Unlearning of the rejected response, given that one is valid.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = ¬l, given w ∨ l, except ⊥; both valid: against; neither: not at all.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="d", neither="")


def logic_qfunl(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: not both are valid, and the rejected one is not.

    .. math:: -\log\sigma\left(\beta\log\frac{1-P_l}{1-P_w}\right)

    `logic_cpo` of the probabilities of being invalid.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given ¬(w ∧ l), except ¬w ∧ ¬l; both valid: not at all; neither: both ways.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="", neither="nd")


def logic_cfunl(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: as `logic_qfunl`, with neither valid counting only for it.

    .. math:: -\log\sigma\left(\beta\log\frac{1-P_l}{(1-P_w)P_l}\right)

    The rejected response is pulled the harder of the two where it is the more probable one.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given ¬(w ∧ l), except ⊥; both valid: not at all; neither: for.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="", neither="n")


def logic_cce(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: not both are valid, and the chosen one is.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w(1-P_l)}{1-P_w}\right)

    Likelihood of the chosen response, given that not both are valid.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = w, given ¬(w ∧ l), except ⊥; both valid: not at all; neither: against.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="", neither="d")


def logic_uncpo(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: if the rejected response is valid, the chosen one is.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w P_l + 1 - P_l}{(1-P_w)P_l}\right)

    The preference with no condition, `logic_ccpo` and `logic_cfunl` at once.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given ⊤, except ⊥; both valid: for; neither: for.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="n", neither="n")


def logic_ce(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the chosen response is valid.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w}{1-P_w}\right)

    At ``β = 1`` it is ``-a_w``, supervised fine-tuning; the rejected response has no pull.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = w, given ⊤, except ⊥; both valid: for; neither: against.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="n", neither="d")


def logic_unl(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the rejected response is not valid.

    .. math:: -\log\sigma\left(\beta\log\frac{1-P_l}{P_l}\right)

    At ``β = 1`` it is ``-log(1 - P_l)``, unlikelihood training; the chosen response has no pull.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = ¬l, given ⊤, except ⊥; both valid: against; neither: for.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="d", neither="n")


def logic_ceunl(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the chosen response is valid and the rejected one is not.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w(1-P_l)}{1-P_w(1-P_l)}\right)

    At ``β = 1`` it is the sum of `logic_ce` and `logic_unl`.

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = w ∧ ¬l, given ⊤, except ⊥; both valid: against; neither: against.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="d", neither="d")


def logic_l_bn(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the preference, where both valid speaks for and against it.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w P_l + 1 - P_l}{P_l}\right)

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given ⊤, except w ∧ l; both valid: both ways; neither: for.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="nd", neither="n")


def logic_l_bd(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the chosen one is valid, where both valid speaks also against it.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w}{P_w P_l + 1 - P_w}\right)

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = w, given ⊤, except w ∧ l; both valid: both ways; neither: against.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="nd", neither="d")


def logic_l_bb(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the preference, where equal validity speaks for and against it.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w P_l + 1 - P_l}{P_w P_l + 1 - P_w}\right)

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given ⊤, except w ↔ l; both valid: both ways; neither: both ways.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="nd", neither="nd")


def logic_l_nb(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: the preference, where neither valid speaks for and against it.

    .. math:: -\log\sigma\left(\beta\log\frac{P_w P_l + 1 - P_l}{1-P_w}\right)

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = l → w, given ⊤, except ¬w ∧ ¬l; both valid: for; neither: both ways.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="n", neither="nd")


def logic_l_db(
    logp: Float[AnyArray, "*pairs 2"],
    lengths: Num[AnyArray, "*pairs 2"],
    *,
    beta: Hyperparameter = 1.0,
) -> Float[Array, "*pairs"]:
    r"""Logic of preferences: only the chosen one is valid, where neither valid speaks also for it.

    .. math:: -\log\sigma\left(\beta\log\frac{1-P_l}{1-P_w(1-P_l)}\right)

    Args:
        logp: Summed response log-probabilities under the policy, nats.
        lengths: Number of scored tokens of each response.
        beta: Inverse temperature, above 0.

    Returns:
        One loss a pair, nats. An empty response counts as certain.

    Logic:
        S = w ∧ ¬l, given ⊤, except ¬w ∧ ¬l; both valid: against; neither: both ways.

    References:
        Richardson et al. (2024), our transcription, https://arxiv.org/abs/2412.17696
    """
    return _loss(logp, lengths, beta, both="d", neither="nd")


def _loss(
    logp: AnyArray, lengths: AnyArray, beta: Hyperparameter, *, both: str, neither: str
) -> Array:
    """The loss in which two worlds count ``n``, for, ``d``, against, ``nd``, both ways, or not."""
    yes = below_one(per_token(wide(logp), lengths))
    no = jax.nn.log1mexp(-yes)
    pro = _log_weight(yes, no, 0, "n" in both, "n" in neither)
    con = _log_weight(yes, no, 1, "d" in both, "d" in neither)
    return -jax.nn.log_sigmoid(positive("beta", beta, yes) * (pro - con))


def _log_weight(yes: Array, no: Array, which: int, *counts: bool) -> Array:
    """Of the world in which only one is valid, with or without "both" and "neither"."""
    other, (both, neither) = 1 - which, counts
    if both and neither:  # all worlds but the opposite one
        return jax.nn.log1mexp(-(yes[..., other] + no[..., which]))
    if both:
        return yes[..., which]
    if neither:
        return no[..., other]
    return yes[..., which] + no[..., other]
