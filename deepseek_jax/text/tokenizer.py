"""A checkpoint's own tokenizer: text to ids and back, by its ``tokenizer.json``, and text as it streams.

Chats are rendered by the checkpoint's own template, see ``chat.py``.
"""

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from deepseek_jax.notes import shown
from deepseek_jax.small_files import LARGE, read_json, read_text
from deepseek_jax.text.chat import ChatTemplate, TokenizerError, read_template

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` that does the work.
        bos_token, eos_token, pad_token: the tokens' text, or None.
        bos_id, eos_id, pad_id: their ids, or None.
        add_bos: whether ``encode`` puts the BOS token first, as ``tokenizer_config.json`` says.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict | None = None, template: str | None = None):
        config = config or {}
        self.backend = backend
        special = {name: _token_text(config, name) for name in ("bos_token", "eos_token", "pad_token")}
        self.bos_token, self.eos_token, self.pad_token = special.values()
        self.bos_id, self.eos_id, self.pad_id = (self._id(name, text) for name, text in special.items())
        # A configuration that does not say leaves it to the post-processor of tokenizer.json.
        self.add_bos = config.get("add_bos_token")
        if self.add_bos is not None and not isinstance(self.add_bos, bool):
            raise TokenizerError(
                f"tokenizer_config.json: add_bos_token must be true or false, not {shown(self.add_bos)}."
            )
        if self.add_bos is None:
            self.add_bos = self.bos_id is not None and backend.encode("").ids[:1] == [self.bos_id]
        if self.add_bos and self.bos_id is None:
            raise TokenizerError("tokenizer_config.json says add_bos_token but names no bos_token.")
        variables = {
            name: text
            for name in (
                "bos_token",
                "eos_token",
                "unk_token",
                "sep_token",
                "pad_token",
                "cls_token",
                "mask_token",
            )
            if (text := _token_text(config, name)) is not None
        }
        self._template = ChatTemplate(template, variables) if template is not None else None

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template, so that `render` and `chat` work."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: ids are below it, unless the file leaves gaps."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The ids of ``text``; ``add_bos`` None puts BOS first where the checkpoint's configuration says so.

        Raises:
            ValueError: ``add_bos`` is true and there is no BOS token.
        """
        return self.encode_batch([text], add_bos)[0]

    def encode_batch(
        self, texts: Sequence[str], add_bos: bool | None = None, *, special_tokens: bool = True
    ) -> list[list[int]]:
        """``encode`` of many texts at once, on all cores.

        ``special_tokens`` False reads a special token's name in the text as any other text.
        """
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise ValueError("This tokenizer has no BOS token: tokenizer_config.json names none.")
        first = [self.bos_id] if add_bos else []
        self.backend.encode_special_tokens = not special_tokens
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [first + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ``ids``.

        Bytes that are not whole UTF-8 characters become U+FFFD, and so does an id without a token: models
        have rows for more ids than their tokenizer has tokens.
        """
        text = []
        for known, run in itertools.groupby(map(int, ids), key=self._known.__contains__):
            run = list(run)
            text.append(self.backend.decode(run, skip_special_tokens) if known else REPLACEMENT * len(run))
        return "".join(text)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a chat by the checkpoint's own template.

        Args:
            messages: ``{"role": ..., "content": ...}``, and whatever else the template reads.
            add_generation_prompt: whether the text ends where the assistant begins to answer.
            **variables: more of the template's variables, such as ``tools`` or ``thinking``.

        Raises:
            ValueError: the checkpoint has no template, or the template refuses these messages.
        """
        if self._template is None:
            raise ValueError(
                "This checkpoint has no chat template (neither chat_template.jinja nor chat_template in "
                "tokenizer_config.json); encode the prompt's text instead."
            )
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def chat(self, messages: Sequence[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """The ids of a chat. BOS is the template's own business, so none is added."""
        return self.encode(self.render(messages, add_generation_prompt, **variables), add_bos=False)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for, int32 [vocab_size]; special tokens stand for none.

        Raises:
            ValueError: the tokenizer is not byte-level, so that a token's bytes are not known by themselves.
        """
        if not isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(
                "Bytes per token are known for byte-level tokenizers only; the decoder of this one is "
                f"{type(self.backend.decoder).__name__}."
            )
        size_V = np.zeros(max(self._known) + 1, np.int32)
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            size_V[i] = len(token)  # one character of the byte-level alphabet stands for one byte
        for i, added in self.backend.get_added_tokens_decoder().items():
            size_V[i] = 0 if added.special else len(added.content.encode())
        return size_V

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    def _id(self, name: str, text: str | None) -> int | None:
        if text is None:
            return None
        found = self.backend.token_to_id(text)
        if found is None:
            raise TokenizerError(
                f"tokenizer_config.json names {name} {shown(text)}, which tokenizer.json does not have."
            )
        return found


class Stream:
    """Decodes ids as they come, giving out whole characters only.

    A character may be spread over several tokens; what is not complete yet waits for the next push. All
    that comes out, joined, equals ``Tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._given = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes in the next ids; returns the text that is certain now, perhaps none."""
        self._ids.extend(ids)
        # Everything is decoded again, because a token's text may depend on those before it. A character
        # cut short is one replacement character at the end, and the only one that may still change.
        return self._take(self._text().removesuffix(REPLACEMENT))

    def finish(self) -> str:
        """The rest: bytes that never became a character come out as U+FFFD."""
        return self._take(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip)

    def _take(self, text: str) -> str:
        new = text[self._given :]
        self._given = len(text)
        return new


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint's folder: its ``tokenizer.json``, configuration and chat template.

    Raises:
        TokenizerError: a ValueError; ``tokenizer.json`` is missing or a file is damaged.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise TokenizerError(f"{folder} has no tokenizer.json; without it, give and take token ids instead of text.")
    try:
        text = read_text(file, LARGE)
    except ValueError as error:
        raise TokenizerError(str(error)) from None
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{file} is not a tokenizer: {shown(str(error), quoted=False)}") from error
    config = _read_config(folder / "tokenizer_config.json")
    return Tokenizer(backend, config, read_template(folder, config))


def _read_config(file: Path) -> dict:
    if not file.exists():
        return {}
    try:
        return read_json(file)
    except ValueError as error:
        raise TokenizerError(str(error)) from None


def _token_text(config: dict, name: str) -> str | None:
    """Older files write a token as an object with its text under ``content``."""
    entry = config.get(name)
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"tokenizer_config.json: {name} must be a token's text, not {shown(text)}.")
    return text
