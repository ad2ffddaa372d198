"""Opening a tokenizer's files: Hugging Face folders and GGUF."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxpref.data.files import DataError
from jaxpref.data.gguf_file import read_gguf

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types


class Vocabulary(NamedTuple):
    """What a `jaxpref.data.tokenizer.Tokenizer` is made of, in its order."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    adds_bos: bool
    template: str | None


def _words(digits: str) -> Regex:
    # The splitting rule of tiktoken's cl100k family; the models differ in how digits group.
    return Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _byte_level(*before: pre_tokenizers.PreTokenizer, regex: bool) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*before, last])


# `tokenizer.ggml.pre` -> how text is cut before merging.
_CUTS = {
    "gpt-2": _byte_level(regex=True),
    "smollm": _byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "qwen2": _byte_level(pre_tokenizers.Split(_words(r"\p{N}"), "isolated"), regex=False),
    "llama-bpe": _byte_level(pre_tokenizers.Split(_words(r"\p{N}{1,3}"), "isolated"), regex=False),
}


def from_gguf(path: str | Path) -> Vocabulary:
    """The byte-level BPE inside a GGUF file.

    Kinds of ``tokenizer.ggml.pre``: ``gpt-2``; ``smollm`` (each digit alone); ``qwen2`` (NFC, each
    digit alone); ``llama-bpe`` (Llama 3: digits in threes, whole words before merges, a BOS
    unless the file says otherwise).

    Raises:
      DataError: another kind, or a key is missing; the message names it.
    """
    metadata = read_gguf(path).fields

    def field(name: str) -> Any:
        if f"tokenizer.ggml.{name}" not in metadata:
            raise DataError(f"{path}: no tokenizer.ggml.{name} in its header")
        return metadata[f"tokenizer.ggml.{name}"]

    kind = field("pre") if field("model") == "gpt2" else None
    if kind not in _CUTS:
        found = f"tokenizer {field('model')!r}" + (f" with pre {kind!r}" if kind else "")
        known = f"'gpt2' with pre {', '.join(map(repr, _CUTS))}"
        raise DataError(f"{path}: {found} is not supported; expected {known}")
    tokens = field("tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("merges")]
    ids = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=kind == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _CUTS[kind]
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    types = zip(tokens, field("token_type"), strict=True)
    added = [(token, t == _CONTROL) for token, t in types if t in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in added])

    numbers = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
    numbers |= {"pad_token": "padding"}
    keys = {name: f"tokenizer.ggml.{word}_token_id" for name, word in numbers.items()}
    special = {name: tokens[metadata[key]] for name, key in keys.items() if key in metadata}
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe")
    return Vocabulary(backend, special, adds_bos, metadata.get("tokenizer.chat_template"))


def from_folder(path: str | Path) -> Vocabulary:
    """The tokenizer of a Hugging Face folder: ``tokenizer.json`` and the files beside it.

    Special tokens come from ``tokenizer_config.json``, else ``special_tokens_map.json``; the
    template from ``chat_template.jinja``, else the configuration. A BOS is added where
    ``add_bos_token`` says so or, without that entry, where ``tokenizer.json`` itself adds it.
    Truncation and padding set in the file are switched off: nothing is cut silently.

    Raises:
      DataError: no ``tokenizer.json``, or a file that cannot be read.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder}: no tokenizer.json, expected a Hugging Face model folder")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"{file}: not a tokenizer ({error})") from None
    backend.no_truncation()
    backend.no_padding()
    config = _json(folder / "tokenizer_config.json")
    values = _json(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v}
    texts = {name: _text(values.get(name)) for name in _NAMES}
    special = {n: t for n, t in texts.items() if t and backend.token_to_id(t) is not None}
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special.values()])
    adds_bos = config.get("add_bos_token")
    if adds_bos is None and "bos_token" in special:
        adds_bos = backend.token_to_id(special["bos_token"]) in backend.encode("").ids
    return Vocabulary(backend, special, bool(adds_bos), _template(folder, config))


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from None


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found
