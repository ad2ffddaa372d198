"""`experiments.suffix_entanglement` on a tiny model: its numbers, its resume, its command line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smoke
from test_protocol import written

import experiments.suffix_entanglement as lab
from experiments.protocol import arms
from experiments.protocol.arms import ARMS
from experiments.suffix_entanglement import measure, protocol
from experiments.suffix_entanglement.report import CASES
from jaxpref import runs
from jaxpref.data.files import DataError
from jaxpref.data.pairs import TokenPair
from jaxpref.models import tabular
from jaxpref.training.pairset import PairSet

SETS = ("single", "short", "data")


pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed.

    And by set the start of its one seed.
    """
    cwd, kept = tmp_path_factory.mktemp("made"), []
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=written(cwd), sets=("short", "single"), rate=1e-3,
        supervised_rate=1e-3,
    )  # fmt: skip

    make = arms.begin

    def recorded(*values):
        kept.append(make(*values))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "begin", recorded)
        folder, printed = smoke.command(lab, config, cwd)
    return config, folder, printed, dict(zip(SETS, kept, strict=True))


@pytest.fixture(scope="module")
def arrays(made):
    return runs.load(made[1]).arrays


def test_a_run_leaves_everything_behind(made, arrays):
    config, folder, printed, _ = made
    assert protocol.looks(config) == [1, 2]
    for text in SETS:
        assert arrays[f"{text}_gram"].shape == (1, 2, 2, 2)
        assert arrays[f"{text}_dpo_gram"].shape == (1, 2, 2, 2, 2)
        for name in ARMS:
            assert arrays[f"{text}_{name}_change"].shape == (1, 2, 5, 2)
            assert arrays[f"{text}_{name}_differing"].shape == (1, 2, 5, 2)
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed
    assert (folder / "figure.png").stat().st_size > 10_000
    assert len(json.loads((folder / "provenance.json").read_text())["data"]) == 3


def test_all_sets_have_the_same_sentences_in_the_same_parts(made):
    """And no text but what follows the label is another: they are compared pair by pair."""
    one, other = made[3]["single"], made[3]["short"]
    for name in ("preference", "unseen"):
        for a, b in zip(getattr(one.parts, name), getattr(other.parts, name), strict=True):
            mine, same = one.pairs.pairs[a], other.pairs.pairs[b]
            for short, longer in zip(mine.tokens, same.tokens, strict=True):
                assert len(longer) > len(short)
                np.testing.assert_array_equal(longer[: len(short)], short)
    assert (one.pairs.lengths == 1).all()


def test_the_first_look_is_two_plain_gradients(made, arrays):
    """Gram and differing token of one response at a time, by autodiff and no packing."""
    config, *_, trained = made
    begun = trained["short"]
    policy = begun.pairs.policy

    @jax.jit
    def response(params, ids, begin):
        def logp(params):
            hidden = policy.hidden(params, ids[None])[0]
            logits = jax.nn.log_softmax(hidden @ policy.unembedding(params).T)
            token = logits[jnp.arange(len(ids) - 1), ids[1:]]
            return jnp.where(jnp.arange(1, len(ids)) >= begin, token, 0).sum(), token

        slope, token = jax.grad(logp, has_aux=True)(params)
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(slope)]), token

    probes = begun.probes
    for place, row in enumerate(begun.parts.unseen[: config.grams]):
        pair = begun.pairs.pairs[row]
        found = [response(begun.params, ids, pair.starts[0]) for ids in pair.tokens]
        slopes = [np.asarray(slope, float) for slope, _ in found]
        expected = [[a @ b for b in slopes] for a in slopes]
        np.testing.assert_allclose(arrays["short_gram"][0, place], expected, rtol=1e-4)
        (at,) = np.flatnonzero(pair.tokens[0] != pair.tokens[1])
        assert probes[config.trained + place] == row
        word = arrays["short_differing"][0, config.trained + place]
        np.testing.assert_allclose(word, [token[at - 1] for _, token in found], rtol=1e-4)


def test_a_single_token_is_all_there_is(arrays):
    for name in ARMS:
        moved = {text: arrays[f"{text}_{name}_differing"] - arrays[f"{text}_differing"][:, None]
                 for text in ("single", "short")}  # fmt: skip
        np.testing.assert_allclose(moved["single"], arrays[f"single_{name}_change"], atol=1e-5)
        assert np.abs(moved["short"] - arrays[f"short_{name}_change"]).max() > 1e-2


def test_the_token_that_differs():
    """The first of two that do, behind one that is shared; a response that has ended has none."""
    policy, params = tabular.language_model(jax.random.key(0), vocab=3, length=3)
    row = jnp.log(jnp.array([0.1, 0.2, 0.7]))[None, None]
    params = jax.tree.map(lambda x: jnp.broadcast_to(row, x.shape).astype(x.dtype), params)
    texts = [((2, 1, 0), (2, 0, 1)), ((2, 1, 1), (2, 1))]
    made = [tuple(np.array([0, *x]) for x in pair) for pair in texts]
    pairs = PairSet.of(policy, [TokenPair(x, (1, 1), (False, False)) for x in made])
    found = measure.differing(pairs, params, pairs.rows([0, 1]))
    np.testing.assert_allclose(found, np.log([[0.2, 0.1], [0.2, 1]]), rtol=1e-5)


def test_a_killed_run_ends_with_the_same_bits(made, tmp_path):
    config, folder, *_ = made
    smoke.same_after_a_kill(lab, config, folder, tmp_path, ("0_short_dpo",))


@pytest.mark.usefixtures("any_size")
def test_an_arm_that_diverges_is_reported(made, arrays):
    config, *_, trained = made
    wild = dataclasses.replace(config, rate=3e38, epochs=(0.5, 2))
    found = measure.course(wild, "dpo", trained["short"]._replace(config=wild))
    assert found["diverged"] == 2  # the norms hide it from the second update
    assert np.isnan(found["gram"][-1]).all()
    assert np.isnan(found["change"][-1]).all()
    lost = arrays | {f"short_dpo_{key}": x[None] for key, x in found.items()}
    said = lab.report(config, lab.summarise(config, lost))
    assert "short: DPO moves unseen chosen responses by an unknown amount (1 of 1 seeds" in said
    assert "is open: short: a larger cosine than single at the end: -." in said
    lab.draw(config, lost)


@pytest.mark.usefixtures("any_size")
def test_the_verdict_says_what_the_numbers_hold():
    """A world in which the claim holds, but for a short text that is worse than none."""
    config = dataclasses.replace(lab.SMOKE, seeds=2, resamples=20)
    arrays = {}
    for text, cosine, fall in (("single", -0.5, -1.0), ("short", -0.75, -1.0), ("long", 0.75, 4.0)):
        gram = np.tile(np.array([[1, 2 * cosine], [2 * cosine, 4]]), (2, 2, 1, 1))
        arrays |= {f"{text}_gram": gram, f"{text}_dpo_gram": np.stack([gram] * 2, axis=1)}
        arrays |= {
            f"{text}_lengths": np.full((2, 5, 2), 2),
            f"{text}_differing": np.ones((2, 5, 2)),
        }
        for name in ARMS:
            other = -2.5 if (name, text) == ("sft", "long") else 0.5
            change = np.full((2, 2, 5, 2), -fall if name == "dpo" else other)
            arrays |= {f"{text}_{name}_change": change, f"{text}_{name}_differing": change / 2 + 1}
            arrays[f"{text}_{name}_diverged"] = np.array([-1, -1])
    rows = lab.summarise(config, arrays)
    said = lab.report(config, rows)
    moves = "DPO moves unseen chosen responses by"
    assert f"long: {moves} -4.00 (-4.00 to -4.00) nats, displaced;" in said
    assert "their differing token by -2.00 (-2.00 to -2.00) nats, displaced." in said
    assert f"single: {moves} +1.00 (+1.00 to +1.00) nats, above the start;" in said
    assert "holds: single: the gradients point apart before training: +0.50" in said
    assert "FAILS: short: a larger cosine than single before training: -0.25" in said
    assert "holds: long: a larger cosine than short at the end: +1.50" in said
    further = "long: unseen chosen responses fall further than short, beyond"
    assert f"holds: {further} labels by coin: +5.00" in said
    assert f"holds: {further} supervision continued: +2.00" in said
    case = {r["text"]: [r[c.name.lower()] for c in CASES] for r in rows
            if r["table"] == "gradients"}  # fmt: skip
    assert case == {"single": [1, 0, 0], "short": [1, 0, 0], "long": [0, 1, 0]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grams": 4}, "grams: got 4, expected at most the 3 unseen"),
        ({"sets": (), "data": None}, "sets: got none"),
        ({"epochs": (0.0, 1)}, r"epochs: got \(0.0, 1\), expected numbers above 0"),
        ({"epochs": ()}, "epochs"),
        ({"pairs": 9}, "a seed draws 3 \\+ 9 pairs"),
        ({"data": "nowhere.jsonl"}, "nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused(made, change, said):
    with pytest.raises((ValueError, DataError), match=said):
        lab.hashes(dataclasses.replace(made[0], **change))
