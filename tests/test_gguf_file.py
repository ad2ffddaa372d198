"""GGUF headers and tensors against the writer of the `gguf` package; every way to be broken."""

import struct

import gguf
import numpy as np
import pytest

from jaxpref.data.gguf_file import read_gguf, read_tensor

FIELDS = {
    "a.number": (7, gguf.GGUFValueType.UINT32),
    "a.negative": (-7, gguf.GGUFValueType.INT64),
    "a.fraction": (0.5, gguf.GGUFValueType.FLOAT64),
    "a.truth": (True, gguf.GGUFValueType.BOOL),
    "a.text": ("naïve 🙂", gguf.GGUFValueType.STRING),
}
VALUES = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
KINDS = {"q4": "Q4_1", "q8": "Q8_0", "half": "F16", "brain": "BF16", "full": "F32"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, (value, kind) in FIELDS.items():
        writer.add_key_value(name, value, kind)
    writer.add_array("a.words", ["one", "", "three"])
    writer.add_array("a.numbers", [3, 1, 2])
    for name, kind in KINDS.items():
        quantisation = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(VALUES, quantisation)
        writer.add_tensor(name, data, raw_dtype=quantisation)
    writer.add_tensor("line", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fields_come_back(written):
    fields = read_gguf(written).fields
    assert {name: fields[name] for name in FIELDS} == {n: v for n, (v, _) in FIELDS.items()}
    assert fields["a.words"] == ["one", "", "three"]
    assert fields["a.numbers"] == [3, 1, 2]
    assert fields["general.architecture"] == "llama"


@pytest.mark.parametrize("name", KINDS)
def test_tensors_come_back_in_float32(written, name):
    kind = gguf.GGMLQuantizationType[KINDS[name]]
    found = read_tensor(read_gguf(written), name)
    assert found.dtype == np.float32
    data = gguf.quants.quantize(VALUES, kind)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, kind))
    # Four bits hold 16 levels between a block's extremes: half a level off at most.
    np.testing.assert_allclose(found, VALUES, atol=np.ptp(VALUES) / 15 / 2)


def test_a_q4_1_block_worked_by_hand(tmp_path):
    # Scale 0.5, minimum -1, then 32 four-bit numbers: low halves first. Each is n / 2 - 1.
    block = struct.pack("<ee", 0.5, -1.0) + bytes(i | (15 - i) << 4 for i in range(16))
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("x", np.frombuffer(block, np.uint8)[None], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    numbers = np.r_[0:16, 15:-1:-1]
    np.testing.assert_array_equal(
        read_tensor(read_gguf(tmp_path / "a.gguf"), "x")[0], numbers / 2 - 1
    )


def test_the_header_agrees_with_the_packages_reader(written):
    ours, theirs = read_gguf(written), gguf.GGUFReader(written)
    assert {t.name: tuple(t.shape[::-1].tolist()) for t in theirs.tensors} == {
        name: tensor.shape for name, tensor in ours.tensors.items()
    }
    assert {t.name: t.data_offset for t in theirs.tensors} == {
        name: tensor.start for name, tensor in ours.tensors.items()
    }


def test_every_cut_of_the_header_is_noticed(written, tmp_path):
    content = written.read_bytes()
    end = content.index(b"line") + 4 + 4 + 8 + 4 + 8  # the last tensor's entry
    cut = tmp_path / "cut.gguf"
    for size in range(4, end, 7):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: truncated GGUF, the header breaks off"):
            read_gguf(cut)


def test_a_cut_tensor_is_named(written, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(written.read_bytes()[: read_gguf(written).tensors["line"].start + 3])
    file = read_gguf(cut)
    assert read_tensor(file, "full").shape == (3, 64)
    with pytest.raises(ValueError, match=r"cut\.gguf: truncated GGUF, tensor line: expected 20"):
        read_tensor(file, "line")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"expected a GGUF file .* found b''"),
        (b"PK\x03\x04 and so on", r"expected a GGUF file .* found b'PK"),
        (b"GGUF" + struct.pack("<I", 1), "version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3), "version 50331648, expected 2 or 3"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + b"\x63\0\0\0",
            "value type 99",
        ),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


def test_an_unknown_quantisation_is_named(written):
    file = read_gguf(written)
    odd = file._replace(tensors={"full": file.tensors["full"]._replace(quantisation=99)})
    with pytest.raises(ValueError, match=r"of shape .3, 64. is quantised as type 99, which gguf"):
        read_tensor(odd, "full")
