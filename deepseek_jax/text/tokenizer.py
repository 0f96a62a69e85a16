"""A checkpoint's own tokenizer: text to ids and back, by its ``tokenizer.json``.

Chats are rendered by the checkpoint's own template, see ``chat.py``; ``tiktoken.py`` reads ``tiktoken.model``.

A *control token* is one that the file adds to its vocabulary (``added_tokens``): a chat's tags, BOS, EOS, the marks of
thoughts and tools. Whether it is ``special``, which DeepSeek's own files say of some only, decides what decoding may
leave out, and nothing else.
"""

import itertools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from deepseek_jax.notes import cut, note, shown
from deepseek_jax.small_files import LARGE
from deepseek_jax.text import files, tiktoken
from deepseek_jax.text.chat import ChatTemplate, TokenizerError
from deepseek_jax.text.encoders.choice import Encoder, encoder_of
from deepseek_jax.text.typed import Typed, encode_around

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Text to token ids and back.

    ``template``: the chat template's source, or several by name, or a release's own format; ``sorts_tools``: whether
    templates are given ``tools`` with their entries sorted by name, as Kimi-K2's own code does. Truncation and padding
    that ``backend`` holds are settings of a call, left there by a training tool: they are switched off.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` that does the work.
        bos_token, eos_token, pad_token: the tokens' text, or None.
        bos_id, eos_id, pad_id: their ids, or None.
        add_bos: whether ``encode`` puts the BOS token first, as ``tokenizer_config.json`` says.
        folder: what it was loaded from, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict | None = None,
        template: str | Mapping[str, str] | Encoder | None = None,
        sorts_tools: bool = False,
        folder: Path | None = None,
    ):
        config = config or {}
        self.backend, self.folder = backend, folder
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            note(f"the tokenizer's dropout of {backend.model.dropout:g} is left out: a text has one reading here.")
            backend.model.dropout = None
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
        if isinstance(template, str | Mapping):
            template = ChatTemplate(template, variables, sorts_tools) if template else None
        self._template = template

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template, so that `render` and `chat` work."""
        return self._template is not None

    def template_reads(self, name: str) -> bool:
        """Whether the chat template has a variable of that name, such as the switch ``thinking``."""
        return self._template is not None and self._template.reads(name)

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest one and 1. A model may have rows for more."""
        return max(self._known, default=-1) + 1

    def has(self, i: int) -> bool:
        """Whether a token has the id ``i``."""
        return i in self._known

    def check_fits(self, vocab_size: int) -> None:
        """Raises TokenizerError, naming a token, where an id has no row in a model of ``vocab_size`` rows."""
        if self.vocab_size <= vocab_size:
            return
        beyond = sorted(i for i in self._known if i >= vocab_size)
        more = f" ({len(beyond)} such tokens)" if len(beyond) > 1 else ""
        raise TokenizerError(
            f"The tokenizer's token {shown(self.backend.id_to_token(beyond[0]))} has the id {beyond[0]}, beyond the "
            f"model's vocab_size of {vocab_size}{more}: take the token out of the tokenizer's files, or add rows to "
            "the model's embedding and head."
        )

    def encode(self, text: str, add_bos: bool | None = None, *, special_tokens: bool = True) -> list[int]:
        """The ids of ``text``; ``add_bos`` None puts BOS first where the checkpoint's configuration says so.

        The name of a control token in ``text`` becomes that token, so that prompts may be written out by hand, as in
        transformers; with ``special_tokens`` False it is read as any other text, as training text is.

        Raises:
            ValueError: ``add_bos`` is true and there is no BOS token.
        """
        return self.encode_batch([text], add_bos, special_tokens=special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_bos: bool | None = None, *, special_tokens: bool = True
    ) -> list[list[int]]:
        """``encode`` of many texts at once, on all cores."""
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise ValueError("This tokenizer has no BOS token: tokenizer_config.json names none.")
        _check_texts(texts)
        first = [self.bos_id] if add_bos else []
        backend = self.backend if special_tokens else self._without_control
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [first + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ``ids``.

        Bytes that are not whole UTF-8 characters become U+FFFD, and so does an id without a token: models have rows
        for more ids than their tokenizer has tokens, and may sample one of these.
        """
        text = []
        for known, run in itertools.groupby(_token_ids(ids), key=self._known.__contains__):
            run = list(run)
            text.append(self.backend.decode(run, skip_special_tokens) if known else REPLACEMENT * len(run))
        return "".join(text)

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a chat by the checkpoint's own template.

        Args:
            messages: ``{"role": ..., "content": ...}``, and whatever else the template reads.
            add_generation_prompt: whether the text ends where the assistant begins to answer.
            **variables: more of the template's variables, such as ``tools`` or ``thinking``; ``chat_template``: the
                name of one of several templates, which are otherwise chosen as in transformers: with ``tools`` the one
                called tool_use, where there is one, else the default.

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
        """The ids of a chat as `render` gives its text. BOS is the template's own business, so none is added.

        The name of a control token in a message or variable is read as any other text (`text.typed`).
        """
        typed = Typed(added.content for added in self.control.values())
        hidden, more = typed.hidden(list(messages), variables)
        if not typed:
            return self.encode(self.render(messages, add_generation_prompt, **variables), add_bos=False)
        text = self.render(hidden, add_generation_prompt, **more)
        return encode_around(text, typed, self.backend, self._without_control)

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
        size_V = np.zeros(self.vocab_size, np.int32)
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            size_V[i] = len(token)  # one character of the byte-level alphabet stands for one byte
        for i, added in self.backend.get_added_tokens_decoder().items():
            size_V[i] = 0 if added.special else len(added.content.encode())
        return size_V

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text, None where there is none."""
        return self.backend.token_to_id(token)

    @cached_property
    def control(self) -> dict:
        """Control tokens by their ids, each with ``content``, its text, and ``special``."""
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def _without_control(self) -> tokenizers.Tokenizer:
        """The tokenizer without its control tokens: the same normalisation, pieces and merges on any text."""
        # Not the backend's `encode_special_tokens`: it lets tokens that are not marked special through.
        described = json.loads(self.backend.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(described | {"added_tokens": [], "post_processor": None}))

    def _id(self, name: str, text: str | None) -> int | None:
        if text is None:
            return None
        found = self.backend.token_to_id(text)
        if found is None:
            raise TokenizerError(
                f"tokenizer_config.json names {name} {shown(text)}, which the tokenizer does not have."
            )
        return found


def _check_texts(texts) -> None:
    """Raises ValueError for what is no text: of a list, or of a text's characters, ids would come without a word."""
    if isinstance(texts, str):
        raise ValueError("encode_batch takes a list of texts; encode takes a single one.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"a text to encode must be a string, not {shown(text)}; encode_batch takes a list of them."
            )


def _token_ids(ids) -> list[int]:
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise ValueError(f"ids to decode must be a list of integers, not {shown(ids)}.") from None


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint's folder: ``tokenizer.json``, or else the ranks of ``tiktoken.model``, with its
    configuration and chat templates.

    Raises:
        TokenizerError: a ValueError; neither file is there, or a file is damaged.
    """
    folder = Path(path)
    file, config, code = folder / files.FAST, files.read_config(folder / "tokenizer_config.json"), tiktoken.Code()
    if file.exists():
        text = files.read_whole(file, LARGE)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer: {cut(error)}") from error
    elif (folder / files.RANKS).exists():
        code = tiktoken.read_code(folder)
        backend = tiktoken.read(folder, config, code)
    else:
        raise TokenizerError(
            f"{folder} has no {files.FAST}; without it or a {files.RANKS}, give and take token ids instead of text."
        )
    template = files.read_templates(folder, config) or encoder_of(
        folder, lambda tag: backend.token_to_id(tag) is not None
    )
    return Tokenizer(backend, config, template, code.sorts_tools, folder)


def _token_text(config: dict, name: str) -> str | None:
    """Older files write a token as an object with its text under ``content``."""
    entry = config.get(name)
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"tokenizer_config.json: {name} must be a token's text, not {shown(text)}.")
    return text
