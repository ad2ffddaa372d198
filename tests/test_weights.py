"""Names and layouts of the files: worked by hand where numbers move, and there and back."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpref.models import decoder, paths, weights
from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.families import FAMILIES
from jaxpref.models.sources import _GGUF_LAYOUTS
from jaxpref.models.weights import Layout, PretrainedError, Source

SIZES = {"vocab": 11, "width": 8, "layers": 2, "heads": 2, "head_width": 4, "mlp_width": 12}
LLAMA = DecoderConfig(**SIZES, kv_heads=1, tied=False)
GPT2 = DecoderConfig(
    **SIZES,
    kv_heads=2,
    norm="layer",
    gated=False,
    positions="learned",
    max_positions=16,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
NEOX = DecoderConfig(
    **SIZES,
    kv_heads=2,
    norm="layer",
    gated=False,
    parallel_residual=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tied=False,
)
CASES = {"llama": LLAMA, "gpt2": GPT2, "gpt_neox": NEOX}
ATTENTION = [f"layers.0.attention.{name}.kernel" for name in ("query", "key", "value")]


def source(tensors):
    shapes = {name: x.shape for name, x in tensors.items()}
    return Source(Path("here"), shapes, dict.fromkeys(shapes, Path("here/file")), tensors.get)


def read_one(tensor, name, paths, layout, config):
    """Reads a model that is one tensor, of the named parameters."""
    tensors = {name: np.asarray(tensor, np.float32)}
    width = np.shape(tensor)[0] // len(paths)
    ours = {path: (np.shape(tensor)[1], width) for path in paths}
    return weights.read(source(tensors), ours, config, layout)


def random_arrays(config):
    shapes = paths.shapes(decoder.abstract(config)[1], config.layers)
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def test_torch_kernels_are_transposed():
    layout = Layout({"layers.*.mlp.up": "h.*.up", "embedding": "e", "unembedding": "u"})
    found = read_one(
        [[1, 2], [3, 4], [5, 6]], "h.0.up.weight", ["layers.0.mlp.up.kernel"], layout, LLAMA
    )
    np.testing.assert_array_equal(found["layers.0.mlp.up.kernel"], [[1, 3, 5], [2, 4, 6]])


def test_neighbouring_rope_pairs_are_drawn_apart():
    # One key head of width 4: rows 0 1 are a pair, 2 3 the other; ours pairs 0 with 2, 1 with 3.
    rows = np.arange(4)[:, None]
    found = read_one(rows, "blk.0.attn_k.weight", ATTENTION[1:2], _GGUF_LAYOUTS["llama"], LLAMA)
    np.testing.assert_array_equal(found[ATTENTION[1]], [[0, 2, 1, 3]])
    straight = read_one(rows, "blk.0.attn_k.weight", ATTENTION[1:2], _GGUF_LAYOUTS["qwen2"], LLAMA)
    np.testing.assert_array_equal(straight[ATTENTION[1]], [[0, 1, 2, 3]])
    values = read_one(rows, "blk.0.attn_v.weight", ATTENTION[2:], _GGUF_LAYOUTS["llama"], LLAMA)
    np.testing.assert_array_equal(values[ATTENTION[2]], [[0, 1, 2, 3]])


def test_neox_holds_each_heads_query_key_value_together():
    # Two heads of width 4: q0 k0 v0 q1 k1 v1, four rows each.
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    rows = np.arange(24)[:, None]
    found = read_one(rows, name, ATTENTION, FAMILIES["gpt_neox"].layout, NEOX)
    np.testing.assert_array_equal(found[ATTENTION[0]], [[0, 1, 2, 3, 12, 13, 14, 15]])
    np.testing.assert_array_equal(found[ATTENTION[1]], [[4, 5, 6, 7, 16, 17, 18, 19]])
    np.testing.assert_array_equal(found[ATTENTION[2]], [[8, 9, 10, 11, 20, 21, 22, 23]])


def test_a_tensor_is_read_when_it_is_asked_for_and_one_is_held():
    tensors, asked = weights.write(random_arrays(LLAMA), LLAMA, FAMILIES["llama"].layout), []
    whole = source(tensors)

    def read(name):
        asked.append(name)
        return tensors[name]

    shapes = paths.shapes(decoder.abstract(LLAMA)[1], LLAMA.layers)
    found = weights.read(whole._replace(read=read), shapes, LLAMA, FAMILIES["llama"].layout)
    assert asked == ["model.embed_tokens.weight"]  # to see whether its twin is another
    for path in (*ATTENTION[:2], ATTENTION[1], ATTENTION[0]):
        _ = found[path]
    query, key = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
    assert asked[1:] == [query, key, query]


def test_gpt2_holds_query_key_value_side_by_side_whatever_order_they_are_asked_in():
    name = "transformer.h.0.attn.c_attn.weight"
    row = np.arange(24, dtype=np.float32)[None]
    ours = dict.fromkeys(reversed(ATTENTION), (1, 8))
    found = weights.read(source({name: row}), ours, GPT2, FAMILIES["gpt2"].layout)
    for i, path in enumerate(ATTENTION):
        np.testing.assert_array_equal(found[path], row[:, 8 * i : 8 * i + 8])


@pytest.mark.parametrize("family", CASES)
def test_reading_undoes_writing(family):
    config, layout = CASES[family], FAMILIES[family].layout
    arrays = random_arrays(config)
    tensors = weights.write(arrays, config, layout)
    shapes = {path: x.shape for path, x in arrays.items()}
    found = weights.read(source(tensors), shapes, config, layout)
    assert found.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, dict(found), arrays)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_without_the_prefix_are_a_base_model(family):
    config, layout = CASES[family], FAMILIES[family].layout
    arrays = random_arrays(config)
    tensors = weights.write(arrays, config, layout)
    bare = {name.removeprefix(layout.prefix): x for name, x in tensors.items()}
    assert bare.keys() != tensors.keys()
    shapes = {path: x.shape for path, x in arrays.items()}
    found = weights.read(source(bare), shapes, config, layout)
    jax.tree.map(np.testing.assert_array_equal, dict(found), arrays)


def check(change, message):
    config, layout = LLAMA, FAMILIES["llama"].layout
    arrays = random_arrays(config)
    tensors = weights.write(arrays, config, layout)
    change(tensors)
    shapes = {path: x.shape for path, x in arrays.items()}
    with pytest.raises(PretrainedError) as error:
        weights.read(source(tensors), shapes, config, layout)
    assert str(error.value) == message


def test_a_missing_tensor_is_named_with_its_shape():
    check(
        lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"),
        "here: tensor model.layers.1.self_attn.k_proj.weight is missing, expected shape (4, 8)",
    )


def test_several_missing_tensors_are_counted():
    def change(tensors):
        tensors.pop("model.norm.weight")
        tensors.pop("lm_head.weight")

    check(change, "here: tensor model.norm.weight is missing, expected shape (8,) (and 1 more)")


def test_a_misshapen_tensor_is_named_with_both_shapes():
    check(
        lambda tensors: tensors.update({"model.embed_tokens.weight": np.zeros((12, 8))}),
        "here/file: tensor model.embed_tokens.weight has shape (12, 8), expected (11, 8)",
    )


def test_an_extra_tensor_is_refused():
    name = "model.layers.0.self_attn.q_proj.bias"
    check(
        lambda tensors: tensors.update({name: np.zeros(8)}),
        f"here/file: unexpected tensor {name} of shape (8,), expected no such tensor for this "
        "config",
    )


def test_constants_beside_the_parameters_are_ignored():
    arrays = random_arrays(GPT2)
    tensors = weights.write(arrays, GPT2, FAMILIES["gpt2"].layout)
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 16, 16))  # the causal mask
    shapes = {path: x.shape for path, x in arrays.items()}
    found = weights.read(source(tensors), shapes, GPT2, FAMILIES["gpt2"].layout)
    assert found.keys() == arrays.keys()


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_tied_head_may_stand_in_the_file_if_it_is_the_embedding(shift):
    layout = FAMILIES["gpt2"].layout
    arrays = random_arrays(GPT2)
    tensors = weights.write(arrays, GPT2, layout)
    tensors["lm_head.weight"] = arrays["embedding"] + np.float32(shift)
    shapes = {path: x.shape for path, x in arrays.items()}
    if shift == 0:
        weights.read(source(tensors), shapes, GPT2, layout)
    else:
        with pytest.raises(PretrainedError, match=r"lm_head.weight differs .* the config ties"):
            weights.read(source(tensors), shapes, GPT2, layout)


def test_a_tied_head_excuses_no_other_tensor():
    layout, arrays = FAMILIES["gpt2"].layout, random_arrays(GPT2)
    tensors = weights.write(arrays, GPT2, layout)
    tensors |= {"lm_head.weight": arrays["embedding"], "score.weight": np.zeros((2, 8))}
    shapes = {path: x.shape for path, x in arrays.items()}
    with pytest.raises(PretrainedError, match=r"unexpected tensor score.weight of shape \(2, 8\)"):
        weights.read(source(tensors), shapes, GPT2, layout)
