"""Algebra on small numbers: what a step will do, what a run did. No autodiff, no model."""

from jaxpref.diagnostics.displacement import Drop as Drop
from jaxpref.diagnostics.displacement import displaced as displaced
from jaxpref.diagnostics.displacement import displaced_on_average as displaced_on_average
from jaxpref.diagnostics.displacement import largest_drop as largest_drop
from jaxpref.diagnostics.displacement import share_of_gain as share_of_gain
from jaxpref.diagnostics.displacement import spearman as spearman
from jaxpref.diagnostics.entanglement import Band as Band
from jaxpref.diagnostics.entanglement import Regime as Regime
from jaxpref.diagnostics.entanglement import band as band
from jaxpref.diagnostics.entanglement import band_margin as band_margin
from jaxpref.diagnostics.entanglement import batch_change as batch_change
from jaxpref.diagnostics.entanglement import cosine as cosine
from jaxpref.diagnostics.entanglement import entanglement as entanglement
from jaxpref.diagnostics.entanglement import first_order_change as first_order_change
from jaxpref.diagnostics.entanglement import norm_ratio as norm_ratio
from jaxpref.diagnostics.entanglement import published_entanglement as published_entanglement
from jaxpref.diagnostics.entanglement import pull_ratio as pull_ratio
from jaxpref.diagnostics.entanglement import regime as regime
from jaxpref.diagnostics.squeezing import Shift as Shift
from jaxpref.diagnostics.squeezing import TokenShifts as TokenShifts
from jaxpref.diagnostics.squeezing import drag as drag
from jaxpref.diagnostics.squeezing import shift_kind as shift_kind
from jaxpref.diagnostics.squeezing import squeezing as squeezing
from jaxpref.diagnostics.squeezing import token_shifts as token_shifts
from jaxpref.losses import _shapes

_shapes.hold(__name__)
