"""The methods and the settings."""

import dataclasses

from experiments.protocol import arms, checks, inputs, settings
from experiments.protocol.changes import CONTROLS
from experiments.protocol.settings import Protocol
from jaxpref.data.batches import Batch
from jaxpref.training import mitigations
from jaxpref.training.courses import Change
from jaxpref.training.mitigations import contrast_mask
from jaxpref.training.objectives import Objective, objective
from jaxpref.training.pairset import Index, PairSet

LOSSES = ("dpo", "dpo_sft", "dpop", "dpo_shift", "cpo", "cal_dpo")
CHANGES: dict[str, Change] = {
    "normalised": lambda gram, pull: mitigations.normalised_pull(gram, -pull[..., 0]),
    "calibrated": lambda gram, pull: mitigations.calibrated_pull(
        pull, mitigations.calibration(gram, pull)),
    "projected": mitigations.projected_pull,
    "pcgrad": mitigations.pcgrad_pull,
}  # fmt: skip
"""DPO whose pulls are changed by each pair's Gram, of plain gradients."""
MASK = "contrast_mask"
METHODS = (*LOSSES, *CHANGES, MASK)


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers."""

    methods: tuple[str, ...] = METHODS
    """DPO among them; the two controls, DPO with labels by coin and supervision continued, are
    trained beside them."""
    epochs: tuple[float, ...] = (0.5, 1, 2)
    """When to look, in epochs over the preference part; at the end of the first, DPO's margin on
    unseen pairs is the one at which methods are compared."""
    beta: float = 0.1
    """Of DPO and all that is made of it; CPO and Cal-DPO have the catalogue's own."""
    sft_weight: float = 0.1
    """Of the likelihood term of `dpo_sft`."""
    shift: float = 0.75
    """Of DPO-Shift."""
    data: str | None = "long"
    pairs: int = 48
    trained: int = 16
    batch: int = 6


SMOKE = Config(
    methods=("dpo", "dpo_sft", "pcgrad", MASK), epochs=(0.5, 1), pairs=4, unseen=4, trained=2,
    batch=2, seeds=2, supervised_epochs=1, resamples=50,
)  # fmt: skip


class Contrasted(PairSet):
    """The same pairs, scored only where the other response has no partner for a token."""

    def rows(self, index: Index) -> Batch:
        """As those of a `PairSet`, with other scored tokens."""
        batch = super().rows(index)
        return batch._replace(is_response=contrast_mask(batch.tokens, batch.is_response))


def objectives(config: Config) -> dict[str, Objective]:
    """The losses of a run by name: of its methods and of the controls."""
    dpo = objective("dpo", beta=config.beta)

    def dpo_sft(scores, batch):
        return dpo(scores, batch) - config.sft_weight * scores.logp[:, 0]

    made = {
        "dpo": dpo,
        "sft": objective("sft"),
        "dpo_sft": dpo_sft,
        "dpop": objective("dpop", beta=config.beta),
        "dpo_shift": objective("dpo_shift", beta=config.beta, shift=config.shift),
        "cpo": objective("cpo"),
        "cal_dpo": objective("cal_dpo"),
        **dict.fromkeys(CHANGES, dpo),
    }
    return {name: loss for name, loss in made.items() if name in (*config.methods, "sft")}


def changes_of(config: Config) -> dict[str, Change]:
    """Of the methods that read Grams."""
    return {name: change for name, change in CHANGES.items() if name in config.methods}


def names(config: Config) -> tuple[str, ...]:
    """All arms: the methods, then the controls."""
    return (*config.methods, *CONTROLS)


def epoch(config: Config) -> int:
    """Updates of an epoch."""
    return arms.updates_of(config, 1)


def looks(config: Config) -> list[int]:
    """Updates after which every arm is looked at."""
    return arms.looks_of(config, config.epochs)


def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    for name in config.methods:
        if name not in METHODS:
            raise ValueError(f"methods: got {name}, expected some of {', '.join(METHODS)}")
    if "dpo" not in config.methods or len(set(config.methods)) < len(config.methods):
        raise ValueError(f"methods: got {config.methods}, expected each once and dpo among them")
    if 1 not in config.epochs or min(config.epochs) <= 0:
        raise ValueError(f"epochs: got {config.epochs}, expected numbers above 0 with 1 among them")
    checks.above(0, config, "beta")
    checks.at_least(0, config, "sft_weight")
    return settings.load(config)
