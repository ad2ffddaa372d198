"""Derivatives of log-probabilities: what a step will do, before it is taken.

Every function takes `logp_fn(params)`, any differentiable function of any pytree, so nothing here
knows a model, a mask or a data format.
"""

from jaxpref.gradients.directional import directional as directional
from jaxpref.gradients.directional import flow_rates as flow_rates
