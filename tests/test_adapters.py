"""Folders of adapters: what was saved comes back, and what does not fit is named in one line."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_decoder import TOKENS
from test_lora import ALPHA, TWO, adapted, moved, stacked

from jaxpref.models import adapters, lora
from jaxpref.models.weights import PretrainedError

CONFIG = TWO["llama"]


@pytest.fixture
def folder(tmp_path):
    """With adapters of a model, and those adapters."""
    found = moved(adapted()[3])
    adapters.save(tmp_path, found, CONFIG, family="llama", alpha=ALPHA, base="org/small")
    return tmp_path, found


def load(folder, *, scan=False, params=None):
    params = adapted(scan=scan)[1] if params is None else params
    return adapters.load(folder, params, CONFIG, family="llama")


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors(folder, update):
    file = folder / "adapter_model.safetensors"
    found = safetensors.numpy.load_file(file)
    update(found)
    safetensors.numpy.save_file({n: np.ascontiguousarray(x) for n, x in found.items()}, file)


def test_what_is_saved_comes_back(folder):
    folder, saved = folder
    found = load(folder)
    for ours, theirs in zip(jax.tree.leaves(found.adapters), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32))
    assert set(found.alpha.values()) == {ALPHA}
    assert load(folder, scan=True).adapters.keys() == stacked(saved).keys()
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "org/small"
    assert values["target_modules"] == sorted(
        [f"self_attn.{x}_proj" for x in "kqvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    )


def test_a_stack_and_layers_apart_write_the_same_files(folder, tmp_path):
    folder, saved = folder
    there = tmp_path / "stacked"
    adapters.save(there, stacked(saved), CONFIG, family="llama", alpha=ALPHA, base="org/small")
    for file in folder.glob("adapter_*"):
        assert file.read_bytes() == (there / file.name).read_bytes()


def test_three_kernels_of_one_module_become_one_of_their_ranks(tmp_path):
    config = TWO["gpt_neox"]
    _, params, policy, drawn = adapted("gpt_neox")
    some = moved(drawn)
    del some["layers.0.attention.key"]
    adapters.save(tmp_path, some, config, family="gpt_neox", alpha=ALPHA)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(values["rank_pattern"].values()) == [6, 9]
    found = adapters.load(tmp_path, params, config, family="gpt_neox")
    again = lora.attach(adapted("gpt_neox")[0], params, alpha=found.alpha)
    np.testing.assert_allclose(
        jax.jit(again.hidden)(found.adapters, TOKENS),
        jax.jit(policy.hidden)(some, TOKENS),
        rtol=1e-5,  # float32 in the file
        atol=1e-5,
    )


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def less(found, *ends):
    for name in [n for n in found if any(end in n for end in ends)]:
        del found[name]


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda t: t.update({f"{Q}B.weight": np.zeros((9, 3))}),
         "made for org/small: tensor .*q_proj.lora_B.weight has shape (9, 3), expected (24, 3)"),
        (lambda t: t.update({f"{Q}A.weight": np.zeros((2, 12))}), "expected (3, 12) by rank"),
        (lambda t: less(t, f"{Q}A"), "q_proj.lora_A.weight is missing, expected beside"),
        (lambda t: less(t, "layers.1.mlp"), "adapters of mlp.down_proj in 1 layers, expected all"),
        (lambda t: t.update({Q.replace("0", "7") + "A.weight": np.zeros((3, 12))}),
         "no kernel model.layers.7.self_attn.q_proj, expected such as model.layers.0.self_attn."),
        (lambda t: t.update({"x": np.zeros(1)}), "tensor x is no lora_A or lora_B of a linear"),
        (lambda t: t.clear(), "no tensor, expected those of adapters"),
    ],
    ids=["out", "rank", "half", "layers", "deeper", "stranger", "empty"],
)  # fmt: skip
def test_adapters_of_another_base_are_named(folder, update, message):
    tensors(folder[0], update)
    with pytest.raises(PretrainedError) as found:
        load(folder[0])
    first, _, rest = message.partition(".*")
    assert first in str(found.value)
    assert rest in str(found.value)
    assert str(found.value).startswith(f"{folder[0]}/adapter_model.safetensors: ")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"use_dora": True}, "use_dora is 'True', expected none: it is not computed here"),
        ({"something_new": {"x": 1}}, "something_new is \"{'x': 1}\", expected none"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base"),
        ({"r": "8"}, "_proj is '8', expected above 0"),
        ({"lora_alpha": None}, "_proj is None, expected above 0"),
        ({"rank_pattern": {"(": 2}}, "_proj is not to be found (missing )"),
    ],
    ids=["kind", "bias", "dora", "unknown", "start", "rank", "alpha", "pattern"],
)
def test_settings_that_change_the_formula_are_named(folder, values, message):
    change(folder[0], **values)
    with pytest.raises(PretrainedError) as found:
        load(folder[0])
    assert message in str(found.value)
    assert str(found.value).startswith(f"{folder[0]}/adapter_config.json: ")
    assert "\n" not in str(found.value)


def test_folders_without_adapters_are_named(folder, tmp_path):
    with pytest.raises(PretrainedError, match=r"none/adapter_config.json: no such file, expected"):
        load(tmp_path / "none")
    file = folder[0] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(PretrainedError, match=r"adapter_model.safetensors: cut off in tensor"):
        load(folder[0])
    with pytest.raises(PretrainedError, match="adapters: got none, expected at least one"):
        adapters.save(tmp_path / "a", {}, CONFIG, family="llama", alpha=1.0)
    other = {"layers.5.mlp.up": adapted()[3]["layers.0.mlp.up"]}
    with pytest.raises(PretrainedError, match=r"layers.5.mlp.up is for a kernel \(12, 10\), exp"):
        adapters.save(tmp_path / "a", other, CONFIG, family="llama", alpha=1.0)
    assert not (tmp_path / "a").exists()
