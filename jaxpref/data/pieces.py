"""SentencePiece vocabularies of GGUF files, read as a BPE with byte fallback.

A SentencePiece BPE joins, again and again, the two neighbours whose union is the piece of the
highest score; ties go to the left. Its merges are thus all ways to cut a piece into two others, the
piece of the higher score first. Spaces are written as U+2581, and one is put in front of a text and
after each added token unless the file says otherwise. A character without a piece becomes its UTF-8
bytes.

Source: the tokenizer ``llama`` of llama.cpp; Kudo & Richardson (2018),
https://arxiv.org/abs/1808.06226
"""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

PIECES = "llama"  # `tokenizer.ggml.model`
_SPACE = "\u2581"


def pieces(
    tokens: Sequence[str], scores: Sequence[float], unknown: str | None, *, prefix: bool
) -> tokenizers.Tokenizer:
    """A tokenizer of scored pieces, without its added tokens.

    Args:
        tokens: All of them; ``<0x00>`` to ``<0xFF>`` are bytes.
        scores: Of each; higher merges first.
        unknown: The token for what has neither a piece nor bytes.
        prefix: Whether a text begins with a space that is not its own.

    Returns:
        A backend for `jaxpref.data.tokenizer.Tokenizer`.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=ids,
        merges=merges(tokens, scores),
        unk_token=unknown,
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    front = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*front, spaces])
    shown = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(shown + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All cuts of a piece into two others, the piece of the highest score first.

    Args:
        tokens: The pieces.
        scores: Of each.

    Returns:
        Pairs of pieces, as a BPE wants its merges.

    >>> merges(["a", "b", "ab", "aba"], [0.0, 0.0, -2.0, -1.0])
    [('ab', 'a'), ('a', 'b')]
    """
    known = set(tokens)
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    return [
        (tokens[i][:cut], tokens[i][cut:])
        for i in order
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in known and tokens[i][cut:] in known
    ]
