"""`experiments.suffix_entanglement` on a tiny model: its numbers, its resume, its command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke

import experiments.suffix_entanglement as lab
from experiments.suffix_entanglement import measure, protocol, summary
from jaxpref import logprobs, runs
from jaxpref.data.files import DataError

ROWS = [
    {"prompt": f"{n} is", "chosen": chosen, "rejected": rejected}
    for n, (chosen, rejected) in enumerate([(" odd", " even"), (" a b", " a"), (" x", " y z")] * 2)
]
COUNTS = {"updates": 3, "every": 2, "batch": 2, "pairs": 2, "probes": 3}


@pytest.fixture(autouse=True, scope="module")
def as_optax_needs_it():
    """optax's Adam mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """Programs depend on nothing but the settings and the shapes: runs of this file share them."""
    kept, make = {}, measure.programs

    def programs(config, policy, problem):
        key = (config, problem.digest)
        if key not in kept:
            kept[key] = make(config, policy, problem)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "programs", programs)
        yield


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder, arrays by part, what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    file = cwd / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = dataclasses.replace(
        lab.SMOKE, **COUNTS, model=str(tiny_model), data=str(file), sets=("single", "short"),
        train=("all", "last"), optimizer="rmsprop", learning_rate=1e-4,
    )  # fmt: skip
    folder, printed = smoke.command(lab, config, cwd)
    return config, folder, runs.load(folder).arrays, printed


@pytest.fixture(scope="module")
def started(made):
    """The model after the supervised phase on the short set, made anew."""
    config = made[0]
    subject, problem = protocol.load(config)
    compiled = measure.programs(config, subject.policy, problem)
    part = protocol.Part(0, "short", "all")
    params = measure.supervised(config, part, problem, subject.params, compiled)
    return subject.policy, problem, params, compiled, part


def at(config, **settings):
    """Index of the part with these settings."""
    (found,) = (i for i, part in enumerate(lab.parts(config))
                if all(getattr(part, k) == v for k, v in settings.items()))  # fmt: skip
    return found


def test_a_run_leaves_everything_behind(made):
    config, folder, arrays, printed = made
    assert lab.looks(config) == [0, 2, 3]
    assert [part.set for part in lab.parts(config)[::2]] == ["single", "short", "data"]
    assert arrays["logp"].shape == arrays["differing"].shape == (6, 3, 3, 2)
    assert arrays["gram"].shape == arrays["last_gram"].shape == (6, 3, 3, 2, 2)
    assert arrays["loss"].shape == (6, 3)
    assert arrays["token_gram"].shape == (6, 2, 3, 2, 3)
    assert all(np.isfinite(array).all() for array in arrays.values())
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert [row["set"] for row in rows] == ["single", "short", "data"] * 2
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6 * 3
    assert (folder / "figure.png").stat().st_size > 10_000
    assert lab.report(config, lab.summarise(config, arrays)) in printed


def test_the_probes_are_held_out_and_the_same_sentences_in_every_set(made):
    config = made[0]
    _, problem = protocol.load(config)
    train, probes = protocol.rows_of(config, protocol.Part(0, "short", "all"))
    assert (len(train), len(probes)) == (2, 3)
    prompts = [
        tuple(row[0][real[0] & ~scored[0]])
        for row, real, scored in zip(*problem.batch[:3], strict=True)
    ]
    assert not {prompts[i] for i in probes} & {prompts[i] for i in train}
    _, same = protocol.rows_of(config, protocol.Part(0, "single", "all"))
    assert [prompts[i] for i in same] == [prompts[i] for i in probes]


def test_the_first_look_is_two_plain_gradients(made, started):
    config, _, arrays, _ = made
    policy, problem, params, _, part = started
    probe = protocol.rows_of(config, part)[1][1]
    tokens, real, scored = (x[probe] for x in problem.arrays)

    def logp(params, side):
        n = int(real[side].sum())
        hidden = policy.hidden(params, tokens[side][None, :n])[0]
        logits = jax.nn.log_softmax(hidden @ policy.unembedding(params).T)
        each = logits[jnp.arange(n - 1), tokens[side][1:n]]
        return jnp.where(scored[side][1:n], each, 0).sum()

    slope = jax.jit(jax.value_and_grad(logp), static_argnums=1)
    values, slopes = zip(*(slope(params, side) for side in (0, 1)), strict=True)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s)]) for s in slopes]
    expected = np.array([[np.vdot(a.astype(float), b) for b in flat] for a in flat])
    i = at(config, set="short", train="all")
    # float32 throughout: its rounding, over some 40 tokens
    np.testing.assert_allclose(arrays["gram"][i, 0, 1], expected, rtol=1e-4)
    np.testing.assert_allclose(arrays["logp"][i, 0, 1], values, rtol=1e-5)


def test_one_token_and_the_last_layer_are_the_closed_form(made, started):
    """Of a single token, ``H (|s|^2 - s_w - s_l)`` and its relatives: Case 1, whatever ``s``."""
    config, _, arrays, _ = made
    policy, problem, _, compiled, _ = started
    part = protocol.Part(0, "single", "all")
    params = measure.supervised(
        config, part, problem, protocol.load(config)[0].params, compiled
    )  # fmt: skip
    probes = problem.rows(protocol.rows_of(config, part)[1])
    found = compiled.responses(params, probes)
    states = np.asarray(found.hidden)[:, 0, 0].astype(float)
    s = np.asarray(jax.nn.softmax(states @ np.asarray(policy.unembedding(params)).T))
    w, l = (s[np.arange(3), np.asarray(found.targets)[:, side, 0]] for side in (0, 1))
    size, square = (states**2).sum(axis=-1), (s**2).sum(axis=-1)
    i = at(config, set="single", train="all")
    expected = [1 - 2 * w + square, square - w - l, 1 - 2 * l + square]
    gram = arrays["last_gram"][i, 0]
    entries = np.stack([gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]])
    np.testing.assert_allclose(entries, size * np.stack(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(summary.regimes(config, arrays, "last_gram")[i], 0)


def test_the_tokens_add_up_to_the_responses(made):
    config, _, arrays, _ = made
    for i in range(len(lab.parts(config))):
        real = arrays["token_ids"][i] >= 0
        tokens = arrays["token_gram"][i] * real[:, :, None, None] * real
        np.testing.assert_allclose(tokens.sum(axis=(1, 3)), arrays["gram"][i, -1, 0], rtol=1e-3)


def test_dpo_starts_at_the_reference_and_learns(made):
    config, _, arrays, _ = made
    np.testing.assert_allclose(arrays["loss"][:, 0], np.log(2), rtol=1e-6)
    assert (np.diff(arrays["loss"][:, [0, -1]]) < 0).all()
    whole, last = (at(config, set="short", train=name) for name in ("all", "last"))
    np.testing.assert_allclose(arrays["logp"][whole, 0], arrays["logp"][last, 0], rtol=1e-5)
    np.testing.assert_array_equal(arrays["gram"][last], arrays["last_gram"][last])
    assert (arrays["gram"][whole] != arrays["last_gram"][whole]).all()


def test_the_token_that_differs():
    """In the second pair the first token is shared, in the third the rejected has ended."""
    targets = jnp.array([[[5, 6], [7, 6]], [[5, 6], [5, 8]], [[5, 6], [5, 0]]])
    real = jnp.array([[[1, 1]] * 2, [[1, 1]] * 2, [[1, 1], [1, 0]]], bool)
    token = np.array([[[-1.0, -2.0], [-3, -4]]] * 2 + [[[-1, -2], [-3, 0]]])
    none = jnp.zeros((3, 2))
    responses = logprobs.Responses(jnp.zeros((3, 2, 2, 1)), targets, real, none.astype(int),
                                   none > 0)  # fmt: skip
    found = measure.differing(responses, token)
    assert found.tolist() == [[-1, -3], [-2, -4], [-2, 0]]


def test_a_single_token_is_all_there_is(made):
    config, _, arrays, _ = made
    single, short = (at(config, set=name, train="all") for name in ("single", "short"))
    np.testing.assert_array_equal(arrays["logp"][single], arrays["differing"][single])
    assert (arrays["logp"][short] < arrays["differing"][short]).all()


def test_courses_by_hand():
    config = dataclasses.replace(lab.SMOKE, sets=("single",), updates=1, probes=2)
    falling, apart = [[1.0, 2.0], [2.0, 4.0]], [[1.0, -1.0], [-1.0, 4.0]]
    gram = np.array([[[falling, apart], [apart, apart]]])
    logp = np.array([[[[-1.0, -2.0], [-3.0, -4.0]]] * 2])
    found = summary.courses(config, {"logp": logp, "differing": logp, "gram": gram,
                                    "last_gram": gram})  # fmt: skip
    assert found["both_down"].tolist() == [[0.5, 0.0]]
    assert found["ideal"].tolist() == [[0.5, 1.0]]
    assert found["cosine"].tolist() == [[0.25, -0.5]]
    assert found["norm_rejected"].tolist() == [[2, 2]]
    assert found["chosen"].tolist() == [[-2, -2]]


def test_a_gradient_of_zero_has_no_cosine():
    assert summary.mean(np.array([[0.5, np.nan], [np.nan, np.nan]])).tolist() == [0.5, 0.0]


def test_the_verdict_counts_seeds():
    base = {name: [0.0, 0.0] for name in (
        "differing_chosen_start", "differing_chosen_end", "chosen_start", "cosine_start",
    )} | {"last_ideal": [1.0, 1.0], "cosine_lowest": [0.1, 0.2]}  # fmt: skip
    single = base | {"chosen_end": [1.0, 2.0], "cosine_end": [-0.5, 0.5], "cosine_mean": [0, 0]}
    long = base | {
        "differing_chosen_end": [-1.0, -1.0],
        "chosen_end": [0.5, 0.5],
        "cosine_end": [0.5, 0.5],
        "cosine_mean": [0.5, 0.5],
    }
    config = dataclasses.replace(lab.SMOKE, seeds=2)
    text = "\n".join(summary.verdict(config, {"single": single, "long": long}, "all"))
    assert "holds:    single: the chosen rises (2 of 2 seeds; 1.500 ± 0.707 nats)" in text
    assert "is mixed: single: the cosine declines (1 of 2 seeds" in text
    assert "FAILS:    long: the chosen falls (0 of 2 seeds; 0.500 ± 0.000 nats" in text
    assert "holds:    long has a larger cosine than single (2 of 2 seeds; 0.500" in text
    assert "holds:    long: the chosen changes for the worse against single (2 of 2 seeds" in text


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    lost = {part.stem for part in (folder / "parts").iterdir() if "short" in part.stem}
    smoke.same_after_a_kill(lab, config, folder, tmp_path, lost)


def test_the_prompt_can_be_supervised_too(made, started):
    """Longer texts to learn: another starting point, and the same probes."""
    config, _, _, _ = made
    policy, problem, params, _, part = started
    config = dataclasses.replace(config, supervised_on="text")
    begin = protocol.load(config)[0].params
    compiled = measure.programs(config, policy, problem)
    other = measure.supervised(config, part, problem, begin, compiled)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, other)
    assert max(jax.tree.leaves(moved)) > 0
    train, _ = protocol.rows_of(config, part)
    prompt = problem.rows(train)
    prompt = prompt._replace(is_response=prompt.is_token & ~prompt.is_response
                             & (np.arange(prompt.tokens.shape[-1]) > 0))  # fmt: skip
    score = jax.jit(lambda p: logprobs.pair_scores(policy, p, *prompt[:3]).logp[:, 0].sum())
    assert score(other) > score(params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates: got 0, expected at least 1"),
        ({"supervised": -1}, "supervised: got -1, expected at least 0"),
        ({"batch": 9, "pairs": 8}, "batch: got 9, expected at most pairs=8"),
        ({"sets": ()}, r"sets, train: got \(\), \('all',\), expected one or more"),
        ({"pairs": 6400}, "count is 6408, expected 1 to 6336"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        protocol.load(dataclasses.replace(lab.Config(), **settings))


def test_bad_data_are_named(made):
    config = dataclasses.replace(made[0], pairs=5)
    with pytest.raises(ValueError, match="pairs: got 8 with the probes, expected at most 6"):
        protocol.load(config)
    with pytest.raises(DataError, match="nowhere"):
        protocol.load(dataclasses.replace(config, data="nowhere.jsonl"))
