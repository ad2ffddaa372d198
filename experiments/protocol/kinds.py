"""Responses of other kinds beside chosen and rejected, and what the model says itself."""

import re

import jax
import numpy as np
from jaxtyping import PyTree

from jaxpref.data.pairs import TokenPair
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import sampling
from jaxpref.training.pairset import PairSet

KINDS = ("greedy", "sampled", "another prompt's", "shuffled", "random words", "rejected, shuffled")
"""The model's own answers at the start, the chosen response to another prompt, the chosen one with
its sentences (or else its words) in another order, as many random tokens, and the rejected one with
its sentences in another order."""

LONGEST = 64  # tokens of an answer


def say(pairs: PairSet, params: PyTree, rows: np.ndarray, tokenizer: Tokenizer, *,
        temperature: float, seed: int) -> list[np.ndarray]:  # fmt: skip
    """Token ids of the model's answer to each prompt, with its end token if it came to one."""
    prompts = [pairs.pairs[row].tokens[0][: pairs.pairs[row].starts[0]] for row in rows]
    width = max(map(len, prompts))
    tokens, real = np.zeros((2, len(rows), width), np.int32)
    for i, ids in enumerate(prompts):
        tokens[i, width - len(ids) :], real[i, width - len(ids) :] = ids, 1
    stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    found = sampling.sample(
        pairs.policy, params, tokens, real.astype(bool), max_new=LONGEST, key=jax.random.key(seed),
        temperature=temperature, stop_ids=stop, rows=np.asarray(rows),
    )  # fmt: skip
    return [np.asarray(t)[np.asarray(m)] for t, m in zip(*found[:2], strict=True)]


def probes(
    pairs: PairSet, params: PyTree, rows: np.ndarray, tokenizer: Tokenizer, seed: int
) -> PairSet:
    """The responses of `KINDS` to these prompts, two to a row of the set, kind by kind.

    Rows come in the order ``[kinds / 2, rows]``.
    """
    rng = np.random.default_rng([seed, 17])
    chosen = [pairs.pairs[row] for row in rows]
    answers = [[pair.tokens[side][pair.starts[side] :] for pair in chosen] for side in (0, 1)]
    closed = [[pair.ends[side] for pair in chosen] for side in (0, 1)]
    by_kind = [
        say(pairs, params, rows, tokenizer, temperature=0.0, seed=seed),
        say(pairs, params, rows, tokenizer, temperature=1.0, seed=seed),
        [answers[0][i - 1] for i in range(len(rows))],
        *([made_of(ids, end, tokenizer, rng)
           for ids, end in zip(answers[side], closed[side], strict=True)]
          for side, made_of in ((0, _shuffled), (0, _random), (1, _shuffled))),
    ]  # fmt: skip
    made = []
    for first, second in zip(by_kind[::2], by_kind[1::2], strict=True):
        for pair, one, other in zip(chosen, first, second, strict=True):
            prompt = pair.tokens[0][: pair.starts[0]]
            both = tuple(np.concatenate([prompt, ids]).astype(np.int32) for ids in (one, other))
            made.append(TokenPair(both, (len(prompt),) * 2, (False, False)))
    return PairSet.of(pairs.policy, made)


def _shuffled(ids: np.ndarray, end: int, tokenizer: Tokenizer, rng: np.random.Generator
              ) -> np.ndarray:  # fmt: skip
    """A text's sentences in another order, or its words if it has only one; closed as before."""
    body = ids[: len(ids) - end]
    text = tokenizer.decode(body.tolist())
    parts = re.findall(r"\s*\S.*?(?:[.!?](?=\s|$)|$)", text, re.DOTALL)
    if len(parts) < 2:
        parts = re.findall(r"\s*\S+", text)
    order = np.roll(np.arange(len(parts)), 1 + int(rng.integers(max(len(parts) - 1, 1))))
    mixed = "".join(parts[i] for i in order)
    return np.concatenate([np.array(tokenizer.encode(mixed, bos=False), np.int32),
                           ids[len(ids) - end :]])  # fmt: skip


def _random(ids: np.ndarray, end: int, tokenizer: Tokenizer, rng: np.random.Generator
            ) -> np.ndarray:  # fmt: skip
    """As many tokens, drawn from all."""
    drawn = rng.integers(tokenizer.vocab, size=len(ids) - end)
    return np.concatenate([drawn.astype(np.int32), ids[len(ids) - end :]])
