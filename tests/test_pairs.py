"""Reading, encoding: every fault has its line, every rule its hand-worked case."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxpref.data import pairs
from jaxpref.data.files import DataError, TextPair, read_pairs
from jaxpref.data.tokenizer import Tokenizer

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
VOCAB = ["<s>", "</s>", "<turn>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
BOS, EOS, TURN = 0, 1, 2


def ids(text):
    return [VOCAB.index(c) for c in text]


def tokenizer_with(*, adds_bos):
    """Letters, the merge "ab", no splitting into words."""
    vocab = {token: i for i, token in enumerate(VOCAB)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(VOCAB[:3])
    template = "<s>{% for m in messages %}{{ m.content or raise_exception('no content') }}<turn>"
    template += "{% endfor %}"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special, adds_bos, template)


@pytest.fixture(scope="session")
def plain():
    return tokenizer_with(adds_bos=False)


@pytest.fixture(scope="session")
def with_bos():
    return tokenizer_with(adds_bos=True)


def lists(pair):
    return [tokens.tolist() for tokens in pair.tokens]


def one(row, tokenizer, **options):
    (pair,), counts = pairs.encode([row], tokenizer, **({"end": None} | options))
    return pair, counts


# Reading


def test_read_keeps_texts_and_says_where_they_stand(tmp_path):
    path = tmp_path / "pairs.jsonl"
    messages = [{"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": " yes\n"}]
    rows = [ROW | {"more": 1}, {"prompt": messages, "chosen": answer, "rejected": "no"}]
    path.write_text("\n".join(json.dumps(row) for row in rows).replace("\n", "\n\n"))
    assert read_pairs(path) == [
        TextPair("a", "b", "c", f"{path}, line 1", 0),
        TextPair(messages, " yes\n", "no", f"{path}, line 3", 1),
    ]


def test_read_takes_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n")
    assert read_pairs(path) == [TextPair("a", "b", "c", f"{path}, line 1", 0)]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prompt": "a", ', "not valid JSON (Expecting property name"),
        ('["a", "b", "c"]', "expected a JSON object, found a list"),
        ('{"prompt": "a", "chosen": "b"}', "no column 'rejected', found 'prompt', 'chosen'"),
        (ROW | {"prompt": 3}, "prompt is a int, expected a text or chat messages"),
        (ROW | {"prompt": ["a"]}, "prompt is a list, expected a text or chat messages"),
        (ROW | {"prompt": []}, "prompt is a list, expected a text or chat messages"),
        (ROW | {"chosen": None}, "chosen is a NoneType, expected a text or one assistant message"),
        (ROW | {"chosen": [{"role": "user", "content": "b"}]}, "chosen is a list, expected a text"),
        (ROW | {"chosen": [{"role": "assistant", "content": "b"}] * 2}, "chosen is a list"),
        (ROW | {"rejected": " \n"}, "rejected is an empty response"),
        (ROW | {"rejected": "b"}, "chosen and rejected are identical"),
    ],
)
def test_every_fault_of_a_line_is_one_line_that_names_it(tmp_path, line, fault):
    path = tmp_path / "pairs.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(ROW)}\n\n{text}\n")
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: {fault}")
    assert "\n" not in message


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_pairs(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"pairs.jsonl: the file is empty$"):
        read_pairs(path)
    with pytest.raises(DataError, match=r"none.jsonl: no such file$"):
        read_pairs(tmp_path / "none.jsonl")


# Encoding


def test_pair_by_hand(plain):
    # "xa" + "b" merges to x, ab: the prompt keeps only x. "xa" + "c" stays x, a, c.
    pair, counts = one(TextPair("xa", "b", "cd"), plain, end="eos")
    assert lists(pair) == [[*ids("x"), VOCAB.index("ab"), EOS], [*ids("xacd"), EOS]]
    assert pair.starts == (1, 2)
    assert pair.merged == (True, False)
    assert counts == pairs.Counts(kept=1, dropped=0, truncated=0, merged=1)
    assert one(TextPair("xa", "b", "bb"), plain)[1].merged == 2


@pytest.mark.parametrize(("end", "closing"), [(None, []), ("eos", [EOS]), (TURN, [TURN])])
def test_end_is_what_the_caller_names_and_nothing_else(plain, end, closing):
    pair, _ = one(TextPair("x", "c", "d"), plain, end=end)
    assert lists(pair) == [[*ids("xc"), *closing], [*ids("xd"), *closing]]


def test_end_must_exist(plain):
    row = TextPair("x", "c", "d")
    without = Tokenizer(plain.backend, special={}, adds_bos=False)
    with pytest.raises(DataError, match="end is 'eos', but this tokenizer has none"):
        pairs.encode([row], without, end="eos")
    with pytest.raises(DataError, match=f"end is 4000, expected .* an id below {len(VOCAB)}"):
        pairs.encode([row], plain, end=4000)


def test_exactly_one_bos_in_each_sequence(plain, with_bos):
    for prompt in ("x", "<s>x", [{"role": "user", "content": "x"}]):
        pair, _ = one(TextPair(prompt, "c", "d"), with_bos)
        assert [tokens.count(BOS) for tokens in lists(pair)] == [1, 1]
        assert [tokens[0] for tokens in lists(pair)] == [BOS, BOS]
    assert lists(one(TextPair("x", "c", "d"), plain)[0]) == [ids("xc"), ids("xd")]
    # With a BOS even the empty prompt gives the response a context.
    assert one(TextPair("", "c", "d"), with_bos)[0].starts == (1, 1)


def test_messages_go_through_the_chat_template(plain):
    pair, _ = one(TextPair([{"role": "user", "content": "x"}], "c", "d"), plain)
    assert lists(pair) == [[BOS, *ids("x"), TURN, *ids(text), TURN] for text in "cd"]
    assert pair.starts == (3, 3)
    assert pair.ends == (1, 1)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (TextPair("", "c", "d"), "row 1: prompt: no token of it stands before"),
        (TextPair("a", "b", "d"), "row 1: prompt: no token of it stands before"),
        (TextPair("x", "", "d", "F, line 7"), "F, line 7: response: it adds no token"),
        (TextPair([{"role": "user"}], "c", "d"), "row 1: chat template: no content"),
        (TextPair("x", "c", "c"), "row 1: chosen and rejected have the same token ids"),
    ],
)
def test_faults_that_only_ids_show_name_the_row(plain, row, fault):
    with pytest.raises(DataError) as caught:
        pairs.encode([TextPair("x", "c", "d"), row], plain, end=None)
    assert str(caught.value).startswith(fault)


ROWS = [TextPair("wxyz", "c", "dd"), TextPair("x", "c", "dd")]


def test_a_prompt_over_the_limit_is_never_cut_in_silence(with_bos):
    # 5 prompt tokens with the BOS; 7 in all.
    for limits in ({"prompt_limit": 4}, {"limit": 6}):
        with pytest.raises(DataError, match="row 0: prompt is 1 tokens too long for"):
            pairs.encode(ROWS, with_bos, end=None, **limits)
        (kept,), counts = pairs.encode(ROWS, with_bos, end=None, too_long="drop", **limits)
        assert lists(kept)[0] == [BOS, *ids("xc")]
        assert counts == pairs.Counts(kept=1, dropped=1, truncated=0, merged=0)
    for limits in ({"prompt_limit": 5}, {"limit": 7}):
        assert pairs.encode(ROWS, with_bos, end=None, **limits)[1].kept == 2


def test_cutting_keeps_the_bos_and_cuts_both_sequences_alike(with_bos, plain):
    options = {"end": "eos", "too_long": "truncate_left"}
    (cut, _), counts = pairs.encode(ROWS, with_bos, prompt_limit=3, **options)
    assert lists(cut) == [[BOS, *ids("yzc"), EOS], [BOS, *ids("yzdd"), EOS]]
    assert cut.starts == (3, 3)
    assert counts == pairs.Counts(kept=2, dropped=0, truncated=1, merged=0)
    (cut, _), _ = pairs.encode(ROWS, plain, limit=4, **options)
    assert lists(cut) == [[*ids("zc"), EOS], [*ids("zdd"), EOS]]


def test_a_response_is_never_cut(with_bos):
    row = TextPair("wx", "c", "ddddd", "F, line 2")
    with pytest.raises(DataError, match=r"F, line 2: no cut .* a response of 6 tokens"):
        pairs.encode([row], with_bos, end="eos", limit=7, too_long="truncate_left")
    assert pairs.encode([row], with_bos, end="eos", limit=7, too_long="drop")[1].dropped == 1
    (fits,), _ = pairs.encode([row], with_bos, end="eos", limit=8, too_long="truncate_left")
    assert lists(fits)[1] == [BOS, *ids("xddddd"), EOS]


def test_an_unknown_policy_is_refused(plain):
    with pytest.raises((ValueError, TypeError), match="too_long"):
        pairs.encode(ROWS, plain, end=None, too_long="cut")


texts = st.text(st.sampled_from("abxé \n"), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(prompt=texts, chosen=texts, rejected=texts, limit=st.integers(2, 8))
def test_laws_of_encoding(with_bos, prompt, chosen, rejected, limit):
    assume(chosen and rejected and chosen != rejected)
    row = TextPair(prompt, chosen, rejected)
    pair, _ = one(row, with_bos)
    for tokens, text in zip(lists(pair), (chosen, rejected), strict=True):
        assert tokens == with_bos.encode(prompt + text)
    assert len({tuple(t[: min(pair.starts)]) for t in lists(pair)}) == 1

    kept, counts = pairs.encode([row], with_bos, end=None, prompt_limit=limit, too_long="drop")
    assert len(kept) == (max(pair.starts) <= limit) == 1 - counts.dropped
    cut, _ = one(row, with_bos, prompt_limit=limit, too_long="truncate_left")
    assert max(cut.starts) == min(max(pair.starts), limit)
    for before, after, i, j in zip(lists(pair), lists(cut), pair.starts, cut.starts, strict=True):
        assert before[i:] == after[j:]
        assert after[0] == BOS


# The hash


def test_hash_changes_with_every_thing_that_a_reference_depends_on(plain):
    rows = [TextPair("x", "c", "dd"), TextPair("xy", "c", "dd")]
    encoded, _ = pairs.encode(rows, plain, end=None)
    first = pairs.sha256(encoded)
    assert first == pairs.sha256(pairs.encode(rows, plain, end=None)[0])
    (chosen, rejected), starts, merged = encoded[0][:3]
    changes = [
        encoded[::-1],
        encoded[:1],
        pairs.encode(rows, plain, end="eos")[0],
        [pairs.TokenPair((rejected, chosen), starts, merged), encoded[1]],
        [pairs.TokenPair((chosen, rejected), (2, 1), merged), encoded[1]],
        [pairs.TokenPair((chosen, rejected + np.int32(1)), starts, merged), encoded[1]],
    ]
    assert len({first, *map(pairs.sha256, changes)}) == 1 + len(changes)


def test_hash_of_one_pair_by_hand():
    pair = pairs.TokenPair(
        (np.array([7, 9], np.int32), np.array([7], np.int32)), (1, 1), (False,) * 2
    )
    content = [(2).to_bytes(8, "little"), (1).to_bytes(8, "little"), b"\7\0\0\0\11\0\0\0"]
    content += [(1).to_bytes(8, "little"), (1).to_bytes(8, "little"), b"\7\0\0\0"]
    assert pairs.sha256([pair]) == hashlib.sha256(b"".join(content)).hexdigest()
