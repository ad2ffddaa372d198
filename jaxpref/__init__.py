"""A microscope for preference learning: what a margin loss does to each response, and why.

**One idea carries the library: the pair is an array axis of size two, chosen first.**

====================  ==================  =================================================
quantity              shape               made by
====================  ==================  =================================================
``tokens``            ``[pairs 2 time]``  `jaxpref.data`; with ``is_token`` (not padding) and
                                          ``is_response`` (scored)
``logp``              ``[pairs 2]``       `jaxpref.logprobs`: sum over response tokens, nats
``lengths``           ``[pairs 2]``       `jaxpref.logprobs`: number of scored tokens
``reference``         ``[pairs 2]``       the same ``logp`` under the frozen reference: data
loss                  ``[pairs]``         `jaxpref.losses`; the caller averages
``pull``              ``[pairs 2]``       ``jax.grad(loss)(logp)``: ``[-d_w, +d_l]``
``gram``              ``[pairs 2 2]``     `jaxpref.gradients`: inner products of the gradients of
                                          ``logp``; to first order a step changes ``logp``
                                          by ``-gram @ pull`` per unit of learning rate
``hidden``            ``[batch time width]``  `jaxpref.models`: after the final norm
``unembedding``       ``[vocab width]``   ``logits = hidden @ unembedding.T``
====================  ==================  =================================================

Axis names: ``pairs``, ``2``, ``batch``, ``time``, ``vocab``, ``width``, ``layers``. A leading
``*`` in a shape stands for any number of axes. Log-probabilities are natural logarithms.

Who may import whom, from the left only::

    data -> models -> logprobs -> losses -> gradients -> embeddings -> diagnostics
    -> training -> score

`jaxpref.runs` stands apart, and all may import `jaxpref.plain`. ``losses``, ``gradients``,
``embeddings`` and ``diagnostics`` load only jax, numpy and jaxtyping. Nothing is re-exported: a
thing has one name, `losses.dpo`.
"""

from importlib.metadata import version as _version

# The dependency range excludes this series, but an installer can be told not to look.
if _version("jaxlib").startswith("0.10."):
    raise ImportError(
        f"jaxlib {_version('jaxlib')}: expected 0.9.2, or 0.11 and newer. The 0.10 series "
        "computes wrong gradients silently on CPU (jax issue 39103). "
        "Run: pip install 'jax>=0.9.2,!=0.10.*' 'jaxlib>=0.9.2,!=0.10.*'"
    )
