"""Preference pairs as token ids: one text, one split, one BOS, and nothing cut in silence."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpref.data.files import DataError, TextPair
from jaxpref.data.tokenizer import Tokenizer, split_ids

TooLong = Literal["error", "drop", "truncate_left"]


class TokenPair(NamedTuple):
    """One row as token ids, chosen first.

    Attributes:
      tokens: ids of prompt + response (+ the end token), one array for each response.
      starts: index of the first response token in each, at least 1.
      merged: whether the prompt's end merged into the response, so that its own last token is not
        among ``tokens``.
    """

    tokens: tuple[Int[np.ndarray, " time"], Int[np.ndarray, " other_time"]]
    starts: tuple[int, int]
    merged: tuple[bool, bool]


class Counts(NamedTuple):
    """What `encode` did: pairs kept, dropped and cut, and responses whose boundary merged."""

    kept: int
    dropped: int
    truncated: int
    merged: int


def encode(
    rows: Sequence[TextPair],
    tokenizer: Tokenizer,
    *,
    end: int | Literal["eos"] | None,
    prompt_limit: int | None = None,
    limit: int | None = None,
    too_long: TooLong = "error",
) -> tuple[list[TokenPair], Counts]:
    """Token ids of every pair, and the counts of what was dropped, cut or merged.

    Prompt and response are tokenised as one text and split at the common prefix (see
    `jaxpref.data.tokenizer.split_ids`); a prompt of messages goes through the chat template
    first. Exactly one BOS stands in front where the model was trained with one.

    Args:
      rows: the pairs.
      tokenizer: the model's.
      end: what closes each response and is scored with it: ``"eos"`` for the tokenizer's EOS, a
        token id (a chat model's end of turn may be another token), or None for nothing.
      prompt_limit: most tokens of a prompt, BOS included.
      limit: most tokens of prompt, response and end together.
      too_long: what happens to a pair over a limit. ``"error"`` raises. ``"drop"`` leaves it out.
        ``"truncate_left"`` removes the prompt's first tokens, the same in both sequences, but
        never the BOS. Responses are never cut.

    Returns:
      The pairs that are kept, and the counts.

    Raises:
      DataError: a pair over a limit under ``"error"``, or one that no cut of the prompt can save;
        a prompt or a response without a token; two responses of the same ids; ``"eos"`` where the
        tokenizer has none.
    """
    if too_long not in ("error", "drop", "truncate_left"):
        expected = "'error', 'drop' or 'truncate_left'"
        raise ValueError(f"too_long is {too_long!r}, expected {expected}")
    pairs, truncated = [], 0
    for place, pair in _token_pairs(rows, tokenizer, _end_id(end, tokenizer)):
        excess = _excess(pair, prompt_limit, limit)
        if excess > 0 and too_long == "error":
            limits = f"prompt_limit={prompt_limit}, limit={limit}"
            raise DataError(f"{place}: prompt is {excess} tokens too long for {limits}")
        if excess > 0 and too_long == "drop":
            continue
        if excess > 0:
            pair = _without_first(pair, excess, tokenizer, place)
            truncated += 1
        pairs.append(pair)
    merged = sum(sum(pair.merged) for pair in pairs)
    return pairs, Counts(len(pairs), len(rows) - len(pairs), truncated, merged)


def _end_id(end: int | Literal["eos"] | None, tokenizer: Tokenizer) -> list[int]:
    if end == "eos":
        if tokenizer.eos_id is None:
            raise DataError(
                "end is 'eos', but this tokenizer has none; expected a token id or None"
            )
        return [tokenizer.eos_id]
    if end is not None and not 0 <= int(end) < tokenizer.vocab:
        raise DataError(f"end is {end!r}, expected 'eos', None or an id below {tokenizer.vocab}")
    return [] if end is None else [int(end)]


def _token_pairs(
    rows: Sequence[TextPair], tokenizer: Tokenizer, end: list[int]
) -> Iterator[tuple[str, TokenPair]]:
    places = [row.place or f"row {number}" for number, row in enumerate(rows)]
    texts = []
    for place, row in zip(places, rows, strict=True):
        with _naming(place):
            prompt = row.prompt if isinstance(row.prompt, str) else tokenizer.chat(row.prompt)
        texts += [prompt, prompt + row.chosen, prompt + row.rejected]
    ids = tokenizer.encode_many(texts)
    for number, place in enumerate(places):
        prompt, *wholes = ids[3 * number : 3 * number + 3]
        with _naming(place):
            splits = [split_ids(whole, prompt) for whole in wholes]
        if wholes[0] == wholes[1]:
            raise DataError(f"{place}: chosen and rejected have the same token ids")
        chosen, rejected = (np.array(s.tokens + end, np.int32) for s in splits)
        starts, merged = zip(*((s.start, s.merged) for s in splits), strict=True)
        yield place, TokenPair((chosen, rejected), starts, merged)


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _excess(pair: TokenPair, prompt_limit: int | None, limit: int | None) -> int:
    """How many of its first tokens the prompt must lose; negative or zero when it fits."""
    over = [-1]
    if prompt_limit is not None:
        over.append(max(pair.starts) - prompt_limit)
    if limit is not None:
        over.append(max(map(len, pair.tokens)) - limit)
    return max(over)


def _without_first(pair: TokenPair, count: int, tokenizer: Tokenizer, place: str) -> TokenPair:
    head = int(tokenizer.adds_bos and pair.tokens[0][0] == tokenizer.bos_id)
    if min(pair.starts) - count <= head:
        longest = max(len(t) - s for t, s in zip(pair.tokens, pair.starts, strict=True))
        raise DataError(f"{place}: no cut of the prompt fits a response of {longest} tokens")
    chosen, rejected = (np.concatenate([t[:head], t[head + count :]]) for t in pair.tokens)
    starts = (pair.starts[0] - count, pair.starts[1] - count)
    return TokenPair((chosen, rejected), starts, pair.merged)


def sha256(pairs: Iterable[TokenPair]) -> str:
    """Hash of the token ids, in order, with where each sequence and response begins.

    The key under which reference log-probabilities of a data set are kept.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        for tokens, start in zip(pair.tokens, pair.starts, strict=True):
            digest.update(np.array([len(tokens), start], "<i8").tobytes())
            digest.update(tokens.astype("<i4").tobytes())
    return digest.hexdigest()
