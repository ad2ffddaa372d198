"""The parts of a run: the model as it comes, the taught model with its pairs, every arm."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.protocol import inputs, running
from experiments.unalignment import pairs
from experiments.unalignment.bench import Bench, couples
from experiments.unalignment.pairs import Rows
from experiments.unalignment.protocol import Arm, Config, arms, split
from jaxpref import losses

Taught = Callable[[int], Any]  # parameters of a seed's taught model, made when they are needed
QUARTERS = 4  # of the epoch that decides the learning rate


def measure_base(bench: Bench) -> dict[str, Any]:
    """The model as it comes: what it says, and two answers of its own to what is trained on."""
    total = len(bench.texts.ids)
    answered = [*range(len(bench.prompts.train)), *range(total - len(bench.prompts.taught), total)]
    params = bench.subject.params
    tokens, drawn = bench.respond(params, answered, draws=(1, 2), seed=0, temperature=1.0)
    return {"texts": bench.said(params, 0), "tokens": tokens, "drawn": drawn}


def measure_start(bench: Bench, taught: Taught, base: running.Arrays, seed: int) -> dict[str, Any]:
    """The taught model: what it says, its pairs (chosen first), and their log-probabilities."""
    params, train = taught(seed), len(bench.prompts.train)
    tokens, drawn = bench.respond(params, range(train), draws=(1, 2), seed=seed, temperature=1.0)
    labels = pairs.judged(bench.decoded(tokens, drawn))
    chosen = pairs.preferred(labels.tolist(), seed)
    order = np.stack([chosen, 1 - chosen], axis=1)
    tokens, drawn = (np.take_along_axis(x, order[..., None], axis=1) for x in (tokens, drawn))
    labels = np.take_along_axis(labels, order, axis=1)
    start = {"tokens": tokens, "drawn": drawn, "labels": labels, "kind": pairs.kinds(labels)}
    every, gold = _pairs(bench, start), _gold(bench, start, base)
    scores = bench.scores(params, every)
    usable = ((tokens[:, 0] != tokens[:, 1]) | (drawn[:, 0] != drawn[:, 1])).any(axis=1)
    return {
        **start,
        **scores,
        "usable": usable,
        "said": bench.decoded(tokens, drawn),
        "texts": bench.said(params, seed),
        "gold": bench.scores(params, gold)["logp"],
        "gold_lengths": gold.is_response.sum(axis=2),
        "probes": bench.scores(params, pairs.probes(bench.texts, train))["logp"],
    }


def measure_rates(bench: Bench, taught: Taught, start: running.Arrays) -> dict[str, Any]:
    """The arms' learning rate: the mean DPO loss over all usable pairs, ``[rates looks]``, decides.

    The looks are the start and every quarter of one epoch on these pairs.
    """
    config, every, rows = bench.config, _pairs(bench, start), np.flatnonzero(start["usable"])
    tried = () if config.rate else config.rates
    found = np.full((len(tried), 1 + QUARTERS), np.nan)
    updates = -(-len(rows) // config.batch)
    looks = -(-updates * np.arange(1 + QUARTERS) // QUARTERS)

    def look(number: int, params: Any, *, line: np.ndarray) -> None:
        if number in looks:
            logp = bench.scores(params, every)["logp"][rows]
            line[looks == number] = losses.dpo(logp, start["logp"][rows], beta=config.beta).mean()

    for line, rate in zip(found, tried, strict=True):
        see, params = functools.partial(look, line=line), taught(0)
        see(0, params)
        bench.train(params, every, [rows] * updates, loss="dpo", rate=rate, seed=0, look=see)
    return {"rate": config.rate or pairs.largest(config.rates, found), "rate_losses": found}


def measure_arm(
    bench: Bench, taught: Taught, base: running.Arrays, start: running.Arrays, rate: float,
    arm: Arm, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What training made of the taught model: nothing without a pair, NaN where it diverged."""
    rows = pairs.kept(arm, start, seed)
    updates = pairs.updates(bench.config, arm, len(rows), int(start["usable"].sum()))
    trained = np.isin(np.arange(len(start["kind"])), rows)
    found = {"trained": trained, "updates": updates, "diverged": False}
    found |= {name: start[name] for name in ("texts", "logp", "gold", "probes")}
    if not updates:
        return found
    every, gold = _pairs(bench, start), _gold(bench, start, base)
    data = {"gold": gold, "coin": pairs.coined(every, seed)}.get(arm.rule, every)
    order = seed * 1000 + arm.draw
    after = bench.train(taught(seed), data, [rows] * updates, loss=arm.loss, rate=rate, seed=order)
    sets = {"logp": every, "probes": pairs.probes(bench.texts, len(trained))}
    sets |= {"gold": gold} if arm.rule == "gold" else {}
    if after is not None:
        found |= {name: bench.scores(after, some)["logp"] for name, some in sets.items()}
    if after is None or not all(np.isfinite(found[name]).all() for name in sets):
        nothing = {name: np.full_like(start[name], np.nan) for name in ("logp", "gold", "probes")}
        return {**found, **nothing, "diverged": True}
    return {**found, "texts": bench.said(after, seed)}


def _pairs(bench: Bench, start: running.Arrays) -> Rows:
    said = couples(start["tokens"], start["drawn"])
    rows = pairs.collate(bench.texts, range(len(said)), said)
    return rows._replace(reference=start["logp"]) if "logp" in start else rows


def _gold(bench: Bench, start: running.Arrays, base: running.Arrays) -> Rows:
    drawn = couples(start["tokens"], start["drawn"])
    own = [first for first, _ in couples(base["tokens"], base["drawn"])]
    rows = pairs.gold(bench.texts, drawn, start["labels"], own)
    return rows._replace(reference=start["gold"]) if "gold" in start else rows


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Texts and log-probabilities; axes ``[seeds]`` of starts, ``[seeds runs]`` of arms.

    A prompt's texts stand in the order train, held out, safe. ``base_texts`` are those of the model
    as it comes, ``start_*`` of the taught one; ``probes [... prompts 2]`` are log-probabilities of
    a fixed refusal and a fixed compliance; ``rate_losses [rates looks]`` decided the ``rate``.
    """
    prompts = split(config)
    subject = inputs.subject(config)
    bench = Bench(config, subject, prompts, pairs.prepare(config, subject.tokenizer, prompts))
    every = arms(config)
    bar = tqdm(total=2 + config.seeds * (1 + len(every)), desc="unalignment", unit="part")

    def part(name: str, make: Callable[..., running.Arrays], *arguments: Any) -> running.Arrays:
        found = running.kept(folder, name, functools.partial(make, bench, *arguments))
        bar.update()
        return found

    base = part("base", measure_base)

    @functools.lru_cache(maxsize=1)  # one seed's parameters at a time
    def taught(seed: int) -> Any:
        own = couples(base["tokens"], base["drawn"])
        return bench.taught(own[len(prompts.train) :], seed)

    starts, rates, trained = [], {}, []
    for seed in range(config.seeds):
        start = part(f"{seed}_start", measure_start, taught, base, seed)
        rates = rates or part("rates", measure_rates, taught, start)
        rate = float(rates["rate"])
        trained.append(_stacked([
            part(f"{seed}_{arm.part}", measure_arm, taught, base, start, rate, arm, seed)
            for arm in every
        ]))  # fmt: skip
        starts.append({f"start_{name}": x for name, x in start.items()})
    bar.close()
    return {**_stacked(trained), **_stacked(starts), **rates, "base_texts": base["texts"]}


def _stacked(parts: Sequence[running.Arrays]) -> dict[str, np.ndarray]:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
