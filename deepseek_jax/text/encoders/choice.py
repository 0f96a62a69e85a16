"""Which release's chat format a folder without a template has, behind the methods of `text.chat.ChatTemplate`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deepseek_jax.notes import shown
from deepseek_jax.small_files import read_json
from deepseek_jax.text.chat import TokenizerError, plain, read_message
from deepseek_jax.text.encoders import dsml, v4, v32

# model_type of config.json -> its format.
ENCODERS = {"deepseek_v32": v32.encode, "deepseek_v4": v4.encode}
# Fields of config.json that the official V4 has, and its previews have not.
OFFICIAL = "dspark_"
TAGS = (dsml.BOS, dsml.EOS, dsml.USER, dsml.ASSISTANT)


class Encoder:
    """A release's chat format; ``encode``: messages and variables to text."""

    def __init__(self, encode: Callable[..., str]):
        self._encode = encode
        self._variables = set(inspect.signature(encode).parameters) - {"messages"}

    def render(self, messages: Sequence[Mapping], *, chat_template: str | None = None, **variables) -> str:
        """As `text.chat.ChatTemplate.render`. A variable that is None is as if it were not given.

        Raises:
            ValueError: there are no messages, or one is not made of plain data.
            TokenizerError: the format has no such variable, template or message.
        """
        if not messages:
            raise ValueError("A chat needs at least one message.")
        if chat_template is not None:
            raise TokenizerError(f"this release's chats have no templates, and so none called {shown(chat_template)}.")
        given = {name: plain(value) for name, value in variables.items() if value is not None}
        if unknown := sorted(set(given) - self._variables):
            known = ", ".join(sorted(self._variables))
            raise TokenizerError(f"this release's chats have no variable {shown(unknown[0])}, but {known}.")
        return self._encode([read_message(message) for message in messages], **given)

    def reads(self, name: str) -> bool:
        """Whether the format has a variable of that name."""
        return name in self._variables


def encoder_of(folder: Path, has: Callable[[str], bool]) -> Encoder | None:
    """The format of a folder's release, by its config.json; ``has``: whether the tokenizer has a token.

    None where the release is another one, and where its tokenizer has not the tags that every chat is made of.
    """
    file = folder / "config.json"
    fields = read_json(file) if file.exists() else {}
    kind = fields.get("model_type")
    encode = ENCODERS.get(kind) if isinstance(kind, str) else None
    if encode is v4.encode and any(name.startswith(OFFICIAL) for name in fields):
        encode = v4.encode_official
    return Encoder(encode) if encode is not None and all(map(has, TAGS)) else None
