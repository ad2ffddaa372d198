"""The tables of docs/formats.md name what the code reads: families, GGUF kinds, quantisations."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxpref.data.gguf_file import Gguf, Tensor, read_tensor
from jaxpref.data.gguf_vocabulary import CUTS
from jaxpref.data.pieces import PIECES
from jaxpref.models.families import FAMILIES
from jaxpref.models.headers import ARCHITECTURES

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"


def column(place):
    """The words in code of one column of the table of models."""
    rows = PAGE.read_text().split("| folders: `model_type`")[1].split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"`([^`]+)`", row.split("|")[1:-1][place]) for row in rows]


def words(place):
    return [word for row in column(place) for word in row]


def test_the_families_and_kinds_of_the_table_are_those_that_are_read():
    assert words(0) == [
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2",
        "phi3", "smollm3", "gpt2", "gpt_neox",
    ]  # fmt: skip
    assert set(words(0)) == set(FAMILIES)
    assert words(1) == list(ARCHITECTURES)
    kinds = column(2)
    assert [kind[1] for kind in kinds[:-1]] == list(CUTS)
    assert {kind[0] for kind in kinds[:-1]} == {"gpt2"}
    assert kinds[-1] == [PIECES]


@pytest.mark.parametrize("name", sorted(words(3)))
def test_the_quantisations_of_the_table_are_undone(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    path = tmp_path / "a"
    path.write_bytes(bytes(2 * size))
    file = Gguf(path, {}, {"x": Tensor((2, block), int(kind), 0, path)})
    found = read_tensor(file, "x")
    assert found.shape == (2, block)
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I8", "I32", "F64"])
def test_others_are_refused(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    path = tmp_path / "a"
    path.write_bytes(bytes(4096))
    file = Gguf(path, {}, {"x": Tensor((1, 256), int(kind), 0, path)})
    with pytest.raises(ValueError, match=r"a: tensor x of shape \(1, 256\) is quantised as type"):
        read_tensor(file, "x")
