"""Adapters against PEFT: logits in float32, for folders that either side wrote."""

import jax
import numpy as np
import peft
import pytest
import torch
from test_models import CASES, TINY, _apply, _open_torch, _tokens, _torch_logits, _torch_model

from jaxpref.models import adapters, lora, pretrained

FAMILIES = [  # and whether the layers are stacked
    ("llama", True), ("mistral", False), ("gpt2", False), ("gpt2", True), ("gpt_neox", False),
    ("gpt_neox", True), ("olmo", False), ("gemma", True), ("qwen2", True), ("qwen3", False),
    ("phi3", True), ("gemma3_text", False), ("olmo2", True),
]  # fmt: skip
FUSED = {
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
}


def adapted(case, **options):
    """A tiny model of torch with adapters whose B is not zero."""
    model = _torch_model(*CASES[case])
    family = CASES[case][0]
    targets = FUSED.get(family, ["q_proj", "v_proj", "down_proj"])
    settings = {"target_modules": targets, "r": 3, "lora_alpha": 5} | options
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def both(case, folder, **options):
    """Theirs with adapters, and the base as we open it."""
    _torch_model(*CASES[case]).save_pretrained(folder / "base")
    model = adapted(case, **options)
    model.save_pretrained(folder / "adapters")
    return model, folder / "base"


def ours(base, folder, **options):
    """Our logits with the adapters of a folder, beside the model and the adapters."""
    model = pretrained.load(base, **options)
    found = adapters.load(folder, model.params, model.config, family=model.family)
    policy = lora.attach(model.policy, model.params, alpha=found.alpha)
    return np.asarray(_apply(policy, found.adapters, _tokens())), model, found


@pytest.mark.parametrize(("case", "scan"), FAMILIES)
def test_adapters_go_in_and_out_with_the_same_logits(case, scan, tmp_path):
    options = {"target_modules": "all-linear"} if case in ("gpt2", "qwen3") else {}
    theirs, base = both(case, tmp_path, **options)
    expected = _torch_logits(theirs, _tokens())
    plain = _torch_logits(_torch_model(*CASES[case]), _tokens())
    assert np.abs(expected - plain).max() > 0.1  # what the adapters do is seen
    logits, model, found = ours(base, tmp_path / "adapters", scan=scan)
    np.testing.assert_allclose(logits, expected, 0, TINY)
    adapters.save(
        tmp_path / "ours", found.adapters, model.config, family=model.family, alpha=found.alpha
    )
    again = peft.PeftModel.from_pretrained(_torch_model(*CASES[case]), tmp_path / "ours").eval()
    np.testing.assert_allclose(_torch_logits(again, _tokens()), expected, 0, TINY)
    np.testing.assert_allclose(ours(base, tmp_path / "ours", scan=scan)[0], expected, 0, TINY)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_dropout": 0.1},
        {
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 4},
            "alpha_pattern": {"v_proj": 9, "layers.1.self_attn.q_proj": 1},
        },
        {"use_rslora": True, "rank_pattern": {"model.layers.0.mlp.down_proj": 6}},
        {"layers_to_transform": [1]},
    ],
    ids=["rslora", "patterns", "both", "one layer"],
)
def test_settings_mean_what_peft_means(options, tmp_path):
    theirs, base = both("llama", tmp_path, **options)
    expected = _torch_logits(theirs, _tokens())
    logits, model, found = ours(base, tmp_path / "adapters", scan=True)  # ranks are filled up
    np.testing.assert_allclose(logits, expected, 0, TINY)
    assert found.dropout == options.get("lora_dropout", 0.0)
    adapters.save(
        tmp_path / "ours", found.adapters, model.config, family=model.family, alpha=found.alpha
    )
    again = peft.PeftModel.from_pretrained(_torch_model(*CASES["llama"]), tmp_path / "ours").eval()
    np.testing.assert_allclose(_torch_logits(again, _tokens()), expected, 0, TINY)


def test_a_merged_model_opens_in_transformers_to_pefts_logits(tmp_path):
    theirs, base = both("gpt_neox", tmp_path)
    _, model, found = ours(base, tmp_path / "adapters")
    merged = lora.merge(model.params, found.adapters, alpha=found.alpha)
    pretrained.save(tmp_path / "merged", merged, model.config, family=model.family)
    expected = _torch_logits(theirs.merge_and_unload(), _tokens())
    np.testing.assert_allclose(
        _torch_logits(_open_torch(tmp_path / "merged"), _tokens()), expected, 0, TINY
    )


def test_new_adapters_are_drawn_as_peft_draws_them():
    torch.manual_seed(0)
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(300, 4), "x", r=64, lora_alpha=1, config=peft.LoraConfig()
    )
    a = layer.lora_A["x"].weight.detach().numpy()
    kernel = jax.ShapeDtypeStruct((300, 4), np.float32)
    (drawn,) = lora.draw(
        {"x": {"kernel": kernel}}, rank=64, key=jax.random.key(0), targets=["x"]
    ).values()
    # Of 19,200 uniform numbers each; the error of a variance is 0.6 % of it.
    np.testing.assert_allclose(np.var(drawn["a"]), np.var(a), rtol=0.04)
    np.testing.assert_allclose(np.abs(drawn["a"]).max(), np.abs(a).max(), rtol=1e-3)
    assert not layer.lora_B["x"].weight.any()
    assert not drawn["b"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is 'True', expected none"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*, expected none"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"target_modules": ["embed_tokens"]}, "is no lora_A or lora_B of a linear layer"),
        ({"target_modules": ["lm_head"]}, "lm_head.base_layer.weight is no lora_A or lora_B"),
        ({"lora_bias": True}, "lora_bias is 'True', expected none"),
    ],
    ids=["dora", "bias", "whole modules", "pissa", "embedding", "head", "bias of b"],
)
def test_what_is_not_computed_is_refused(options, message, tmp_path):
    _, base = both("llama", tmp_path, **options)
    with pytest.raises(pretrained.PretrainedError, match=message) as found:
        ours(base, tmp_path / "adapters")
    assert "\n" not in str(found.value)
