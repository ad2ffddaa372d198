"""Opening the tokenizer of a Hugging Face folder; `jaxpref.data.gguf_vocabulary` opens GGUF."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tokenizers
from tokenizers import AddedToken, processors

from jaxpref.data.files import DataError

_T = TypeVar("_T")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Vocabulary(NamedTuple):
    """What a `jaxpref.data.tokenizer.Tokenizer` is made of, in its order."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    adds_bos: bool
    template: str | None
    tool_template: str | None = None


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
    backend = opened(file, lambda: tokenizers.Tokenizer.from_file(str(file)))
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
    _add(backend, _listed(config.get("added_tokens_decoder") or {}, place), place, again=True)
    _add(backend, [*named.values(), *extra], place, again=False)
    special = {name: _text(token) for name, token in named.items()}
    adds_bos = opened(file, lambda: _front(probed(backend, file), special, file))
    return Vocabulary(backend, special, adds_bos, *_templates(folder, config))


def _listed(tokens: Any, place: Path) -> list[Any]:
    """The tokens that a configuration lists by their ids, in this order."""
    if not isinstance(tokens, dict) or not all(map(_is_id, tokens)):
        raise DataError(f"{place}: added_tokens_decoder, expected tokens by their ids")
    return [tokens[number] for number in sorted(tokens, key=int)]


def _is_id(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


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
    """Makes a backend's own template put this token, or none, in front of a text.

    Args:
      backend: is changed.
      bos: a token of its vocabulary, or None.
    """
    if bos is None:
        backend.post_processor = processors.TemplateProcessing("$A:0", "$A:0 $B:1")
        return
    ids = [(bos, backend.token_to_id(bos))]
    single, pair = f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1"
    backend.post_processor = processors.TemplateProcessing(single, pair, special_tokens=ids)


def probed(backend: tokenizers.Tokenizer, place: str | Path) -> tokenizers.Tokenizer:
    """Refuses a vocabulary that fails on what it does not know: before time is spent.

    Args:
      backend: of the vocabulary.
      place: its file, for the error.

    Returns:
      The backend.
    """
    opened(place, lambda: backend.encode("a \U0010fffd"))
    return backend


def opened(place: str | Path, work: Callable[[], _T]) -> _T:
    """What work on a file gives, its failure a `DataError` of one line.

    The package raises bare Exception, and BaseException where its own code gives up.

    Args:
      place: the file.
      work: opens it.

    Returns:
      Its result.
    """
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


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The chat template, and the one for conversations with tools where that is another."""
    file, named = folder / "chat_template.jinja", {}
    if file.is_file():
        more = folder / "additional_chat_templates" / "tool_use.jinja"
        named = {"default": _utf8(file), "tool_use": _utf8(more) if more.is_file() else None}
    elif isinstance(found := config.get("chat_template"), list):  # several by name
        for entry in found:
            if isinstance(entry, dict):
                named[str(entry.get("name"))] = entry.get("template")
    else:
        named["default"] = found
    for template in (found := [named.get(name) for name in ("default", "tool_use")]):
        if template is not None and not isinstance(template, str):
            place = folder / "tokenizer_config.json"
            kind = type(template).__name__
            raise DataError(f"{place}: chat_template is {kind}, expected a text")
    return found[0], found[1]


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise DataError(f"{file}: not UTF-8 ({error})") from None
