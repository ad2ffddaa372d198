"""A model's outputs to token, response and pair log-probabilities. Only this folder reads masks."""

from jaxpref.logprobs.chunked import token_logprobs_chunked as token_logprobs_chunked
from jaxpref.logprobs.reference import ReferenceCacheError as ReferenceCacheError
from jaxpref.logprobs.reference import fingerprint as fingerprint
from jaxpref.logprobs.reference import reference_logprobs as reference_logprobs
from jaxpref.logprobs.responses import Responses as Responses
from jaxpref.logprobs.responses import Scores as Scores
from jaxpref.logprobs.responses import pair_scores as pair_scores
from jaxpref.logprobs.responses import response_hidden as response_hidden
from jaxpref.logprobs.responses import response_scores as response_scores
from jaxpref.logprobs.shared_prompt import packed_length as packed_length
from jaxpref.logprobs.shared_prompt import packed_lengths as packed_lengths
from jaxpref.logprobs.shared_prompt import shared_prompt_hidden as shared_prompt_hidden
from jaxpref.logprobs.shared_prompt import shared_prompt_scores as shared_prompt_scores
from jaxpref.logprobs.statistics import TokenMoves as TokenMoves
from jaxpref.logprobs.statistics import TokenStatistics as TokenStatistics
from jaxpref.logprobs.statistics import token_kl as token_kl
from jaxpref.logprobs.statistics import token_moves as token_moves
from jaxpref.logprobs.statistics import token_statistics as token_statistics
from jaxpref.logprobs.tokens import token_logits as token_logits
from jaxpref.logprobs.tokens import token_logprobs as token_logprobs
