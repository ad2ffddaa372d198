"""Where token ids meet a model's bounds: the rows of its table, and the positions it knows.

A bound is of a text's own ids and positions, whatever the layout of the arrays that carry it.
`check` asks it of texts before they are packed, and names the text; `mark` asks it again inside
programs, where no error can be raised: what would be read from another row is NaN there.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpref.data.files import DataError


class Bounds(NamedTuple):
    """What a policy can read.

    Attributes:
        vocab: Token ids are below it; None where the policy has no such bound.
        longest: Positions are below it: rows of a learned table; None without one, for rotary
            positions have no end.
    """

    vocab: int | None = None
    longest: int | None = None


Text = Sequence[int] | Int[np.ndarray, " time"]


def fault(bounds: Bounds, text: Text) -> str | None:
    """What a model cannot read in a text, if anything.

    Args:
        bounds: Of the policy.
        text: Token ids from position 0 on. The last one is predicted and not encoded, so it needs
            no position.

    Returns:
        One line without the text's place, or None.

    >>> fault(Bounds(vocab=5, longest=3), [1, 2, 3, 4])
    >>> fault(Bounds(vocab=5, longest=3), [1, 2, 3, 4, 0])
    'a text of 5 tokens, expected at most 4: this model knows 3 positions'
    >>> fault(Bounds(vocab=5), [1, 7])
    "token id 7, expected 0 to 4: the model's table has fewer rows than its tokenizer has tokens"
    """
    ids = np.asarray(text)
    vocab, longest = bounds
    if longest is not None and ids.size - 1 > longest:
        return (
            f"a text of {ids.size} tokens, expected at most {longest + 1}: this model knows "
            f"{longest} positions"
        )
    if vocab is None or not (unknown := ids[(ids < 0) | (ids >= vocab)]).size:
        return None
    why = ": the model's table has fewer rows than its tokenizer has tokens"
    return f"token id {unknown[0]}, expected 0 to {vocab - 1}{why if unknown[0] > 0 else ''}"


def check(bounds: Bounds, texts: Iterable[Text], places: Sequence[str] | None = None) -> None:
    """Refuses texts that a model cannot read, before any is.

    Args:
        bounds: Of the policy.
        texts: As `fault` takes them, without padding.
        places: Where each stands, for the error; by default its number.

    Raises:
        DataError: the first such text, one line.

    >>> check(Bounds(vocab=3), [[0, 1], [2, 2]])
    """
    for number, text in enumerate(texts):
        if found := fault(bounds, text):
            place = places[number] if places is not None else f"text {number}"
            raise DataError(f"{place}: {found}")


def mark(
    hidden: Float[Array, "batch time width"],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "rows time"],
    attend: Bool[Array, "batch time time"] | None,
    bounds: Bounds,
) -> Float[Array, "batch time width"]:
    """Hidden states, NaN where they read a token or position outside the bounds.

    Padding that no token attends to spoils nothing but itself.

    Args:
        hidden: Of the tokens.
        tokens: Their ids.
        positions: Of each; one row serves the whole batch.
        attend: Which tokens each sees; None: itself and all before it.
        bounds: Of the policy.

    Returns:
        Like `hidden`.
    """
    vocab, longest = bounds
    outside = jnp.zeros(tokens.shape, bool)
    if vocab is not None:
        # A narrow dtype could not be compared with the bound.
        ids = tokens if tokens.dtype.itemsize >= 4 else tokens.astype(jnp.int32)
        outside = outside | (ids < 0) | (ids >= vocab)
    if longest is not None:
        outside = outside | (positions < 0) | (positions >= longest)
    if attend is None:
        seen = jnp.cumsum(outside, axis=1) > 0
    else:
        seen = (attend & outside[:, None]).any(axis=-1)
    return jnp.where(seen[..., None], jnp.nan, hidden)
