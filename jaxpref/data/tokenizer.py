"""Text to token ids and back, with the model's own vocabulary, special tokens and chat template."""

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from jaxpref.data import chat, gguf_vocabulary, vocabulary
from jaxpref.data.files import DataError, check_text


class Split(NamedTuple):
    """A prompt and its response, tokenised as one text.

    Attributes:
      tokens: ids of prompt + response.
      start: index of the first response token, at least 1.
      merged: whether the prompt's end merged into the response's first token, so that
        ``tokens[:start]`` is shorter than the prompt's own ids.
    """

    tokens: list[int]
    start: int
    merged: bool


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    Special tokens written in a text become their single ids, as in Hugging Face tokenizers. A
    byte-level vocabulary may lack some bytes (SmolLM2 lacks a few control characters): those are
    dropped, as everywhere with that vocabulary.

    Attributes:
      backend: the Hugging Face tokenizer that does the work; never adds special tokens here.
      special: names to texts of special tokens, such as ``{"eos_token": "</s>"}``.
      adds_bos: whether the model was trained with a BOS in front of every text.
      template: the chat template (Jinja), or None.
      tool_template: the one for conversations with tools, or None where it is the same.
    """

    backend: tokenizers.Tokenizer
    special: Mapping[str, str]
    adds_bos: bool
    template: str | None = None
    tool_template: str | None = None

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer inside a GGUF file; its kinds: `gguf_vocabulary.from_gguf`."""
        return cls(*gguf_vocabulary.from_gguf(path))

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder; see `vocabulary.from_folder`."""
        return cls(*vocabulary.from_folder(path))

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token, if there is one."""
        return self._special_id("eos_token")

    @property
    def pad_id(self) -> int:
        """Id that fills padding: the pad token's, else EOS, else 0. Padding is always masked."""
        found = (self._special_id("pad_token"), self.eos_id)
        return next((token for token in found if token is not None), 0)

    @property
    def vocab(self) -> int:
        """Number of tokens, added ones included; a model's table may have more rows."""
        return self.backend.get_vocab_size()

    def _special_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special[name]) if name in self.special else None

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text; special tokens in it count as such.
          bos: True puts one BOS in front, False none; None does what the model was trained with.
            A BOS that the text already begins with is never doubled.

        Raises:
          DataError: ``bos=True`` and the vocabulary has none, or the text is no text.
        """
        return self.encode_many([text], bos=bos)[0]

    def encode_many(self, texts: Sequence[str], *, bos: bool | None = None) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        first = self.bos_id
        if bos and first is None:
            raise DataError("bos: this tokenizer has no BOS token, expected False or None")
        add = self.adds_bos if bos is None else bos
        for text in texts:
            check_text(text)
        found = [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]
        if not add or first is None:
            return found
        return [ids if ids[:1] == [first] else [first, *ids] for ids in found]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; ``skip_special`` leaves special tokens out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as text; a token that is no whole character is shown as the vocabulary's."""
        texts = ((int(i), self.decode([int(i)])) for i in ids)
        return [str(self.backend.id_to_token(i)) if "\ufffd" in t or not t else t for i, t in texts]

    def single_token(self, word: str, *, after: str = "") -> int:
        r"""The id of a word that is one token.

        Args:
          word: for example ``"No"``; ``" No"`` is another token in most vocabularies.
          after: the text before it. SentencePiece-like vocabularies write a word at the start of a
            text otherwise than after ``"\n"``.

        Raises:
          DataError: the word is not exactly one token; the message shows its pieces.
        """
        if after:
            split = self.split(after, word)
            ids = split.tokens[split.start :]
        else:
            ids = self.encode(word, bos=False)
        if len(ids) != 1:
            found = f"{len(ids)} tokens in this tokenizer, {self.pieces(ids)}"
            raise DataError(f"word {word!r} is {found}; expected one token")
        return ids[0]

    def split(self, prompt: str, response: str, *, bos: bool | None = None) -> Split:
        """Tokenises prompt + response once and splits at the common prefix with the prompt's ids.

        Tokenising the two apart would give other ids wherever the text's own tokenisation merges
        across the boundary. Here prompt ids + response ids are the ids of the whole text.

        Raises:
          DataError: no token is left for the prompt (nothing would predict the response) or for
            the response.
        """
        return split_ids(*self.encode_many([prompt + response, prompt], bos=bos))

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        """The chat template of conversations with these tools, or with None."""
        return self.template if tools is None else self.tool_template or self.template

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: datetime.date = chat.DATE,
        **variables: Any,
    ) -> str:
        """The text of a conversation by the model's chat template, see `chat.conversation`.

        Args:
          messages: each with ``role`` and ``content``.
          add_generation_prompt: end with the opening of the assistant's turn.
          continue_final_message: end within the last message instead, which the response continues.
          tools: descriptions of what the assistant may call, as JSON schemas.
          date: the day that a template is told that asks for it.
          **variables: further variables that this template knows.

        Raises:
          RowError: the template refuses these messages.
          DataError: no template, or a broken one.
        """
        template = self.template_for(tools)
        if template is None:
            raise DataError("chat: this tokenizer has no chat template; pass the prompt as text")
        values = {**self.special, "documents": None, **variables, "tools": tools}
        return chat.conversation(
            template,
            messages,
            values,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            date=date,
        )

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which transformers opens too.

        Both say whether a text gets a BOS; transformers 5 reads ``tokenizer.json`` alone for it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.special, "add_bos_token": self.adds_bos}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.template is not None:
            config["chat_template"] = self.template
        if self.tool_template is not None:
            named = {"default": self.template, "tool_use": self.tool_template}
            config["chat_template"] = [
                {"name": name, "template": x} for name, x in named.items() if x is not None
            ]
        backend, bos = self.backend, self.special.get("bos_token")
        if (backend.encode("a").ids[:1] == [self.bos_id]) != self.adds_bos:
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            vocabulary.put_bos(backend, bos if self.adds_bos else None)
        backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def split_ids(whole: Sequence[int], prompt: Sequence[int]) -> Split:
    """Splits the ids of prompt + response where they stop agreeing with the prompt's own ids.

    Args:
      whole: ids of prompt + response as one text.
      prompt: ids of the prompt alone.

    Returns:
      The ids and where the response begins.

    >>> split_ids([5, 7, 9, 2], prompt=[5, 7])
    Split(tokens=[5, 7, 9, 2], start=2, merged=False)
    >>> split_ids([5, 8, 2], prompt=[5, 7])  # 7 became a part of 8
    Split(tokens=[5, 8, 2], start=1, merged=True)

    Raises:
      DataError: the prompt or the response is left without a token.
    """
    pairs = enumerate(zip(whole, prompt, strict=False))
    shorter = min(len(whole), len(prompt))
    start = next((i for i, (a, b) in pairs if a != b), shorter)
    if start == 0:
        raise DataError("prompt: no token of it stands before the response; expected at least one")
    if start == len(whole):
        raise DataError("response: it adds no token to the prompt; expected at least one")
    return Split(list(whole), start, merged=start < len(prompt))
