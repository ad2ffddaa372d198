"""SentencePiece vocabularies in GGUF files against the joining of neighbours written out below."""

import functools
import itertools
import re

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from jaxpref.data.files import DataError
from jaxpref.data.pieces import merges
from jaxpref.data.tokenizer import Tokenizer

TEXT = "No one knows the note. Say no, sure! Never say never; known, unknown, nevermore. " * 3
TEXT += "naïve café über 東京 the  two   spaces"
MARK = "\u2581"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
CALL = "<call>"
RUNS = ("   ", "  ")  # of spaces, as Gemma has them: written as such and found before pieces are


@functools.cache
def vocabulary():
    """Pieces with their scores and types: later merges score less, single characters least."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    ids = trained.get_vocab()
    pieces = sorted(ids, key=lambda piece: (len(piece) == 1, ids[piece]))
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, CALL, *RUNS]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0] * 3
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [1] * len(pieces) + [USER_DEFINED] * 3
    return tokens, scores, types


def write(path, *, tokens=None, scores=None, **fields):
    usual, usual_scores, types = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens or usual)
    writer.add_token_scores(scores or usual_scores)
    writer.add_token_types(types)
    for name, value in fields.items():
        kind = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}[type(value)]
        writer.add_key_value(f"tokenizer.ggml.{name}", value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_hand(text, *, prefix):
    """Joins, again and again, the two neighbours of the best union; the rest becomes bytes."""
    tokens, scores, _ = vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    added = (CALL, "<s>", "</s>", *RUNS)
    for stretch in re.split(f"({'|'.join(map(re.escape, added))})", text):
        if stretch in added:
            found.append(ids[stretch])
            continue
        parts = list(((" " if prefix and stretch else "") + stretch).replace(" ", MARK))
        while True:
            unions = [ids.get(a + b) for a, b in itertools.pairwise(parts)]
            known = [(-scores[i], at) for at, i in enumerate(unions) if i is not None]
            if not known:
                break
            _, at = min(known)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            raw = [f"<0x{byte:02X}>" for byte in part.encode()]
            found += [ids[part]] if part in ids else [ids[byte] for byte in raw]
    return found


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    spaced = Tokenizer.from_gguf(write(folder / "a.gguf"))
    return {
        True: spaced,
        False: Tokenizer.from_gguf(write(folder / "b.gguf", add_space_prefix=False)),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([*TEXT.split(), " ", "  ", "\n", "é", "🙂", CALL, "<s>", "\x00", "ever"]),
        max_size=12,
    ),
    st.booleans(),
)
def test_ids_are_those_of_joining_the_best_neighbours(opened, words, prefix):
    for glue in ("", " "):
        text = glue.join(words)
        found = opened[prefix].encode(text, bos=False)
        assert found == by_hand(text, prefix=prefix)
        # After an added token its space is shown.
        if not (prefix and any(token in text for token in (CALL, "<s>", "  "))):
            assert opened[prefix].decode(found) == text


def test_what_the_file_leaves_out_means_what_llama_cpp_means(opened, tmp_path):
    tokenizer = opened[True]
    assert tokenizer.adds_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab) == (1, 2, len(vocabulary()[0]))
    assert tokenizer.encode("no") == [1, *by_hand("no", prefix=True)]
    other = {"bos_token_id": 2, "eos_token_id": 1, "add_bos_token": False}
    tokenizer = Tokenizer.from_gguf(write(tmp_path / "a.gguf", **other))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (2, 1, False)


def test_pieces_travel_as_a_folder(opened, tmp_path):
    texts = ["No one\nknows é 🙂", "<s>say <call> no", ""]
    for prefix, tokenizer in opened.items():
        tokenizer.save(tmp_path / str(prefix))
        again = Tokenizer.from_folder(tmp_path / str(prefix))
        assert again.adds_bos
        assert again.encode_many(texts) == tokenizer.encode_many(texts)


def test_merges_are_all_cuts_of_a_piece_best_first():
    pieces = ["a", "b", "c", "ab", "bc", "abc"]
    assert merges(pieces, [-9.0, -9.0, -9.0, -3.0, -2.0, -1.0]) == [
        ("a", "bc"), ("ab", "c"), ("b", "c"), ("a", "b"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0, 1.0]}, "tokenizer.ggml.scores, expected [0-9]+, one a token"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000, expected below the [0-9]+ of its tok"),
        ({"tokens": ["a"]}, "bos_token_id is 1, expected below the 1 of its tokens"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, change, message):
    path = tmp_path / "a.gguf"
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        Tokenizer.from_gguf(write(path, **change))
