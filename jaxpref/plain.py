"""Whether functions that have derivatives of their own are to be plain operations instead.

A derivative of its own saves a function memory, and closes its program to all who read it: the
rules of the Gram and forward-mode derivatives. Who needs the plain operations says so while
tracing, ``with ASKED(True): ...``; such a function reads ``ASKED.value`` and has the same numbers.
`jax.jit` keeps the two programs of a function apart.
"""

import jax

ASKED = jax.make_user_context(False)
