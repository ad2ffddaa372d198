"""A model and its prompts: one sampler, one training step and one scoring program for all arms."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import common
from experiments.unalignment import pairs
from experiments.unalignment.pairs import Ids, Rows, Texts
from experiments.unalignment.protocol import Config, Prompts
from jaxpref import embeddings, logprobs, losses
from jaxpref.data import batches
from jaxpref.logprobs.responses import summed
from jaxpref.models.sampling import sample
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import init_state, make_step

SCORED = 8  # pairs of one call of the scoring program


def rmsprop(rate: float) -> optax.GradientTransformation:
    """The learning rate lies in the optimizer's state: one compiled step serves all of them."""
    return optax.inject_hyperparams(torch_rmsprop)(learning_rate=rate)


def loss(config: Config, scores: logprobs.Scores, rows: Rows) -> jax.Array:
    """The loss of each pair by its number, times its weight, ``[pairs]``."""
    reference = jnp.asarray(rows.reference, scores.logp.dtype)
    dpo = losses.dpo(scores.logp, reference, beta=config.beta)
    nats = losses.sft(scores.logp)
    every = [
        dpo,
        losses.ipo(scores.logp, reference, tau=config.tau),
        dpo + config.sft_weight * nats[:, 0],
        nats.mean(axis=1),
    ]
    own = jnp.take_along_axis(jnp.stack(every, axis=1), rows.loss[:, None], axis=1)[:, 0]
    return own * jnp.asarray(rows.weight, own.dtype)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A run's model and prompts, and what it does with parameters."""

    config: Config
    subject: common.Subject
    prompts: Prompts
    texts: Texts

    @functools.cached_property
    def step(self) -> Any:
        """``(state, Rows) -> (state, metrics, scores)``, of every loss and learning rate."""
        room = {"packed_time": self.texts.packed, "max_response": self.texts.response}

        def score(params, rows):
            return logprobs.shared_prompt_scores(self.subject.policy, params, *rows[:3], **room)

        bound = functools.partial(loss, self.config)
        return make_step(score, bound, rmsprop(self.config.rate))

    @functools.cached_property
    def _measure(self) -> Any:
        policy, texts = self.subject.policy, self.texts

        def measure(params, rows):
            found = logprobs.shared_prompt_hidden(
                policy, params, *rows[:3], packed_time=texts.packed, max_response=texts.response
            )
            head = policy.unembedding(params)
            each = logprobs.token_logprobs_chunked(found.hidden, head, found.targets)
            scores = summed(found, each)
            ches = embeddings.ches_length_normalised(found.hidden, found.is_target)
            return {"logp": scores.logp, "lengths": scores.lengths, "ches": ches}

        return jax.jit(measure)

    def scores(self, params: Any, rows: Rows) -> dict[str, np.ndarray]:
        """``logp``, ``lengths [pairs 2]`` and length-normalised ``ches [pairs]``."""
        n, found = len(rows.tokens), []
        for begin in range(0, n, SCORED):
            index = np.resize(np.arange(begin, min(n, begin + SCORED)), SCORED)
            found.append(self._measure(params, Rows(*(x[index] for x in rows))))
        return {
            name: np.concatenate([np.asarray(each[name]) for each in found])[:n]
            for name in found[0]
        }

    def respond(
        self,
        params: Any,
        numbers: Sequence[int],
        *,
        draws: Sequence[int],
        seed: int,
        temperature: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Responses to the prompts of these numbers: ids ``[n draws new]``, and which are drawn.

        A response depends on the seed, its draw and its prompt, not on the others.
        """
        config, ids = self.config, self.texts.ids
        time, found = self.texts.time - self.texts.response, []
        prompts = np.zeros((len(ids), time), np.int32)
        for row, prompt in zip(prompts, ids, strict=True):
            row[: len(prompt)] = prompt
        real = np.arange(time) < np.array([[len(prompt)] for prompt in ids])
        wanted = (np.array(numbers)[:, None] + len(ids) * np.array(draws)[None]).ravel()
        for begin in range(0, len(wanted), config.rows):
            rows = np.resize(wanted[begin : begin + config.rows], config.rows)
            index = rows % len(ids)
            drawn = sample(
                self.subject.policy, params, prompts[index], real[index], max_new=config.new,
                key=jax.random.key(seed), temperature=temperature, stop_ids=self.texts.end,
                rows=rows,
            )  # fmt: skip
            found.append((np.asarray(drawn.tokens), np.asarray(drawn.is_token)))
        tokens, drawn = (np.concatenate(x)[: len(wanted)] for x in zip(*found, strict=True))
        shape = len(numbers), len(draws), config.new
        return tokens.reshape(shape), drawn.reshape(shape)

    def said(self, params: Any, seed: int) -> np.ndarray:
        """What the model says to all prompts but those taught, as texts, ``[prompts]``."""
        count = len(self.texts.ids) - len(self.prompts.taught)
        # The same randomness for all parameters: they differ by what they learned alone.
        tokens, drawn = self.respond(
            params, range(count), draws=(0,), seed=seed, temperature=self.config.temperature
        )
        return self.decoded(tokens, drawn)[:, 0]

    def decoded(self, tokens: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Texts of responses ``[... new]``, without what ends them."""
        end, ids = self.texts.end, responses(tokens, drawn)
        ids = [response[:-1] if end and response[-1:] == end else response for response in ids]
        texts = [self.subject.tokenizer.decode(response) for response in ids]
        return np.array(texts, dtype=np.str_).reshape(tokens.shape[:-1])

    def train(
        self, params: Any, rows: Rows, some: Any, *, loss: str, rate: float, updates: int, seed: int
    ) -> Any:
        """Parameters after so many updates on some of the rows."""
        state = init_state(jax.tree.map(jnp.copy, params), rmsprop(rate), key=jax.random.key(0))
        for number in tqdm(range(updates), f"training, {loss}", unit="update", leave=False):
            each = pairs.batch(self.config, rows, some(number), seed, number, loss)
            state, metrics, _ = self.step(state, each)
            if not np.isfinite(metrics["loss"] + metrics["gradient_norm"]):
                raise ValueError(f"rate: got {rate:g}, and {loss} is not finite; expected less")
        return state.params

    def taught(self, own: Sequence[tuple[Ids, Ids]], seed: int) -> Any:
        """Parameters of a model that learned to refuse, and to go on answering what is safe."""
        rows = pairs.teaching(self.texts, self.prompts, own)
        first, half = len(self.prompts.train), self.config.batch // 2
        sides = np.arange(first), np.arange(first, len(rows.tokens))

        def some(number: int) -> np.ndarray:
            picked = [side[batches.order(len(side), half, seed, number)] for side in sides]
            return np.concatenate(picked)

        return self.train(
            self.subject.params, rows, some, loss="teach", rate=self.config.teach_rate,
            updates=self.config.teach_updates, seed=seed,
        )  # fmt: skip


def responses(tokens: np.ndarray, drawn: np.ndarray) -> list[Ids]:
    """Token ids of each response of ``[... new]``, in one list."""
    new = tokens.shape[-1]
    flat = zip(tokens.reshape(-1, new), drawn.reshape(-1, new), strict=True)
    return [ids[real].tolist() for ids, real in flat]


def couples(tokens: np.ndarray, drawn: np.ndarray) -> list[tuple[Ids, Ids]]:
    """Token ids of the two responses of each row of ``[n 2 new]``."""
    ids = responses(tokens, drawn)
    return list(zip(ids[::2], ids[1::2], strict=True))
