"""Opening a tokenizer's files: Hugging Face folders and GGUF."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxpref.data.files import DataError
from jaxpref.data.gguf_file import read_gguf
from jaxpref.data.pieces import PIECES, pieces

_T = TypeVar("_T")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types
_ADDED = (_CONTROL, _USER_DEFINED)  # found in a text before anything else
_GGUF_NAMES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
}  # fmt: skip
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where a file says nothing


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


_LLAMA3 = _byte_level(pre_tokenizers.Split(_words(r"\p{N}{1,3}"), "isolated"), regex=False)
_QWEN2 = _byte_level(pre_tokenizers.Split(_words(r"\p{N}"), "isolated"), regex=False)
# `tokenizer.ggml.pre` -> how text is cut before merging.
_CUTS = {
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
    if model != PIECES and kind not in _CUTS:
        found = f"tokenizer {model!r}" + (f" with pre {kind!r}" if kind else "")
        known = f"{PIECES!r}, or 'gpt2' with pre {', '.join(map(repr, _CUTS))}"
        raise DataError(f"{path}: {found} is not supported; expected {known}")
    tokens = _strings(metadata, "tokens", path)
    special = _gguf_special(metadata, tokens, model, path)
    if model == PIECES:
        scores = _field(metadata, "scores", path)
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise DataError(f"{path}: tokenizer.ggml.scores, expected {len(tokens)}, one a token")
        spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
        unknown = special.get("unk_token")
        backend = _opened(path, lambda: pieces(tokens, scores, unknown, prefix=bool(spaced)))
    else:
        merges = [tuple(m.split(" ", 1)) for m in _strings(metadata, "merges", path)]
        backend = _opened(path, lambda: _byte_level_bpe(tokens, merges, str(kind)))
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise DataError(f"{path}: tokenizer.ggml.token_type, expected {len(tokens)}, one a token")
    added = [(t, k == _CONTROL) for t, k in zip(tokens, types, strict=True) if k in _ADDED]
    backend.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in added if t])
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", model == PIECES or kind in _WHOLE_WORDS)
    adds_bos = bool(adds_bos) and "bos_token" in special
    _opened(path, lambda: put_bos(backend, special["bos_token"] if adds_bos else None))
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise DataError(f"{path}: tokenizer.chat_template is no text")
    return Vocabulary(_probed(backend, path), special, adds_bos, template)


def _byte_level_bpe(tokens: list[str], merges: list[Any], kind: str) -> tokenizers.Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=kind in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _CUTS[kind]
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


def from_folder(path: str | Path) -> Vocabulary:
    """The tokenizer of a Hugging Face folder: ``tokenizer.json`` and the files beside it.

    As transformers 5 reads it. ``tokenizer.json`` says whether a text gets a BOS, whatever
    ``add_bos_token`` says. Special tokens come from ``tokenizer_config.json``; where that has no
    ``added_tokens_decoder``, ``special_tokens_map.json`` overrides it. Flags of a token
    (``special``, ``normalized``, ``lstrip``, ``rstrip``, ``single_word``) are those of its file; a
    named token that no file lists is added as a special one. The template comes from
    ``chat_template.jinja``, else the configuration. Truncation and padding set in the file are
    switched off: nothing is cut silently.

    Raises:
      DataError: no ``tokenizer.json``, a file that cannot be read, or one that puts other tokens
        than a BOS in front of a text.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder}: no tokenizer.json, expected a Hugging Face model folder")
    backend = _opened(file, lambda: tokenizers.Tokenizer.from_file(str(file)))
    backend.no_truncation()
    backend.no_padding()
    place = folder / "tokenizer_config.json"
    config = _json(place)
    values = dict(config)
    if "added_tokens_decoder" not in config:
        values |= {k: v for k, v in _json(folder / "special_tokens_map.json").items() if v}
    named = _named(values, place)
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    extra = extra if isinstance(extra, list) else []
    listed = config.get("added_tokens_decoder") or {}
    _add(backend, [*listed.values()] if isinstance(listed, dict) else [], place, again=True)
    _add(backend, [*named.values(), *extra], place, again=False)
    special = {name: _text(token) for name, token in named.items()}
    adds_bos = _opened(file, lambda: _front(_probed(backend, file), special, file))
    return Vocabulary(backend, special, adds_bos, _template(folder, config))


def _named(values: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Special tokens by name: the usual ones, and a model's own, which its template may use."""
    named = {k: v for k, v in values.items() if k in _NAMES and v}
    own = {k: v for k, v in values.items() if k.endswith("_token") and k not in _NAMES}
    extra = values.get("extra_special_tokens")
    own |= extra if isinstance(extra, dict) else {}
    named |= {k: v for k, v in own.items() if isinstance(v, (str, dict)) and v}
    for name, token in named.items():
        if not isinstance(_text(token), str) or not _text(token):
            raise DataError(f"{place}: {name} is {token!r}, expected a text")
    return named


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _add(backend: tokenizers.Tokenizer, tokens: list[Any], place: Path, *, again: bool) -> None:
    """Adds what is not there; `again` gives the others the flags of these, too."""
    known = {str(token.content): token for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        text = _text(token)
        if not isinstance(text, str) or not text:
            raise DataError(f"{place}: special token {token!r}, expected a text")
        if text in known and not again:
            continue
        flags = token if isinstance(token, dict) else {}
        flags = {name: flags[name] for name in _FLAGS if isinstance(flags.get(name), bool)}
        is_special = bool(token.get("special", False)) if again else True
        wanted = AddedToken(text, special=is_special, **{"normalized": not is_special, **flags})
        if text in known and repr(known[text]) == repr(wanted):
            continue
        backend.add_tokens([wanted])
        known[text] = wanted


def _front(backend: tokenizers.Tokenizer, special: dict[str, str], file: Path) -> bool:
    """Whether the file's own template puts a BOS in front of a text; names it if nothing does."""
    inner = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    places = range(len(whole) - len(inner) + 1)
    start = next((i for i in places if whole[i : i + len(inner)] == inner), 0)
    found = [backend.id_to_token(i) for i in whole[:start]]
    if len(found) == 1:
        special.setdefault("bos_token", str(found[0]))
    if found not in ([], [special.get("bos_token")]):
        raise DataError(f"{file}: puts {found} in front of a text, expected nothing or its BOS")
    return start == 1


def put_bos(backend: tokenizers.Tokenizer, bos: str | None) -> None:
    """Makes a backend's own template put this token, or none, in front of a text."""
    if bos is None:
        backend.post_processor = processors.TemplateProcessing("$A:0", "$A:0 $B:1")
        return
    ids = [(bos, backend.token_to_id(bos))]
    single, pair = f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1"
    backend.post_processor = processors.TemplateProcessing(single, pair, special_tokens=ids)


def _probed(backend: tokenizers.Tokenizer, place: str | Path) -> tokenizers.Tokenizer:
    """Refuses a vocabulary that fails on what it does not know: before time is spent."""
    _opened(place, lambda: backend.encode("a \U0010fffd"))
    return backend


def _opened(place: str | Path, work: Callable[[], _T]) -> _T:
    """The package raises bare Exception, and BaseException where its own code gives up."""
    try:
        return work()
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place}: not a tokenizer ({reason})") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: found {type(found).__name__}, expected a JSON object")
    return found


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise DataError(f"{file}: not UTF-8 ({error})") from None
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((x.get("template") for x in named if x.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        place = folder / "tokenizer_config.json"
        raise DataError(f"{place}: chat_template is {type(found).__name__}, expected a text")
    return found
