"""``--lora``: experiments train adapters in place of the model, through the same programs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import smoke

import experiments.displacement as displacement
import experiments.first_order as first_order
import experiments.no_vs_never as no_vs_never
from experiments.protocol import inputs, settings
from jaxpref.models import pretrained

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")

MODULES = [f"attention.{x}" for x in ("query", "key", "value", "output")]
MODULES += [f"mlp.{x}" for x in ("gate", "up", "down")]


def test_the_parameters_are_adapters_and_the_numbers_those_of_the_model(tiny_model):
    model = str(tiny_model)
    subject, plain = inputs.open_model(model, inputs.Compute(lora=3)), pretrained.load(model)
    assert {x.shape[-1] for x in (both["a"] for both in subject.params.values())} == {3}
    assert len(subject.params) == 7
    tokens = np.array([[5, 6, 7]])
    found = jax.jit(subject.policy.hidden)(subject.params, tokens)
    np.testing.assert_array_equal(found, plain.policy.hidden(plain.params, tokens))
    hashes = [inputs.open_model(model, inputs.Compute(lora=rank)).digest for rank in (0, 2, 3)]
    assert len(set(hashes)) == 3
    assert all(x.startswith(hashes[0]) for x in hashes)


def test_first_order_theory_holds_for_adapters(tiny_model, tmp_path):
    config = dataclasses.replace(
        first_order.SMOKE, model=str(tiny_model), lora=2, optimizers=("sgd",), clips=(0.5,),
        sgd_rates=(1e-2, 1e-1),
    )  # fmt: skip
    folder, _ = smoke.command(first_order, config, tmp_path)
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    assert rows[-1]["one"] > 0.99
    assert json.loads((folder / "config.json").read_text())["lora"] == 2
    model = json.loads((folder / "provenance.json").read_text())["model"]
    assert model.startswith(pretrained.hash_params(pretrained.load(str(tiny_model)).params) + "+")


def test_the_demo_and_the_shared_settings_take_adapters(tiny_model, tmp_path):
    options = {"model": str(tiny_model), "lora": 2}
    subject, pairs = settings.load(dataclasses.replace(displacement.SMOKE, **options))
    assert {*subject.params} == {f"layers.{x}" for x in MODULES}  # stacked
    assert pairs.policy is subject.policy
    demo = dataclasses.replace(no_vs_never.SMOKE, train=("all",), **options)
    folder, _ = smoke.command(no_vs_never, demo, tmp_path)
    arrays = dict(np.load(folder / "arrays.npz"))
    assert any("logp" in name and np.ptp(x) > 0 for name, x in arrays.items())


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        (None, -1, "lora: got -1, expected a rank, or 0 for none"),
        ("small", 2, "lora: got 2 with model small, expected a trained model"),
    ],
    ids=["negative", "random base"],
)
def test_what_makes_no_sense_is_named(model, lora, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        inputs.open_model(model or str(tiny_model), inputs.Compute(lora=lora))
