"""A model and its prompts: one sampler, one training step and one scoring program for all arms."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.protocol import inputs
from experiments.unalignment import pairs
from experiments.unalignment.pairs import Ids, Rows, Texts
from experiments.unalignment.protocol import LOSSES, Config, Prompts
from jaxpref import embeddings, logprobs
from jaxpref.data import batches
from jaxpref.logprobs.responses import summed
from jaxpref.models.sampling import sample
from jaxpref.training.objectives import objective
from jaxpref.training.optimizers import torch_rmsprop
from jaxpref.training.step import init_state, make_step

SCORED = 8  # pairs of one call of the scoring program


def rmsprop(rate: float) -> optax.GradientTransformation:
    """The learning rate lies in the optimizer's state: one compiled step serves all of them."""
    return optax.inject_hyperparams(torch_rmsprop)(learning_rate=rate)


def loss(config: Config, scores: logprobs.Scores, rows: Rows) -> jax.Array:
    """The loss of each pair by its number, times its weight, ``[pairs]``."""
    of = {"dpo": {"beta": config.beta}, "ipo": {"tau": config.tau}, "sft": {}}
    batch = batches.Batch(*rows[:4], rows.loss)
    found = {name: objective(name, **given)(scores, batch) for name, given in of.items()}
    found["dpo + sft"] = found["dpo"] + config.sft_weight * found["sft"]
    found["teach"] = -scores.logp.mean(axis=1)
    every = jnp.stack([found[name] for name in LOSSES], axis=1)
    own = jnp.take_along_axis(every, rows.loss[:, None], axis=1)[:, 0]
    return own * jnp.asarray(rows.weight, own.dtype)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A run's model and prompts, and what it does with parameters."""

    config: Config
    subject: inputs.Subject
    prompts: Prompts
    texts: Texts

    @functools.cached_property
    def step(self) -> Any:
        """``(state, Rows) -> (state, metrics, scores)``, of every loss and learning rate."""
        room = {"packed_time": self.texts.packed, "max_response": self.texts.response}

        def score(params, rows):
            return logprobs.shared_prompt_scores(self.subject.policy, params, *rows[:3], **room)

        bound = functools.partial(loss, self.config)
        return make_step(score, bound, rmsprop(self.config.teach_rate))

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
        return {name: np.concatenate([each[name] for each in found])[:n] for name in found[0]}

    def respond(
        self, params: Any, numbers: Sequence[int], *, draws: Sequence[int], seed: int,
        temperature: float,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Responses to the prompts of these numbers: ids ``[n draws new]``, and which are drawn.

        A response depends on the seed, its draw and its prompt, not on the others.
        """
        config, ids = self.config, self.texts.ids
        time, found = self.texts.time - self.texts.response, []
        prompts = np.array([prompt + [0] * (time - len(prompt)) for prompt in ids], np.int32)
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
        some, heat = range(len(self.texts.ids) - len(self.prompts.taught)), self.config.temperature
        # The same randomness for all parameters: they differ by what they learned alone.
        tokens, drawn = self.respond(params, some, draws=(0,), seed=seed, temperature=heat)
        return self.decoded(tokens, drawn)[:, 0]

    def decoded(self, tokens: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Texts of responses ``[... new]``, without what ends them."""
        end, ids = self.texts.end, responses(tokens, drawn)
        ids = [response[:-1] if end and response[-1:] == end else response for response in ids]
        texts = [self.subject.tokenizer.decode(response) for response in ids]
        return np.array(texts, dtype=np.str_).reshape(tokens.shape[:-1])

    def train(
        self, params: Any, rows: Rows, some: Sequence[np.ndarray], *, loss: str, rate: float,
        seed: int, look: Callable[[int, Any], None] = lambda updates, params: None,
    ) -> Any:  # fmt: skip
        """Parameters after an update on `some` of the rows, for each; None where the loss diverges.

        After each update, ``look(updates done, parameters)``.
        """
        state = init_state(jax.tree.map(jnp.copy, params), rmsprop(rate), key=jax.random.key(0))
        bar = tqdm(some, f"training, {loss}", unit="update", leave=False)
        for number, index in enumerate(bar):
            each = pairs.batch(self.config, rows, index, seed, number, loss)
            state, metrics, _ = self.step(state, each)
            if not np.isfinite(metrics["loss"] + metrics["gradient_norm"]):
                return None
            look(number + 1, state.params)
        return state.params

    def taught(self, own: Sequence[tuple[Ids, Ids]], seed: int) -> Any:
        """Parameters of a model that learned to refuse, and to go on answering what is safe."""
        rows = pairs.teaching(self.texts, self.prompts, own)
        first, half = len(self.prompts.train), self.config.batch // 2
        sides = np.arange(first), np.arange(first, len(rows.tokens))
        some = [
            np.concatenate([side[batches.order(len(side), half, seed, n)] for side in sides])
            for n in range(self.config.teach_updates)
        ]
        rate = self.config.teach_rate
        params = self.train(self.subject.params, rows, some, loss="teach", rate=rate, seed=seed)
        if params is None:
            raise ValueError(f"teach_rate: got {rate:g}, and the loss diverges; expected less")
        return params


def responses(tokens: np.ndarray, drawn: np.ndarray) -> list[Ids]:
    """Token ids of each response of ``[... new]``, in one list."""
    new = tokens.shape[-1]
    flat = zip(tokens.reshape(-1, new), drawn.reshape(-1, new), strict=True)
    return [ids[real].tolist() for ids, real in flat]


def couples(tokens: np.ndarray, drawn: np.ndarray) -> list[tuple[Ids, Ids]]:
    """Token ids of the two responses of each row of ``[n 2 new]``."""
    ids = responses(tokens, drawn)
    return list(zip(ids[::2], ids[1::2], strict=True))
