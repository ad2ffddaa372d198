"""The losses, the settings, and the pairs they are shown."""

import dataclasses
from typing import Literal

import numpy as np
import optax

from experiments import common, pulling
from jaxpref.training.optimizers import torch_rmsprop

# (scores, batch) -> [pairs]; hyperparameters as in the papers or their code. `sft` is a control:
# it never looks at the rejected response.
LOSSES: dict[str, pulling.Loss] = {
    name: pulling.LOSSES[name]
    for name in (
        *("dpo", "cdpo", "robust_dpo", "r_dpo", "hinge", "ipo", "ipo_length_normalised", "dpop"),
        *("sppo", "simpo", "slic_hf", "cpo", "cpo_token_mean", "rrhf", "orpo", "sft"),
    )
}
OPTIMIZERS = {"adam": optax.adam, "rmsprop": torch_rmsprop, "sgd": optax.sgd}


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the numbers."""

    losses: tuple[str, ...] = (
        "dpo", "ipo", "simpo", "dpop", "sppo", "slic_hf", "cpo_token_mean", "orpo", "sft",
    )  # fmt: skip
    """Names of `LOSSES`."""
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    """None of them clips the gradient or decays weights."""
    rate: float = 5e-6
    """Learning rate, of all losses."""
    steps: int = 10
    """Updates of a loss."""
    batch: int = 4
    """Pairs of an update."""
    looks: int = 4
    """Moments of measurement after the start, denser early on; the last is the end."""
    pairs: int = 12
    """Trained on; every seed draws others."""
    held_out: int = 6
    """Only measured."""
    probes: int = 4
    """Of the training pairs, those whose Gram matrices are taken."""
    seeds: int = 2
    """Each draws pairs, and their order."""
    margin: float | None = None
    """Nats of training margin at which losses are compared; by default what 3 of 4 runs reach."""
    supervised: int = 0
    """Updates on the training pairs' chosen responses before, by the same optimizer."""
    supervised_rate: float = 1e-3
    limit: int = 96
    """Most tokens of prompt and response: longer prompts lose their beginning, and a pair whose
    responses leave no room cannot be used."""
    model: str | None = None
    """A Hugging Face folder or a GGUF file, or `small` for a random decoder; by default SmolLM2."""
    data: str | None = None
    """A JSONL file of pairs or of HH-RLHF, also packed (.gz); by default the shipped pairs."""
    bad: common.Bad = "error"
    """A row of the data that cannot be used: an error, or left out, counted and named."""
    columns: str = ""
    """The data's own names of columns, ``chosen=good,rejected=bad``."""
    end: str = "none"
    """What closes a response that neither its template nor its text closes: a token's text or id,
    ``eos``, or ``none``."""
    date: str = common.DATE
    """Today, for a chat template that asks."""


SMOKE = Config(
    losses=("dpo", "simpo", "sft"), steps=3, batch=2, looks=2, pairs=4, held_out=2,
    probes=2, seeds=2,
)  # fmt: skip


def look_steps(config: Config) -> list[int]:
    """Updates done at each look, 0 first: about evenly spaced in the logarithm."""
    wanted = np.geomspace(1, config.steps, config.looks)
    return [0, *dict.fromkeys(round(float(x)) for x in wanted)]


def _check(config: Config) -> None:
    counts = ("steps", "batch", "looks", "pairs", "held_out", "probes", "seeds", "limit")
    common.at_least(1, config, *counts)
    common.above(0, config, "rate", "supervised_rate", "margin")
    common.at_least(0, config, "supervised")
    for name in ("batch", "probes"):
        if (value := getattr(config, name)) > config.pairs:
            raise ValueError(f"{name}: got {value}, expected at most the {config.pairs} pairs")
    if unknown := [name for name in config.losses if name not in LOSSES]:
        raise ValueError(f"losses: got {', '.join(unknown)}, expected some of {', '.join(LOSSES)}")
    if len(set(config.losses)) != len(config.losses) or not config.losses:
        raise ValueError(f"losses: got {config.losses}, expected names, each once")


def load(config: Config) -> tuple[common.Subject, common.Problem]:
    """Model and pairs of a run; raises for settings that cannot be run.

    Of a long file a fixed sample is taken, four times as many as a seed draws.
    """
    _check(config)
    found, drawn = common.read(config), config.pairs + config.held_out
    subject = common.open_model(config.model, scan=True)
    rows = [found.rows[i] for i in np.random.default_rng(0).permutation(len(found.rows))]
    fitting, counts = common.encoded(config, rows, subject, too_long="truncate_left")
    if drawn > len(fitting):
        raise ValueError(
            f"pairs: a seed draws {drawn}, expected at most the {len(fitting)} that fit"
        )
    skipped = (*found.faults, *counts.faults)
    usable = fitting[: max(96, 4 * drawn)]
    return subject, common.token_problem(subject.policy, usable, skipped=skipped)


def hashes(config: Config) -> dict[str, str]:
    """Of model and data, for the provenance."""
    return common.hashes(*load(config))
