"""What the tests of losses share: two points, and every loss's numbers there."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses

REFERENCE, LENGTHS = jnp.array([-13.0, -14.2]), jnp.array([9.0, 12.0])
A = jnp.array([-12.3, -15.1])  # log-ratios 0.7 and -0.9: margin 1.6
B = jnp.array([-13.5, -12.9])  # log-ratios -0.5 and 1.3: margin -1.8
ONES = jnp.ones(2)
DATA = {
    "reference": REFERENCE,
    "lengths": LENGTHS,
    "desirable": jnp.array([True, False]),
    "kl_baseline": jnp.array(0.0),
    "rewards": jnp.array([1.0, 0.0]),
    "win_probability": jnp.array([0.8, 0.3]),
}
# Each token's part of its response's log-probability: products with them are exact in any dtype.
SHARES = np.array([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.25, 0.0]])
BATCHWISE = ("aot", "aot_unpaired")


def of_pairs(name):
    """The loss of ``logp [*pairs 2]``: a batchwise one of each pair alone, tokens by SHARES."""
    loss = getattr(losses, name)
    if name in BATCHWISE:
        return lambda logp, reference, **rest: loss(
            logp[..., None, :], reference[..., None, :], **rest
        )[..., 0]
    if "token_logp" in inspect.signature(loss).parameters:

        def of_sums(logp, **rest):
            shares = jnp.broadcast_to(SHARES, (*logp.shape, 4))
            return loss(logp[..., None] * shares.astype(logp.dtype), shares > 0, **rest)

        return of_sums
    return loss


def read(name, data, dtype):
    """What a loss reads of `data`, float64 in another dtype."""
    names = inspect.signature(getattr(losses, name)).parameters
    return {
        k: v.astype(dtype) if v.dtype == jnp.float64 else v for k, v in data.items() if k in names
    }


def bound(name, *, dtype=jnp.float64, **arguments):
    """The loss as a function of `logp`: what it reads of DATA, unless given here."""
    return functools.partial(of_pairs(name), **{**read(name, DATA, dtype), **arguments})


class Point(typing.NamedTuple):
    """A loss somewhere. Of single examples the mean over the two, of tokens a derivative each."""

    name: str
    arguments: dict
    logp: jax.Array
    value: float
    d_w: typing.Any  # -dl/dlogp_w
    d_l: typing.Any  # +dl/dlogp_l


# Computed from the papers' formulas in 40 digits, with numerical derivatives, outside this library.
POINTS = [
    Point("dpo", {"beta": 0.1}, A, 0.616344, 0.046009, 0.046009),
    Point("dpo", {"beta": 0.1}, B, 0.787192, 0.054488, 0.054488),
    Point("cdpo", {"beta": 0.1, "epsilon": 0.1}, A, 0.632344, 0.036009, 0.036009),
    Point("cdpo", {"beta": 0.1, "epsilon": 0.1}, B, 0.769192, 0.044488, 0.044488),
    Point("robust_dpo", {"beta": 0.1, "epsilon": 0.1}, A, 0.596344, 0.058509, 0.058509),
    Point("robust_dpo", {"beta": 0.1, "epsilon": 0.1}, B, 0.809692, 0.066988, 0.066988),
    Point("ipo", {"tau": 0.1}, A, 11.56, 6.8, 6.8),
    Point("ipo", {"tau": 0.1}, B, 46.24, 13.6, 13.6),
    Point("ipo_length_normalised", {"tau": 0.1}, A, 23.495563, 1.077160, 0.807870),
    Point("ipo_length_normalised", {"tau": 0.1}, B, 26.665748, 1.147531, 0.860648),
    Point("hinge", {"beta": 0.1}, A, 0.84, 0.1, 0.1),
    Point("hinge", {"beta": 0.1}, B, 1.18, 0.1, 0.1),
    Point("r_dpo", {"beta": 0.1, "alpha": 0.01}, A, 0.630258, 0.046755, 0.046755),
    Point("r_dpo", {"beta": 0.1, "alpha": 0.2}, A, 0.937154, 0.060826, 0.060826),
    Point("r_dpo", {"beta": 0.1, "alpha": 0.2}, B, 1.157344, 0.068568, 0.068568),
    Point("dpop", {"beta": 0.1, "lam": 50}, A, 0.616344, 0.046009, 0.046009),
    Point("dpop", {"beta": 0.1, "lam": 50}, B, 2.746315, 4.772764, 0.093584),
    Point("dpop", {"beta": 0.1, "lam": 5}, B, 0.931084, 0.363524, 0.060587),
    Point("dpo_shift", {"beta": 0.1, "shift": 0.75}, A, 0.626759, 0.046568, 0.034926),
    Point("dpo_shift", {"beta": 0.1, "shift": 0.75}, B, 0.769614, 0.053681, 0.040261),
    Point("sppo", {"beta": 0.1}, A, 35.3, 8.6, 8.2),
    Point("sppo", {"beta": 0.1}, B, 69.94, 11.0, 12.6),
    Point("slic_hf", {"delta": 1, "lam": 0.1}, A, 1.23, 0.1, 0.0),
    Point("slic_hf", {"delta": 5, "lam": 0.1}, A, 3.43, 1.1, 1.0),
    Point("slic_hf", {"delta": 1, "lam": 0.1}, B, 2.95, 1.1, 1.0),
    Point("simpo", {"beta": 2, "gamma": 0.5}, A, 1.114353, 0.149305, 0.111979),
    Point("simpo", {"beta": 0.1, "gamma": 0.5}, A, 0.980834, 0.006944, 0.005208),
    Point("simpo", {"beta": 10, "gamma": 3}, A, 4.100044, 1.092698, 0.819523),
    Point("simpo", {"beta": 2, "gamma": 0.5}, B, 1.580509, 0.176473, 0.132355),
    Point("cpo", {"beta": 0.1, "alpha": 0}, A, 0.562915, 0.043045, 0.043045),
    Point("cpo", {"beta": 0.1, "alpha": 1}, A, 12.862915, 1.043045, 0.043045),
    Point("cpo", {"beta": 0.1, "alpha": 1}, B, 14.223597, 1.051500, 0.051500),
    Point("cpo_token_mean", {"beta": 0.1, "alpha": 1}, A, 1.929582, 0.154156, 0.043045),
    Point("cpo_token_mean", {"beta": 0.1, "alpha": 1}, B, 2.223597, 0.162611, 0.051500),
    Point("rrhf", {"lam": 0}, A, 0.108333, 0.111111, 0.083333),
    Point("rrhf", {"lam": 1}, A, 12.408333, 1.111111, 0.083333),
    Point("rrhf", {"lam": 1}, B, 13.925, 1.111111, 0.083333),
    Point("orpo", {"lam": 0.1}, A, 1.443670, 0.119120, 0.006251),
    Point("orpo", {"lam": 1}, A, 2.136697, 0.191196, 0.062511),
    Point("orpo", {"lam": 0.1}, B, 1.603104, 0.120313, 0.008139),
    Point("sft", {}, A, 13.7, 0.5, -0.5),
    Point("sft", {}, B, 13.2, 0.5, -0.5),
    Point("sft_token_mean", {}, A, 1.3125, 0.055556, -0.041667),
    Point("sft_token_mean", {}, B, 1.2875, 0.055556, -0.041667),
    Point("kto", {"beta": 0.1}, A, 0.480011, 0.012485, 0.012475),
    Point("kto", {"beta": 0.1, "kl_baseline": 0.5}, A, 0.480029, 0.012499, 0.012439),
    Point(
        "kto",
        {"beta": 0.1, "kl_baseline": 0.5, "desirable_weight": 2, "undesirable_weight": 3},
        B,
        *(1.304963, 0.024938, 0.037440),
    ),
    Point("ln_dpo", {"beta": 0.1}, A, 0.685537, 0.005513, 0.004135),
    Point("ln_dpo", {"beta": 0.1}, B, 0.701375, 0.005601, 0.004201),
    Point("ln_dpo", {"beta": 2}, A, 0.551995, 0.094267, 0.070700),
    Point("ln_dpo", {"beta": 2}, B, 0.870406, 0.129160, 0.096870),
    Point("rpo", {"beta": 0.1, "eta": 0.005}, A, 0.622494, 0.046509, 0.046009),
    Point("rpo", {"beta": 0.1, "eta": 0.005}, B, 0.793942, 0.054988, 0.054488),
    Point("rpo_token_mean", {"beta": 0.1, "alpha": 1}, A, 1.983010, 0.157120, 0.046009),
    Point("rpo_token_mean", {"beta": 0.1, "alpha": 1}, B, 2.287192, 0.165599, 0.054488),
    Point("nca_pair", {"beta": 0.1}, A, 1.347719, 0.022376, 0.023876),
    Point("nca_pair", {"beta": 0.1}, B, 1.432819, 0.026875, 0.026623),
    Point("exo_pair", {"beta": 0.1, "epsilon": 0.001}, A, 2.488738, 0.167594, 0.167594),
    Point("exo_pair", {"beta": 0.1, "epsilon": 0.001}, B, 3.075232, 0.175742, 0.175742),
    Point("sppo_soft", {"beta": 0.1}, A, 3.250000, 2.300000, 1.100000),
    Point("sppo_soft", {"beta": 0.1}, B, 11.570000, 3.500000, 3.300000),
    Point("apo_zero", {"beta": 0.1}, A, 0.960022, 0.024969, 0.024949),
    Point("apo_zero", {"beta": 0.1}, B, 1.044952, 0.024984, 0.024895),
    Point("apo_down", {"beta": 0.1}, A, 0.977578, -0.000129, 0.024841),
    Point("apo_down", {"beta": 0.1}, B, 1.032381, -0.000186, 0.024799),
    Point("discopop", {"beta": 0.1, "tau": 0.05}, A, 0.842909, 0.065932, 0.065932),
    Point("discopop", {"beta": 0.1, "tau": 0.05}, B, 0.798097, 0.034992, 0.034992),
    Point("chi_po", {"beta": 0.1, "r_max": 1}, A, 0.545591, 0.126729, 0.059146),
    Point("chi_po", {"beta": 0.1, "r_max": 1}, B, 0.965557, 0.099481, 0.289136),
    Point("chi_po", {"beta": 0.1, "r_max": 0.1}, A, 0.598139, 0.000000, 0.000000),
    Point("chi_po", {"beta": 0.1, "r_max": 0.1}, B, 0.798139, 0.000000, 0.000000),
    Point("f_dpo_forward_kl", {"beta": 0.1}, A, 0.599805, 0.022400, 0.110948),
    Point("f_dpo_forward_kl", {"beta": 0.1}, B, 0.764322, 0.088100, 0.014563),
    Point("f_dpo_jensen_shannon", {"beta": 0.1}, A, 0.652126, 0.015896, 0.034059),
    Point("f_dpo_jensen_shannon", {"beta": 0.1}, B, 0.730472, 0.032263, 0.011101),
    Point("f_dpo_alpha", {"beta": 0.1, "alpha": 0.3}, A, 0.613377, 0.037164, 0.060059),
    Point("f_dpo_alpha", {"beta": 0.1, "alpha": 0.3}, B, 0.777204, 0.062775, 0.036582),
    Point("f_dpo_alpha", {"beta": 0.1, "alpha": 0.5}, A, 0.610509, 0.032199, 0.071660),
    Point("f_dpo_alpha", {"beta": 0.1, "alpha": 0.5}, B, 0.772245, 0.069084, 0.028087),
    Point("h_dpo", {"beta": 0.1, "alpha": 0.9}, A, 0.629324, 0.042034, 0.042034),
    Point("h_dpo", {"beta": 0.1, "alpha": 0.9}, B, 0.783927, 0.048905, 0.048905),
    Point("h_dpo", {"beta": 0.1, "alpha": 0.95}, A, 0.622809, 0.044039, 0.044039),
    Point("h_dpo", {"beta": 0.1, "alpha": 0.95}, B, 0.785558, 0.051693, 0.051693),
    Point("cal_dpo", {"beta": 0.1, "lam": 0.5}, A, 17.833901, 4.467982, 4.267982),
    Point("cal_dpo", {"beta": 0.1, "lam": 0.5}, B, 36.922978, 6.358149, 7.158149),
    Point("cal_dpo", {"beta": 0.1, "lam": 1}, A, 35.483901, 8.767982, 8.367982),
    Point("cal_dpo", {"beta": 0.1, "lam": 1}, B, 71.892978, 11.858149, 13.458149),
    Point("comp_sum_exponential", {"beta": 0.1}, A, 0.852144, 0.085214, 0.085214),
    Point("comp_sum_exponential", {"beta": 0.1}, B, 1.197217, 0.119722, 0.119722),
    Point(
        "comp_sum_generalised_cross_entropy",
        {"beta": 0.1, "q": 0.7},
        A,
        0.500611,
        0.029886,
        0.029886,
    ),
    Point(
        "comp_sum_generalised_cross_entropy",
        {"beta": 0.1, "q": 0.7},
        B,
        0.605209,
        0.031404,
        0.031404,
    ),
    Point("comp_sum_mae", {"beta": 0.1}, A, 0.460085, 0.024841, 0.024841),
    Point("comp_sum_mae", {"beta": 0.1}, B, 0.544879, 0.024799, 0.024799),
    Point("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}, A, 0.959222, 0.241119, 0.176008),
    Point("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}, B, 1.756218, 0.334366, 0.225497),
    Point("alphapo", {"beta": 0.1, "gamma": 0.5, "alpha": 0.25}, A, 0.983466, 0.009788, 0.007145),
    Point("alphapo", {"beta": 0.1, "gamma": 0.5, "alpha": 0.25}, B, 1.010996, 0.010284, 0.006936),
    Point("mapo", {"beta": 0.1, "scale": 10}, A, 1.453113, 0.129470, 0.014504),
    Point("mapo", {"beta": 0.1, "scale": 10}, B, 1.651105, 0.134261, 0.021266),
    Point("d2o", {"beta": 0.1, "alpha": 0.2}, A, 0.575939, 0.043782, 0.087565),
    Point("d2o", {"beta": 0.1, "alpha": 0.2}, B, 0.860112, 0.057689, 0.115377),
    Point("exo", {"beta": 0.1, "temperature": 0.5}, A, 0.357141, 0.045707, 0.045707),
    Point("exo", {"beta": 0.1, "temperature": 0.5}, B, 0.527572, 0.054061, 0.054061),
    Point("rrhf_list", {"lam": 1}, A, 12.408333, 1.111111, 0.083333),
    Point("rrhf_list", {"lam": 1}, B, 13.925000, 1.111111, 0.083333),
    Point("aft", {}, A, 0.748780, 0.058562, 0.043921),
    Point("aft", {}, B, 0.928057, 0.067187, 0.050390),
    Point("aft_boundary", {"boundary": 0.3}, A, 0.958155, 0.047499, 0.019882),
    Point("aft_boundary", {"boundary": 0.3}, B, 1.060698, 0.058841, 0.033779),
    Point("aft_detached", {}, A, 0.748780, 0.058562, 0.000000),
    Point("aft_detached", {}, B, 0.928057, 0.067187, 0.000000),
    Point("aot", {"beta": 0.1}, A, 0.616344, 0.046009, 0.046009),
    Point("aot", {"beta": 0.1}, B, 0.787192, 0.054488, 0.054488),
    Point("aot", {"beta": 0.1, "epsilon": 0.1}, A, 0.632344, 0.036009, 0.036009),
    Point("aot", {"beta": 0.1, "epsilon": 0.1}, B, 0.769192, 0.044488, 0.044488),
    Point("logic_orpo", {"beta": 1}, A, 0.770030, 0.080085, 0.062511),
    Point("logic_orpo", {"beta": 1}, B, 1.031044, 0.092017, 0.081393),
    Point("logic_cpo", {"beta": 1}, A, 0.748780, 0.058562, 0.043921),
    Point("logic_cpo", {"beta": 1}, B, 0.928057, 0.067187, 0.050390),
    Point("logic_ccpo", {"beta": 1}, A, 0.604476, 0.067653, 0.037803),
    Point("logic_ccpo", {"beta": 1}, B, 0.783122, 0.077665, 0.045252),
    Point("logic_cunl", {"beta": 1}, A, 0.938728, 0.067653, 0.070878),
    Point("logic_cunl", {"beta": 1}, B, 1.200605, 0.077665, 0.088430),
    Point("logic_qfunl", {"beta": 1}, A, 0.713317, 0.019391, 0.016868),
    Point("logic_qfunl", {"beta": 1}, B, 0.779047, 0.017270, 0.023366),
    Point("logic_cfunl", {"beta": 1}, A, 0.259055, 0.008677, 0.026567),
    Point("logic_cfunl", {"beta": 1}, B, 0.338274, 0.009159, 0.036309),
    Point("logic_cce", {"beta": 1}, A, 1.625722, 0.119789, 0.026567),
    Point("logic_cce", {"beta": 1}, B, 1.838274, 0.120270, 0.036309),
    Point("logic_uncpo", {"beta": 1}, A, 0.237861, 0.010210, 0.022378),
    Point("logic_uncpo", {"beta": 1}, B, 0.308081, 0.011515, 0.030068),
    Point("logic_ce", {"beta": 1}, A, 1.366667, 0.111111, 0.000000),
    Point("logic_ce", {"beta": 1}, B, 1.500000, 0.111111, 0.000000),
    Point("logic_unl", {"beta": 1}, A, 0.334253, 0.000000, 0.033075),
    Point("logic_unl", {"beta": 1}, B, 0.417484, 0.000000, 0.043178),
    Point("logic_ceunl", {"beta": 1}, A, 1.700919, 0.111111, 0.033075),
    Point("logic_ceunl", {"beta": 1}, B, 1.917484, 0.111111, 0.043178),
    Point("logic_l_bn", {"beta": 1}, A, 0.307797, 0.002705, 0.028007),
    Point("logic_l_bn", {"beta": 1}, B, 0.381474, 0.003652, 0.035965),
    Point("logic_l_bd", {"beta": 1}, A, 1.436603, 0.103606, 0.005629),
    Point("logic_l_bd", {"beta": 1}, B, 1.573393, 0.103248, 0.005897),
    Point("logic_l_bb", {"beta": 1}, A, 0.711481, 0.017827, 0.015151),
    Point("logic_l_bb", {"beta": 1}, B, 0.770480, 0.016470, 0.020149),
    Point("logic_l_nb", {"beta": 1}, A, 0.665320, 0.023436, 0.010873),
    Point("logic_l_nb", {"beta": 1}, B, 0.721333, 0.022317, 0.015452),
    Point("logic_l_db", {"beta": 1}, A, 0.761712, 0.013226, 0.021570),
    Point("logic_l_db", {"beta": 1}, B, 0.830736, 0.010803, 0.028562),
    Point("logic_l_bb", {"beta": 0.5}, A, 0.702273, 0.008834, 0.007508),
    Point("logic_l_bb", {"beta": 0.5}, B, 0.731120, 0.007950, 0.009726),
    Point("confpo", {"beta": 1.5, "gamma": 1.6}, A, 0.058676, 0.032055, 0.042741),
    Point("confpo", {"beta": 1.5, "gamma": 1.6}, B, 0.481197, 0.214851, 0.286468),
    Point("confpo", {"beta": 0.1, "gamma": 0}, A, 0.557020, 0.016016, 0.021354),
    Point("confpo", {"beta": 0.1, "gamma": 0}, B, 0.626177, 0.017451, 0.023268),
    Point("aot_unpaired", {"beta": 0.1}, A, 0.616344, 0.046009, 0.046009),
    Point("aot_unpaired", {"beta": 0.1}, B, 0.787192, 0.054488, 0.054488),
    Point("aot_unpaired", {"beta": 0.1, "epsilon": 0.1}, A, 0.632344, 0.036009, 0.036009),
    Point("aot_unpaired", {"beta": 0.1, "epsilon": 0.1}, B, 0.769192, 0.044488, 0.044488),
]
