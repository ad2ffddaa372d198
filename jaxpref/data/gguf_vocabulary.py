"""Opening the vocabulary inside a GGUF file: byte-level BPE, or scored pieces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxpref.data.files import DataError
from jaxpref.data.gguf_file import read_gguf
from jaxpref.data.pieces import PIECES, pieces
from jaxpref.data.vocabulary import Vocabulary, opened, probed, put_bos

_CONTROL, _USER_DEFINED = 3, 4  # token types
_ADDED = (_CONTROL, _USER_DEFINED)  # found in a text before anything else
_GGUF_NAMES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
}  # fmt: skip
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where a file says nothing


def _words(digits: str) -> Regex:
    # The splitting rule of tiktoken's cl100k family; the models differ in how digits group.
    return Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _byte_level(*before: pre_tokenizers.PreTokenizer, regex: bool) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*before, last])


_LLAMA3 = _byte_level(pre_tokenizers.Split(_words(r"\p{N}{1,3}"), "isolated"), regex=False)
_QWEN2 = _byte_level(pre_tokenizers.Split(_words(r"\p{N}"), "isolated"), regex=False)
# `tokenizer.ggml.pre` -> how text is cut before merging.
CUTS = {
    "gpt-2": _byte_level(regex=True),
    "smollm": _byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")


def from_gguf(path: str | Path) -> Vocabulary:
    """The vocabulary inside a GGUF file: byte-level BPE (``gpt2``) or SentencePiece (``llama``).

    Kinds of byte-level ``tokenizer.ggml.pre``: ``gpt-2``; ``smollm`` (each digit alone); ``qwen2``
    (NFC, each digit alone); ``llama-bpe`` (Llama 3: digits in threes, whole words before merges, a
    BOS unless the file says otherwise). SentencePiece: see `jaxpref.data.pieces`.

    Raises:
      DataError: another kind, or a key is missing or does not fit the others; the message names it.
    """
    try:
        metadata = read_gguf(path).fields
    except ValueError as error:
        raise DataError(str(error)) from None
    model = _field(metadata, "model", path)
    kind = _field(metadata, "pre", path) if model == "gpt2" else None
    if model != PIECES and kind not in CUTS:
        found = f"tokenizer {model!r}" + (f" with pre {kind!r}" if kind else "")
        known = f"{PIECES!r}, or 'gpt2' with pre {', '.join(map(repr, CUTS))}"
        raise DataError(f"{path}: {found} is not supported; expected {known}")
    tokens = _strings(metadata, "tokens", path)
    special = _gguf_special(metadata, tokens, model, path)
    if model == PIECES:
        scores = _field(metadata, "scores", path)
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise DataError(f"{path}: tokenizer.ggml.scores, expected {len(tokens)}, one a token")
        spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
        unknown = special.get("unk_token")
        backend = opened(path, lambda: pieces(tokens, scores, unknown, prefix=bool(spaced)))
    else:
        merges = [tuple(m.split(" ", 1)) for m in _strings(metadata, "merges", path)]
        backend = opened(path, lambda: _byte_level_bpe(tokens, merges, str(kind)))
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError(f"{path}: tokenizer.ggml.token_type, expected {len(tokens)}, one a token")
    added = [(t, k == _CONTROL) for t, k in zip(tokens, types, strict=True) if k in _ADDED]
    backend.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in added if t])
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", model == PIECES or kind in _WHOLE_WORDS)
    adds_bos = bool(adds_bos) and "bos_token" in special
    opened(path, lambda: put_bos(backend, special["bos_token"] if adds_bos else None))
    templates = []
    for name in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use"):
        templates.append(metadata.get(name))
        if templates[-1] is not None and not isinstance(templates[-1], str):
            raise DataError(f"{path}: {name} is no text")
    return Vocabulary(probed(backend, path), special, adds_bos, *templates)


def _byte_level_bpe(tokens: list[str], merges: list[Any], kind: str) -> tokenizers.Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=kind in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = CUTS[kind]
    backend.decoder = decoders.ByteLevel()
    if kind in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    return backend


def _field(metadata: Mapping[str, Any], name: str, path: str | Path) -> Any:
    if f"tokenizer.ggml.{name}" not in metadata:
        raise DataError(f"{path}: no tokenizer.ggml.{name} in its header")
    return metadata[f"tokenizer.ggml.{name}"]


def _strings(metadata: Mapping[str, Any], name: str, path: str | Path) -> list[str]:
    found = _field(metadata, name, path)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"{path}: tokenizer.ggml.{name}, expected a list of texts")
    return found


def _gguf_special(
    metadata: Mapping[str, Any], tokens: list[str], model: str, path: str | Path
) -> dict[str, str]:
    special = {}
    for name, word in _GGUF_NAMES.items():
        usual = _SENTENCEPIECE_IDS.get(name) if model == PIECES else None
        number = metadata.get(f"tokenizer.ggml.{word}_token_id", usual)
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise DataError(
                f"{path}: tokenizer.ggml.{word}_token_id is {number!r}, expected below the "
                f"{len(tokens)} of its tokens"
            )
        special[name] = tokens[number]
    return special
