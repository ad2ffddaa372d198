"""The losses and the settings."""

import dataclasses

from experiments.protocol import arms, inputs, settings
from experiments.protocol.changes import CONTROLS
from experiments.protocol.settings import Protocol
from jaxpref.training.objectives import objective
from jaxpref.training.pairset import PairSet


@dataclasses.dataclass(frozen=True)
class Config(Protocol):
    """All that decides the numbers."""

    losses: tuple[str, ...] = (
        "dpo", "ipo", "simpo", "dpop", "r_dpo", "sppo", "slic_hf", "cpo", "orpo", "kto",
    )  # fmt: skip
    """Of the catalogue, hyperparameters as in the papers or their code. The two controls, DPO with
    labels by coin and supervision continued, are trained beside them."""
    epochs: tuple[float, ...] = (0.25, 0.5, 1)
    """When to look, in epochs over the preference part."""
    longer: tuple[str, ...] = ("dpo", "ipo", "simpo", "cpo")
    """Losses that are trained on, and so are the controls."""
    longer_epochs: tuple[float, ...] = (2, 3)
    """When to look at those."""
    warmup: float = 0.1


SMOKE = Config(
    losses=("dpo", "simpo", "cpo"), longer=("dpo",), longer_epochs=(2,), epochs=(0.5, 1), pairs=4,
    unseen=4, trained=2, batch=2, seeds=2, supervised_epochs=1, resamples=50,
)  # fmt: skip


def names(config: Config) -> tuple[str, ...]:
    """All arms: the losses, then the controls."""
    return (*config.losses, *CONTROLS)


def looks(config: Config) -> dict[str, list[int]]:
    """Updates after which each arm is looked at."""
    found = {}
    for name in names(config):
        longer = config.longer_epochs if name in config.longer or (
            config.longer and name in CONTROLS) else ()  # fmt: skip
        found[name] = arms.looks_of(config, (*config.epochs, *longer))
    return found


def load(config: Config) -> tuple[inputs.Subject, PairSet]:
    """Model and pairs of a run; raises for settings that cannot be run."""
    for name in (*config.losses, *config.longer):
        objective(name)
    if len({*config.losses, *CONTROLS}) < len(config.losses) + len(CONTROLS) or not config.losses:
        raise ValueError(f"losses: got {config.losses}, expected names, each once and no control")
    if missing := sorted(set(config.longer) - set(config.losses)):
        raise ValueError(f"longer: got {', '.join(missing)}, expected some of the losses")
    if 1 not in config.epochs or min((*config.epochs, *config.longer_epochs)) <= 0:
        raise ValueError(
            f"epochs, longer_epochs: got {config.epochs}, {config.longer_epochs}, expected numbers"
            " above 0 with 1 among the first"
        )
    return settings.load(config)
