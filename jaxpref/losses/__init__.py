"""The catalogue of losses: pure functions of log-probabilities, one formula a function.

A loss keeps its batch axes and averages nothing: ``[*pairs 2] -> [*pairs]``, chosen first, or
``[*examples] -> [*examples]``. Its arguments are data, its keywords hyperparameters, and every
argument changes the result. Its derivative in `logp` is the pull, ``[-d_w, +d_l]``.

- The reference, like any argument but `logp` and the hyperparameters, is data: no gradient
  enters it, even if it was computed from the same parameters. The exceptions, functions of the
  policy like a divergence, say so.
- Arrays have the shapes of the signature, where an axis of a name has one size throughout a call.
  Others, and integers for log-probabilities, are refused by name, with and without ``jit``:
  nothing broadcasts.
- A loss of a whole batch is one number a batch (`jaxpref.losses.batch`).
- Sums and means are named, not flagged: ``logp`` is summed over tokens, and a loss that takes
  `lengths` divides by them. The mean of an empty response (length 0, sum 0) is 0.
- Numbers are float32 at least; float64 stays float64. Value and pull are finite at margins of
  ±10,000 nats and at probability one. A NaN log-probability gives a NaN loss, and so does a NaN
  in the data that it reads.
- Hyperparameters are checked once, when they are plain numbers; a traced one (under ``jit``,
  ``grad`` or ``vmap`` over it) cannot be seen and is not.
"""

from jaxpref.losses import _shapes
from jaxpref.losses.anchored import apo_down as apo_down
from jaxpref.losses.anchored import apo_zero as apo_zero
from jaxpref.losses.anchored import cal_dpo as cal_dpo
from jaxpref.losses.anchored import nca_pair as nca_pair
from jaxpref.losses.anchored import sppo as sppo
from jaxpref.losses.anchored import sppo_soft as sppo_soft
from jaxpref.losses.batch import RunningMean as RunningMean
from jaxpref.losses.batch import bco_prompt_weight as bco_prompt_weight
from jaxpref.losses.batch import bco_running_mean as bco_running_mean
from jaxpref.losses.batch import flat_jeffrey as flat_jeffrey
from jaxpref.losses.batch import flat_jensen_shannon as flat_jensen_shannon
from jaxpref.losses.batch import flat_kl as flat_kl
from jaxpref.losses.batch import flat_pearson as flat_pearson
from jaxpref.losses.batch import flat_total_variation as flat_total_variation
from jaxpref.losses.batch import kldo as kldo
from jaxpref.losses.batch import kldo_log_average as kldo_log_average
from jaxpref.losses.batch import kldo_moving_average as kldo_moving_average
from jaxpref.losses.batch import mean_token_probability as mean_token_probability
from jaxpref.losses.divergences import bhattacharyya_divergence as bhattacharyya_divergence
from jaxpref.losses.divergences import f_divergence as f_divergence
from jaxpref.losses.divergences import hellinger_divergence as hellinger_divergence
from jaxpref.losses.divergences import js_divergence as js_divergence
from jaxpref.losses.divergences import kl_divergence as kl_divergence
from jaxpref.losses.divergences import renyi_divergence as renyi_divergence
from jaxpref.losses.divergences import wasserstein_divergence as wasserstein_divergence
from jaxpref.losses.f_dpo import chi_po as chi_po
from jaxpref.losses.f_dpo import f_dpo_alpha as f_dpo_alpha
from jaxpref.losses.f_dpo import f_dpo_forward_kl as f_dpo_forward_kl
from jaxpref.losses.f_dpo import f_dpo_jensen_shannon as f_dpo_jensen_shannon
from jaxpref.losses.f_dpo import h_dpo as h_dpo
from jaxpref.losses.features import feature_distance as feature_distance
from jaxpref.losses.features import fpo as fpo
from jaxpref.losses.features import pooled_codes as pooled_codes
from jaxpref.losses.kernels import dpo_kernels as dpo_kernels
from jaxpref.losses.kernels import dpo_kernels_linear as dpo_kernels_linear
from jaxpref.losses.kernels import log_kernel_mixture as log_kernel_mixture
from jaxpref.losses.kernels import log_mahalanobis_kernel as log_mahalanobis_kernel
from jaxpref.losses.kernels import log_polynomial_kernel as log_polynomial_kernel
from jaxpref.losses.kernels import log_rbf_kernel as log_rbf_kernel
from jaxpref.losses.kernels import log_spectral_kernel as log_spectral_kernel
from jaxpref.losses.links import comp_sum_exponential as comp_sum_exponential
from jaxpref.losses.links import (
    comp_sum_generalised_cross_entropy as comp_sum_generalised_cross_entropy,
)
from jaxpref.losses.links import comp_sum_mae as comp_sum_mae
from jaxpref.losses.links import discopop as discopop
from jaxpref.losses.links import exo_pair as exo_pair
from jaxpref.losses.listwise import aft as aft
from jaxpref.losses.listwise import aft_boundary as aft_boundary
from jaxpref.losses.listwise import aft_detached as aft_detached
from jaxpref.losses.listwise import d2o as d2o
from jaxpref.losses.listwise import exo as exo
from jaxpref.losses.listwise import rrhf_list as rrhf_list
from jaxpref.losses.logic import logic_cce as logic_cce
from jaxpref.losses.logic import logic_ccpo as logic_ccpo
from jaxpref.losses.logic import logic_ce as logic_ce
from jaxpref.losses.logic import logic_ceunl as logic_ceunl
from jaxpref.losses.logic import logic_cfunl as logic_cfunl
from jaxpref.losses.logic import logic_cpo as logic_cpo
from jaxpref.losses.logic import logic_cunl as logic_cunl
from jaxpref.losses.logic import logic_l_bb as logic_l_bb
from jaxpref.losses.logic import logic_l_bd as logic_l_bd
from jaxpref.losses.logic import logic_l_bn as logic_l_bn
from jaxpref.losses.logic import logic_l_db as logic_l_db
from jaxpref.losses.logic import logic_l_nb as logic_l_nb
from jaxpref.losses.logic import logic_orpo as logic_orpo
from jaxpref.losses.logic import logic_qfunl as logic_qfunl
from jaxpref.losses.logic import logic_uncpo as logic_uncpo
from jaxpref.losses.logic import logic_unl as logic_unl
from jaxpref.losses.pairwise import cdpo as cdpo
from jaxpref.losses.pairwise import dpo as dpo
from jaxpref.losses.pairwise import dpo_shift as dpo_shift
from jaxpref.losses.pairwise import dpop as dpop
from jaxpref.losses.pairwise import hinge as hinge
from jaxpref.losses.pairwise import ipo as ipo
from jaxpref.losses.pairwise import ipo_length_normalised as ipo_length_normalised
from jaxpref.losses.pairwise import ln_dpo as ln_dpo
from jaxpref.losses.pairwise import margin as margin
from jaxpref.losses.pairwise import r_dpo as r_dpo
from jaxpref.losses.pairwise import robust_dpo as robust_dpo
from jaxpref.losses.pairwise import rpo as rpo
from jaxpref.losses.pairwise import rpo_token_mean as rpo_token_mean
from jaxpref.losses.reference_free import alphapo as alphapo
from jaxpref.losses.reference_free import confpo as confpo
from jaxpref.losses.reference_free import cpo as cpo
from jaxpref.losses.reference_free import cpo_token_mean as cpo_token_mean
from jaxpref.losses.reference_free import mapo as mapo
from jaxpref.losses.reference_free import orpo as orpo
from jaxpref.losses.reference_free import rrhf as rrhf
from jaxpref.losses.reference_free import simpo as simpo
from jaxpref.losses.reference_free import slic_hf as slic_hf
from jaxpref.losses.tokenwise import sampo as sampo
from jaxpref.losses.tokenwise import sampo_positions as sampo_positions
from jaxpref.losses.tokenwise import sparsepo as sparsepo
from jaxpref.losses.tokenwise import sparsepo_activation_mask as sparsepo_activation_mask
from jaxpref.losses.tokenwise import sparsepo_learned_mask as sparsepo_learned_mask
from jaxpref.losses.tokenwise import tdpo1 as tdpo1
from jaxpref.losses.tokenwise import tdpo2 as tdpo2
from jaxpref.losses.tokenwise import tis_dpo as tis_dpo
from jaxpref.losses.tokenwise import tis_dpo_with_kl as tis_dpo_with_kl
from jaxpref.losses.tokenwise import tis_weights as tis_weights
from jaxpref.losses.transport import aot as aot
from jaxpref.losses.transport import aot_unpaired as aot_unpaired
from jaxpref.losses.unpaired import bco as bco
from jaxpref.losses.unpaired import dco as dco
from jaxpref.losses.unpaired import kto as kto
from jaxpref.losses.unpaired import kto_baseline as kto_baseline
from jaxpref.losses.unpaired import npo as npo
from jaxpref.losses.unpaired import poft as poft
from jaxpref.losses.unpaired import sft as sft
from jaxpref.losses.unpaired import sft_token_mean as sft_token_mean
from jaxpref.losses.weights import ld_logp as ld_logp
from jaxpref.losses.weights import wpo_weight as wpo_weight

_shapes.hold(__name__)
