"""What became of chosen responses under every method, at equal updates and at DPO's margin."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.mitigations import protocol
from experiments.mitigations.protocol import Config
from experiments.protocol import changes
from experiments.protocol.changes import CONTROLS, SETS, about, between, of_set, reached
from experiments.protocol.intervals import mean_of, mean_of_known

Arrays = Mapping[str, np.ndarray]


def courses(config: Config, arrays: Arrays, name: str, which: str) -> dict[str, np.ndarray]:
    """Of one arm on one set, ``[seeds looks pairs]``, the first look before any update.

    ``chosen``, ``rejected`` and ``margin`` since the start, nats; ``right``, whether the margin
    grew; ``ranked``, whether the chosen response is the more likely; of unseen pairs ``kl``.
    """

    def begun(x):
        return np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)

    logp = of_set(config, arrays["logp"], which)[:, None]
    change = np.moveaxis(of_set(config, np.moveaxis(arrays[f"{name}_change"], 1, 2), which), 2, 1)
    change = begun(change)
    chosen, rejected = change[..., 0], change[..., 1]
    margin = chosen - rejected
    now = (logp + change)[..., 0] > (logp + change)[..., 1]
    lost = np.where(np.isnan(margin), np.nan, 0.0)  # an arm that diverged ranks nothing
    found = {"chosen": chosen, "rejected": rejected, "margin": margin, "ranked": now + lost,
             "right": (margin > 0) + lost}  # fmt: skip
    return {**found, "kl": begun(arrays[f"{name}_kl"])} if which == "unseen" else found


def places(config: Config, arrays: Arrays, name: str) -> list[float]:
    """Where an arm reaches the margin on unseen pairs that DPO has after an epoch, of each seed."""
    k = 1 + protocol.looks(config).index(protocol.epoch(config))
    plain, own = (courses(config, arrays, n, "unseen")["margin"].mean(-1) for n in ("dpo", name))
    return [reached(x, level) for x, level in zip(own, plain[:, k], strict=True)]


def summarise(config: Config, arrays: Arrays) -> list[dict[str, Any]]:
    """``changes`` of every arm, then ``methods``: a row for each arm.

    There a number without a prefix is of an epoch's end; one that begins with ``matched`` is of
    DPO's margin, with controls after as many updates.
    """
    looks = protocol.looks(config)
    names = protocol.names(config)
    rows = changes.rows(config, arrays, dict.fromkeys(names, looks))
    k = 1 + looks.index(protocol.epoch(config))
    every = {name: courses(config, arrays, name, "unseen") for name in names}

    def at(name, field, where):
        return np.stack([between(x, p) for x, p in zip(every[name][field], where, strict=True)])

    plain = at("dpo", "chosen", places(config, arrays, "dpo"))
    for name in names:
        row: dict[str, Any] = {"table": "methods", "name": name, "updates": looks[k - 1]}
        for which in SETS:
            for field, x in courses(config, arrays, name, which).items():
                row |= about(f"{which}_{field}", config, mean_of, x[:, k])
        where = places(config, arrays, name)
        row["reached"] = int(np.isfinite(where).sum())
        for field in every[name]:
            row |= about(f"matched_{field}", config, mean_of_known, at(name, field, where))
        chosen = at(name, "chosen", where)
        row |= about("matched_over_dpo", config, mean_of_known, chosen - plain)
        for control in CONTROLS:
            gap = chosen - at(control, "chosen", where)
            row |= about(f"matched_beyond_{control}", config, mean_of_known, gap)
        rows.append(row)
    return rows
