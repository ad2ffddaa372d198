"""Files of models with a random part changed: what they mean, or one line; never anything else."""

import copy
import dataclasses
import json
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pretrained import write_folder, write_gguf
from test_tokenizer import pieces_folder as _pieces_folder

from jaxpref.data.files import DataError
from jaxpref.data.gguf_file import Gguf, Tensor
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import headers, pretrained, sources
from jaxpref.models.configs import from_json
from jaxpref.models.decoder import DecoderConfig
from jaxpref.models.pretrained import PretrainedError

pieces_folder = _pieces_folder
PLACE = Path("a.gguf")
EXAMPLES = {"deadline": None, "derandomize": True}

# A header against what each field means

HEADER = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
}
BASE = DecoderConfig(*(11, 32, 2, 4, 2, 8, 48), max_positions=64, tied=True)
MEANS = {  # fields that may change the decoder, and the one field of it that each changes
    "block_count": "layers",
    "context_length": "max_positions",
    "embedding_length": "width",
    "feed_forward_length": "mlp_width",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_epsilon",
    "attention.sliding_window": "window",
    "rope.freq_base": "rope_base",
}
SCALES = ("rope.scaling.factor", "rope.scale_linear")
KEYS = sorted(
    {
        key.removeprefix("{arch}.")
        for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM)
        for key in vars(group).values()
        if isinstance(key, str) and key.startswith("{arch}.")
    }
    | {"rope.scale_linear", "of.tomorrow"}
)
NUMBERS = (0, 1, 2, 4, 8, 32, 64, 0.0, 0.5, 1.0, 8.0, 1e6, -1, float("nan"), 10**12)
VALUES = (*NUMBERS, True, False, "", "none", "linear", "yarn", "8", [2, 2], [1, 2], [])


def message_of(work, *errors):
    """What an error of these kinds says, None without one; any other is let through."""
    try:
        work()
    except errors as error:
        return str(error)
    return None


def is_one_line(message, place):
    return message is None or ("\n" not in message and str(place) in message)


def of_header(fields):
    tensors = {"token_embd.weight": Tensor((11, 32), 0, 0, PLACE)}
    return from_json(headers.values_of(Gguf(PLACE, fields, tensors)), PLACE)


def test_the_header_that_is_changed_below():
    assert of_header(HEADER) == BASE


def allowed(key, value):
    """The decoders that a header with this field may stand for; none: it must be refused."""
    value = value[0] if isinstance(value, list) and value and len(set(value)) == 1 else value
    if key in MEANS:
        if key == "attention.sliding_window" and value == 0:  # no window
            return [BASE]
        kind = int if key == "attention.sliding_window" else type(getattr(BASE, MEANS[key]))
        found = [dataclasses.replace(BASE, **{MEANS[key]: kind(value)})]
        if key in ("embedding_length", "attention.head_count"):  # the heads' width follows
            wide, heads = (value, 4) if key == "embedding_length" else (32, value)
            found = [dataclasses.replace(found[0], head_width=int(wide // heads))]
        return found
    if key == "attention.key_length":
        return [dataclasses.replace(BASE, head_width=int(value))]
    if key in SCALES:
        factors = None if value in (0, 1) else (float(value),) * 4
        return [dataclasses.replace(BASE, rope_factors=factors)]
    neutral = {
        "rope.scaling.type": ("none", "linear"),
        "attention.value_length": (8,),
        "rope.dimension_count": (8,),
        "rope.freq_base_swa": (10000.0,),
        "attention.causal": (True,),
        "rope.scaling.attn_factor": (1,),
        "rope.scaling.yarn_attn_factor": (1,),
        **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0, 1)),
        "attention.output_scale": (0, 1),
    }
    read = {*headers.HARMLESS}
    off = key not in neutral and value in (0, False)  # 0 and false switch a thing off
    return [BASE] if key in read or value in neutral.get(key, ()) or off else []


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_field_means_what_it_means_or_is_refused(value):
    refused = 0
    for key in KEYS:
        header = {**HEADER, f"llama.{key}": value}
        message = message_of(lambda header=header: of_header(header), ValueError)
        if message is None:
            assert of_header(header) in allowed(key, value), key
        else:
            assert "\n" not in message
            refused += 1
    assert 50 < refused < len(KEYS)


@pytest.mark.parametrize("key", sorted(HEADER))
def test_a_field_that_is_dropped_has_a_default_or_is_missed(key):
    header = {name: value for name, value in HEADER.items() if name != key}
    defaults = {
        "llama.context_length": {"max_positions": 2048},
        "llama.attention.head_count_kv": {"kv_heads": 4},
        "llama.attention.layer_norm_rms_epsilon": {"norm_epsilon": 1e-6},
        "llama.rope.freq_base": {},
    }
    if key in defaults:
        assert of_header(header) == dataclasses.replace(BASE, **defaults[key])
    else:
        with pytest.raises(ValueError, match=r"missing|not supported"):
            of_header(header)


# Bytes and entries of real files


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    return folder, write_gguf(folder / "whole.gguf").read_bytes()


@settings(max_examples=200, **EXAMPLES)
@given(st.integers(0, 1500), st.integers(0, 255), st.integers(0, 3))
def test_any_byte_of_a_gguf_header_may_be_wrong(gguf_bytes, at, byte, more):
    folder, whole = gguf_bytes
    path = folder / "damaged.gguf"
    path.write_bytes(whole[:at] + bytes([byte] * (1 + more)) + whole[at + 1 + more :])
    for work in (opened_gguf, Tokenizer.from_gguf):
        message = message_of(lambda work=work: work(path), PretrainedError, DataError)
        assert is_one_line(message, path)


def opened_gguf(path):
    opened = sources.open_gguf(path)
    from_json(opened.values, path)
    for name in opened.tensors.shapes:
        opened.tensors.read(name)


JSON = st.recursive(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            3,
            0.5,
            1e300,
            float("inf"),
            10**30,
            "",
            "<s>",
            "gelu",
            "llama",
        ]
    ),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.just("content"), inside),
    max_leaves=2,
)


def places(value, at=()):
    """The paths of all entries of a JSON value; of a long list, or of a vocabulary, a few."""
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in list(inside)[:12]:
            yield (*at, key)
            yield from places(entry, (*at, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    *first, last = path
    holder = value
    for key in first:
        holder = holder[key]
    if new is Ellipsis:
        del holder[last]
    else:
        holder[last] = new
    return value


NEW = JSON | st.just(...)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@settings(max_examples=40, **EXAMPLES)
@given(st.data())
def test_any_entry_of_a_configuration_may_be_wrong(model_folder, data):
    file = model_folder / "config.json"
    whole = json.loads(file.read_text())
    whole |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    path = data.draw(st.sampled_from(sorted(places(whole), key=str)))
    file.write_text(json.dumps(changed(whole, path, data.draw(NEW))))
    message = message_of(lambda: pretrained.load(model_folder), PretrainedError)
    assert is_one_line(message, model_folder)
    write_folder(model_folder)


@settings(max_examples=100, **EXAMPLES)
@given(st.data())
def test_any_entry_of_a_tokenizers_files_may_be_wrong(pieces_folder, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    names = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: json.loads((pieces_folder / name).read_text()) for name in names}
    whole["tokenizer_config.json"] |= {
        "chat_template": [{"name": "default", "template": "x"}],
        "additional_special_tokens": ["<x>"],
        "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    }
    name = data.draw(st.sampled_from(names))
    path = data.draw(st.sampled_from(sorted(places(whole[name]), key=str)))
    whole[name] = changed(whole[name], path, data.draw(NEW))
    for name, content in whole.items():
        (folder / name).write_text(json.dumps(content))
    message = message_of(lambda: Tokenizer.from_folder(folder).encode("no é 🙂 note"), DataError)
    assert is_one_line(message, folder)


def test_a_number_of_five_thousand_digits_and_a_deep_nest_are_one_line(model_folder, tmp_path):
    for content in ('{"a": ' + "9" * 5000 + "}", "[" * 100_000):
        (model_folder / "config.json").write_text(content)
        with pytest.raises(PretrainedError, match=r"config.json: not valid JSON \(.*\)$"):
            pretrained.load(model_folder)
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer \(.*\)$"):
            Tokenizer.from_folder(tmp_path)
    write_folder(model_folder)
