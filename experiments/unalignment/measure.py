"""The parts of a run: the model as it comes, the taught model with its pairs, every arm."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import common
from experiments.unalignment import pairs
from experiments.unalignment.bench import Bench, couples
from experiments.unalignment.pairs import Rows
from experiments.unalignment.protocol import Arm, Config, arms, split


def measure_base(bench: Bench) -> dict[str, Any]:
    """The model as it comes: what it says, and two answers of its own to what is trained on."""
    total = len(bench.texts.ids)
    answered = [*range(len(bench.prompts.train)), *range(total - len(bench.prompts.taught), total)]
    params = bench.subject.params
    tokens, drawn = bench.respond(params, answered, draws=(1, 2), seed=0, temperature=1.0)
    return {"texts": bench.said(params, 0), "tokens": tokens, "drawn": drawn}


def measure_start(bench: Bench, params: Any, base: common.Arrays, seed: int) -> dict[str, Any]:
    """The taught model: what it says, its pairs (chosen first), and their log-probabilities."""
    train = len(bench.prompts.train)
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


def measure_arm(
    bench: Bench, params: Any, base: common.Arrays, start: common.Arrays, arm: Arm, seed: int
) -> dict[str, Any]:
    """What training made of the taught model; without a pair to train on, nothing."""
    rows = pairs.kept(arm, start, seed)
    updates = pairs.updates(bench.config, arm, len(rows), int(start["usable"].sum()))
    trained = np.isin(np.arange(len(start["kind"])), rows)
    done = {"trained": trained, "updates": updates}
    if not updates:
        return {**done, **{name: start[name] for name in ("texts", "logp", "gold", "probes")}}
    every, gold = _pairs(bench, start), _gold(bench, start, base)
    data = gold if arm.rule == "gold" else every
    after = bench.train(
        params, data, lambda number: rows, loss=arm.loss, rate=bench.config.rate, updates=updates,
        seed=seed * 1000 + arm.draw,
    )  # fmt: skip
    return {
        **done,
        "texts": bench.said(after, seed),
        "logp": bench.scores(after, every)["logp"],
        "gold": bench.scores(after, gold)["logp"] if arm.rule == "gold" else start["gold"],
        "probes": bench.scores(after, pairs.probes(bench.texts, len(trained)))["logp"],
    }


def _pairs(bench: Bench, start: common.Arrays) -> Rows:
    said = couples(start["tokens"], start["drawn"])
    rows = pairs.collate(bench.texts, range(len(said)), said)
    return rows._replace(reference=start["logp"]) if "logp" in start else rows


def _gold(bench: Bench, start: common.Arrays, base: common.Arrays) -> Rows:
    drawn = couples(start["tokens"], start["drawn"])
    own = [first for first, _ in couples(base["tokens"], base["drawn"])]
    rows = pairs.gold(bench.texts, drawn, start["labels"], own)
    return rows._replace(reference=start["gold"]) if "gold" in start else rows


def run(config: Config, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Texts and log-probabilities; axes ``[seeds]`` of starts, ``[seeds runs]`` of arms.

    A prompt's texts stand in the order train, held out, safe. ``base_texts`` are those of the model
    as it comes, ``start_*`` of the taught one; ``probes [... prompts 2]`` are log-probabilities of
    a fixed refusal and a fixed compliance.
    """
    prompts = split(config)
    subject = common.open_model(config.model, scan=True)
    bench = Bench(config, subject, prompts, pairs.prepare(config, subject.tokenizer, prompts))
    every = arms(config)
    bar = tqdm(total=1 + config.seeds * (1 + len(every)), desc="unalignment", unit="part")
    base = common.kept(folder, "base", lambda: measure_base(bench))
    bar.update()

    @functools.lru_cache(maxsize=1)  # one seed's parameters at a time
    def taught(seed: int) -> Any:
        own = couples(base["tokens"], base["drawn"])
        return bench.taught(own[len(prompts.train) :], seed)

    starts, parts = [], []
    for seed in range(config.seeds):

        def begin(seed=seed):
            return measure_start(bench, taught(seed), base, seed)

        start = common.kept(folder, f"{seed}_start", begin)
        bar.update()
        found = []
        for arm in every:

            def make(seed=seed, start=start, arm=arm):
                return measure_arm(bench, taught(seed), base, start, arm, seed)

            found.append(common.kept(folder, f"{seed}_{arm.part}", make))
            bar.update()
        starts.append(start)
        parts.append({name: np.stack([each[name] for each in found]) for name in found[0]})
    bar.close()
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    arrays |= {f"start_{name}": np.stack([start[name] for start in starts]) for name in starts[0]}
    return {**arrays, "base_texts": base["texts"]}
