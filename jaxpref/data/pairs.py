"""Preferences as token ids: one text, one split, one BOS, and nothing cut in silence."""

import contextlib
import datetime
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpref.data import chat
from jaxpref.data.files import DataError, RowError, TextPair, TextRow
from jaxpref.data.rendering import Ends, Texts, ends_of, texts_of
from jaxpref.data.tokenizer import Tokenizer, split_ids

TooLong = Literal["error", "drop", "truncate_left"]


class TokenPair(NamedTuple):
    """One row as token ids, chosen first; of another kind of row, its one or its n responses.

    Attributes:
      tokens: ids of prompt + response (+ the end token), one array for each response.
      starts: index of the first response token in each, at least 1.
      merged: whether the prompt's end merged into the response, so that its own last token is not
        among ``tokens``.
      ends: how many tokens at the end of each close it and belong to no text of its own.
      index: the row's place among those that `encode` was given; -1 for a pair of other origin.
    """

    tokens: tuple[Int[np.ndarray, " time"], ...]
    starts: tuple[int, ...]
    merged: tuple[bool, ...]
    ends: tuple[int, ...] = (0, 0)
    index: int = -1


class Counts(NamedTuple):
    """What `encode` did.

    Attributes:
      kept: rows whose ids were returned.
      dropped: rows over a limit that were left out.
      truncated: rows whose prompt was cut.
      merged: responses whose boundary with the prompt merged.
      faults: a line for each row that was left out for a reason of its own, with its place.
    """

    kept: int
    dropped: int
    truncated: int
    merged: int
    faults: tuple[str, ...] = ()


def encode(
    rows: Sequence[TextRow],
    tokenizer: Tokenizer,
    *,
    end: int | str | None,
    prompt_limit: int | None = None,
    limit: int | None = None,
    too_long: TooLong = "error",
    bad: Literal["error", "drop"] = "error",
    date: datetime.date = chat.DATE,
) -> tuple[list[TokenPair], Counts]:
    """Token ids of every row, and the counts of what was dropped, cut or merged.

    Prompt and response are tokenised as one text and split at the common prefix (see
    `jaxpref.data.tokenizer.split_ids`). A prompt of messages goes through the chat template, and
    its response with it (see `jaxpref.data.rendering.texts_of`): BOS and the end of the turn are
    then the template's own. Before a text exactly one BOS stands where the model was trained with
    one.

    Args:
      rows: pairs, single examples or lists.
      tokenizer: the model's.
      end: what closes a response, and is scored with it, that neither its template has closed nor
        its own text: ``"eos"`` for the tokenizer's EOS, a token's id or its text (a chat model's
        end of turn may be another token), or None for nothing.
      prompt_limit: most tokens of a prompt, BOS included.
      limit: most tokens of prompt, response and end together.
      too_long: what happens to a row over a limit. ``"error"`` makes it a fault. ``"drop"`` leaves
        it out. ``"truncate_left"`` removes the prompt's first tokens, the same in all its
        sequences, but never the BOS. Responses are never cut.
      bad: what happens to a row with a fault of its own: ``"error"`` raises, ``"drop"`` leaves it
        out and names it in the counts.
      date: the day that a template is told that asks for one.

    Returns:
      The rows that are kept, and the counts: kept, dropped and faulty ones are all.

    Raises:
      RowError: under ``bad="error"`` a row over a limit under ``"error"``, or one that no cut of
        the prompt can save; a prompt or a response without a token; a pair of responses of the
        same ids; what `texts_of` refuses.
      DataError: ``"eos"`` where the tokenizer has none, or another `end` that it has not; messages
        where it has no template; no row without a fault.
    """
    if too_long not in ("error", "drop", "truncate_left"):
        expected = "'error', 'drop' or 'truncate_left'"
        raise ValueError(f"too_long is {too_long!r}, expected {expected}")
    if bad not in ("error", "drop"):
        raise ValueError(f"bad is {bad!r}, expected 'error' or 'drop'")
    faults: dict[int, str] = {}

    @contextlib.contextmanager
    def naming(number: int) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            text = f"{rows[number].place or f'row {number}'}: {error}"
            if bad == "error":
                raise RowError(text) from None
            faults[number] = text

    texts = _texts(rows, tokenizer, end, date, naming)
    closing = end_id(end, tokenizer)
    pairs, dropped, truncated = [], 0, 0
    for number, (one, ids) in _with_ids(texts, tokenizer).items():
        with naming(number):
            pair = _token_pair(one, ids, closing)._replace(index=number)
            if isinstance(rows[number], TextPair) and np.array_equal(
                pair.tokens[0], pair.tokens[1]
            ):
                raise RowError("chosen and rejected have the same token ids")
            excess = _excess(pair, prompt_limit, limit)
            if excess > 0 and too_long == "error":
                limits = f"prompt_limit={prompt_limit}, limit={limit}"
                raise RowError(f"prompt is {excess} tokens too long for {limits}")
            if excess > 0 and too_long == "drop":
                dropped += 1
                continue
            if excess > 0:
                pair = _without_first(pair, excess, tokenizer)
                truncated += 1
            pairs.append(pair)
    named = tuple(faults[number] for number in sorted(faults))
    if named and not pairs:
        raise DataError(f"no row is left with bad='drop'; the first: {named[0]}")
    merged = sum(sum(pair.merged) for pair in pairs)
    return pairs, Counts(len(pairs), dropped, truncated, merged, named)


def end_id(end: int | str | None, tokenizer: Tokenizer) -> int | None:
    """The id of what closes a response.

    Args:
      end: as in `encode`.
      tokenizer: the model's.

    Returns:
      The id, or None for nothing.

    Raises:
      DataError: the tokenizer has no such token.
    """
    if end == "eos":
        if tokenizer.eos_id is None:
            raise DataError("end is 'eos', but this tokenizer has none; expected a token or None")
        return tokenizer.eos_id
    if isinstance(end, str):
        found = tokenizer.backend.token_to_id(end)
        if found is None:
            raise DataError(f"end is {end!r}, expected 'eos', None or a token of this tokenizer")
        return found
    if end is not None and not 0 <= int(end) < tokenizer.vocab:
        raise DataError(f"end is {end!r}, expected 'eos', None or an id below {tokenizer.vocab}")
    return None if end is None else int(end)


def _texts(rows, tokenizer, end, date, naming) -> dict[int, Texts]:
    """The texts of each row without a fault, by its number."""
    chats = [row for row in rows if not isinstance(row.prompt, str)]
    for template, row in {tokenizer.template_for(row.tools): row for row in chats[::-1]}.items():
        if template is None:
            where = f"{row.place}: " if row.place else ""
            expected = "the prompt is a conversation, but the model has no chat template"
            raise DataError(f"{where}{expected}")
        chat.compiled(template)  # a broken one is the model's fault, not a row's
    closing = end_id(end, tokenizer)
    wanted = bool(chats) or closing is not None
    ends = ends_of(tokenizer, closing, is_eos=end == "eos", date=date) if wanted else Ends((), ())
    found = {}
    for number, row in enumerate(rows):
        with naming(number):
            found[number] = texts_of(row, tokenizer, ends, date)
    return found


def _with_ids(
    texts: dict[int, Texts], tokenizer: Tokenizer
) -> dict[int, tuple[Texts, list[list[int]]]]:
    """The ids of the prompt and of the wholes, of all rows at once: on several threads."""
    found: dict[int, list[list[int]]] = {}
    for is_chat in (False, True):
        some = {n: (x.prompt, *x.wholes) for n, x in texts.items() if x.is_chat == is_chat}
        bos = False if is_chat else None  # of a chat it is the template's
        ids = iter(tokenizer.encode_many([t for each in some.values() for t in each], bos=bos))
        found |= {number: [next(ids) for _ in each] for number, each in some.items()}
    return {number: (one, found[number]) for number, one in texts.items()}


def _token_pair(texts: Texts, ids: list[list[int]], end: int | None) -> TokenPair:
    prompt, *wholes = ids
    splits = [split_ids(whole, prompt) for whole in wholes]
    tokens, ends = [], []
    for split, closed in zip(splits, texts.closed, strict=True):
        adds = end is not None and not closed and split.tokens[-1] != end
        tokens.append(np.array([*split.tokens, end] if adds else split.tokens, np.int32))
        ends.append(int(closed or end is not None))
    starts, merged = zip(*((s.start, s.merged) for s in splits), strict=True)
    return TokenPair(tuple(tokens), starts, merged, tuple(ends))


def _excess(pair: TokenPair, prompt_limit: int | None, limit: int | None) -> int:
    """How many of its first tokens the prompt must lose; negative or zero when it fits."""
    over = [-1]
    if prompt_limit is not None:
        over.append(max(pair.starts) - prompt_limit)
    if limit is not None:
        over.append(max(map(len, pair.tokens)) - limit)
    return max(over)


def _without_first(pair: TokenPair, count: int, tokenizer: Tokenizer) -> TokenPair:
    head = int(pair.tokens[0][0] == tokenizer.bos_id)
    if min(pair.starts) - count <= head:
        longest = max(len(t) - s for t, s in zip(pair.tokens, pair.starts, strict=True))
        raise RowError(f"no cut of the prompt fits a response of {longest} tokens")
    tokens = tuple(np.concatenate([t[:head], t[head + count :]]) for t in pair.tokens)
    return pair._replace(tokens=tokens, starts=tuple(start - count for start in pair.starts))


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
