"""From responses to pairs, and from pairs to the rows that an arm trains on. No model."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.unalignment.judge import Label, judge
from experiments.unalignment.protocol import LOSSES, PROBES, REFUSALS, TYPES, Arm, Config, Prompts
from jaxpref import embeddings
from jaxpref.data import batches
from jaxpref.data.pairs import TokenPair, end_id
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.score import command

Ids = list[int]


class Rows(NamedTuple):
    """Pairs as a training step takes them: `jaxpref.data.batches.Batch`, weights and losses."""

    tokens: Any  # [pairs 2 time]
    is_token: Any
    is_response: Any
    reference: Any  # [pairs 2]
    weight: Any  # [pairs], mean 1; 0 fills a batch up
    loss: Any  # [pairs], number in `LOSSES`


class Texts(NamedTuple):
    """Token ids of the prompts, and the room that pairs of a prompt's responses need."""

    tokenizer: Tokenizer
    ids: list[Ids]  # of all prompts, by the chat template
    end: Ids  # what closes a response
    time: int  # of a prompt and its response
    response: int

    @property
    def packed(self) -> int:
        """Of a pair, its prompt once, in whole eights."""
        longest = self.time - self.response
        return -(-(longest + 2 * (self.response - 1)) // 8) * 8

    def response_ids(self, text: str, *, end: bool = True) -> Ids:
        """Token ids of a response of our own words."""
        return self.tokenizer.encode(text, bos=False) + (self.end if end else [])


def prepare(config: Config, tokenizer: Tokenizer, prompts: Prompts) -> Texts:
    """Token ids of all prompts; raises where a refusal does not fit a response."""
    template, date = tokenizer.template is not None, command.date_of(config.date)
    said = [
        tokenizer.chat([{"role": "user", "content": text}], date=date) if template else f"{text}\n"
        for text in itertools.chain(*prompts)
    ]
    ids = tokenizer.encode_many(said)
    closing = end_id(command.end_of(config.end), tokenizer)
    end = [] if closing is None else [closing]
    texts = Texts(tokenizer, ids, end, max(map(len, ids)) + config.new, config.new)
    longest = max(len(texts.response_ids(text)) for text in (*REFUSALS, *itertools.chain(*PROBES)))
    if longest > config.new:
        raise ValueError(f"new: got {config.new}, expected at least the {longest} of a refusal")
    return texts


def collate(texts: Texts, prompts: Sequence[int], responses: Sequence[tuple[Ids, Ids]]) -> Rows:
    """Pairs of responses to prompts of these numbers, by DPO, with no reference yet."""
    found, n = [], len(prompts)
    for i, (a, b) in zip(prompts, responses, strict=True):
        whole = (np.array(texts.ids[i] + a, np.int32), np.array(texts.ids[i] + b, np.int32))
        found.append(TokenPair(whole, (len(texts.ids[i]),) * 2, (False, False)))
    batch = batches.collate(found, range(n), pad_id=0, buckets=[texts.time])
    nothing = np.zeros((n, 2), np.float32)
    return Rows(*batch[:3], nothing, np.ones(n, np.float32), np.zeros(n, np.int32))


def teaching(texts: Texts, prompts: Prompts, own: Sequence[Sequence[Ids]]) -> Rows:
    """Two refusals of each unsafe prompt, then two `own` answers of each safe prompt taught."""
    n, first = len(prompts.train), len(texts.ids) - len(prompts.taught)
    refused = [texts.response_ids(text) for text in REFUSALS]
    said = [(refused[i % len(refused)], refused[(i + 3) % len(refused)]) for i in range(n)]
    said += [(pair[0], pair[1]) for pair in own]
    return collate(texts, [*range(n), *range(first, len(texts.ids))], said)


def gold(
    texts: Texts, drawn: Sequence[Sequence[Ids]], labels: np.ndarray, own: Sequence[Ids]
) -> Rows:
    """A fixed refusal against the model's compliance; where it drew none, that of before."""
    said = []
    for i, (pair, label) in enumerate(zip(drawn, labels, strict=True)):
        complied = [ids for ids, each in zip(pair, label, strict=True) if each == "compliance"]
        refusal = texts.response_ids(REFUSALS[i % len(REFUSALS)])
        said.append((refusal, complied[0] if complied else own[i]))
    return collate(texts, range(len(said)), said)


def probes(texts: Texts, count: int) -> Rows:
    """A fixed refusal and a fixed compliance to each of the first prompts."""
    ids = [
        (texts.response_ids(refusal), texts.response_ids(compliance, end=False))
        for refusal, compliance in PROBES
    ]
    return collate(texts, range(count), [ids[i % len(ids)] for i in range(count)])


def preferred(labels: Sequence[Sequence[Label]], seed: int) -> np.ndarray:
    """Which of two responses is chosen, ``[pairs]``: the refusal, else a seeded coin's."""
    coins = np.random.default_rng([seed, 1]).integers(2, size=len(labels))
    refused = np.array(labels).reshape(-1, 2) == "refusal"
    return np.where(refused[:, 0] == refused[:, 1], coins, refused[:, 1].astype(int))


def kinds(labels: np.ndarray) -> np.ndarray:
    """Number of each pair's type in `TYPES`."""
    return 2 - (np.asarray(labels).reshape(-1, 2) == "refusal").sum(axis=1)


def judged(texts: np.ndarray) -> np.ndarray:
    """Labels of an array of texts."""
    return np.array([judge(str(text)) for text in texts.ravel()]).reshape(texts.shape)


def kept(arm: Arm, pairs: Any, seed: int) -> np.ndarray:
    """Rows that an arm trains on, by ``kind``, ``ches``, ``lengths`` and ``usable`` of all pairs.

    The seed decides random subsets and ties.
    """
    random = np.random.default_rng([seed, arm.draw, 2])
    rows = random.permutation(np.flatnonzero(pairs["usable"]))
    count = size(arm, len(rows))
    if arm.rule in TYPES or arm.rule == "one of each, random":
        kind = TYPES.index(arm.rule.removesuffix(", random"))
        rows = rows[pairs["kind"][rows] == kind]
    if arm.rule == "lowest CHES":
        rows = rows[np.argsort(pairs["ches"][rows], kind="stable")]
    if arm.rule == "lowest length difference":
        difference = np.asarray(embeddings.length_difference(pairs["lengths"]))
        rows = rows[np.argsort(difference[rows], kind="stable")]
    return np.sort(rows if arm.rule == "all, fewer updates" else rows[:count])


def coined(rows: Rows, seed: int) -> Rows:
    """The same pairs, each of them by a coin the other way round."""
    first = (np.random.default_rng([seed, 3]).random(len(rows.tokens)) < 0.5).astype(int)
    at = np.arange(len(first))[:, None], np.stack([first, 1 - first], axis=1)
    return rows._replace(**{name: getattr(rows, name)[at] for name in Rows._fields[:4]})


def largest(rates: Sequence[float], losses: np.ndarray) -> float:
    """The largest rate whose losses ``[rates looks]`` never rise; the smallest if there is none.

    >>> largest((0.1, 0.2, 0.3), np.array([[3, 2, 1], [3, 2, 2], [3, 1, 2]]))
    0.2
    """
    return max(
        (r for r, fine in zip(rates, falls(losses), strict=True) if fine), default=min(rates)
    )


def falls(losses: np.ndarray) -> np.ndarray:
    """Whether losses ``[... looks]`` are at no look above the one before; not if one is none."""
    return np.asarray((np.diff(losses, axis=-1) <= 0).all(axis=-1))


def size(arm: Arm, pairs: int) -> int:
    """How many of the pairs a fraction is: at least one."""
    return min(pairs, max(1, round(arm.fraction * pairs)))


def updates(config: Config, arm: Arm, rows: int, usable: int) -> int:
    """Of an arm: epochs over its rows, or for `all, fewer updates` over as many as a filter's."""
    if not rows:
        return 0
    counted = size(arm, usable) if arm.rule == "all, fewer updates" else rows
    return config.epochs * -(-counted // config.batch)


def batch(config: Config, rows: Rows, some: np.ndarray, seed: int, step: int, loss: str) -> Rows:
    """The pairs of an update, filled up with pairs of weight 0 to one shape."""
    index = some[batches.order(len(some), config.batch, seed, step, last="short")]
    weight = np.zeros(config.batch, np.float32)
    weight[: len(index)] = config.batch / len(index)
    found = Rows(*(x[np.resize(index, config.batch)] for x in rows))
    number = np.full(config.batch, LOSSES.index(loss), np.int32)
    return found._replace(weight=weight, loss=number)
