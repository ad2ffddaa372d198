"""Geometry of hidden states and unembeddings: which responses a preference pushes up, and why.

`geometry` has single-token answers in closed form, `similarity` scores of whole pairs of responses,
known before any training, `separation` how far apart two kinds of them lie.
"""

from jaxpref.embeddings.geometry import ChosenTerms as ChosenTerms
from jaxpref.embeddings.geometry import DirectionGeometry as DirectionGeometry
from jaxpref.embeddings.geometry import chosen_terms as chosen_terms
from jaxpref.embeddings.geometry import direction_geometry as direction_geometry
from jaxpref.embeddings.geometry import token_rates as token_rates
from jaxpref.embeddings.geometry import unembedding_direction as unembedding_direction
from jaxpref.embeddings.separation import gaussian_separation as gaussian_separation
from jaxpref.embeddings.separation import principal_projection as principal_projection
from jaxpref.embeddings.separation import silhouette as silhouette
from jaxpref.embeddings.similarity import alpha_weighted_ches as alpha_weighted_ches
from jaxpref.embeddings.similarity import ches as ches
from jaxpref.embeddings.similarity import ches_contributions as ches_contributions
from jaxpref.embeddings.similarity import ches_length_normalised as ches_length_normalised
from jaxpref.embeddings.similarity import edit_similarity as edit_similarity
from jaxpref.embeddings.similarity import last_hidden_similarity as last_hidden_similarity
from jaxpref.embeddings.similarity import length_difference as length_difference
from jaxpref.embeddings.similarity import length_ratio as length_ratio
from jaxpref.embeddings.similarity import unembedding_gram as unembedding_gram
from jaxpref.losses import _shapes

_shapes.hold(__name__)
