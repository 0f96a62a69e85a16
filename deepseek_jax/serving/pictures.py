"""Pictures in chats: their files, which come with the request, and who makes prompts of them."""

import base64
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from deepseek_jax.notes import cut
from deepseek_jax.serving import fields as f
from deepseek_jax.serving.errors import bad


class Shows(Protocol):
    """The chat format of a model that is shown pictures, and what it makes of their files. Both raise ValueError."""

    def picture(self, file: bytes) -> np.ndarray: ...

    def chat(self, messages: Sequence[Mapping]) -> tuple[str, list[int]]:
        """A chat's text and ids; a content is text, or a list of texts and, in the place of a picture, None."""


def picture_file(name: str, value) -> bytes:
    """Of an ``image_url``. Raises `ApiError` for one that has to be fetched: nothing is."""
    given = f.mapping(name, value)
    if given.get("detail") not in (None, "auto"):
        raise bad(f"{name}.detail", "is not supported, only 'auto'.", "unsupported_parameter")
    head, comma, data = f.text(f"{name}.url", given.get("url")).partition(",")
    kind = head.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise bad(f"{name}.url", "must be data:image/png;base64,... or of another kind: no picture is fetched here.")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise bad(f"{name}.url", "holds data that is not base64.") from None


def rendered(shows: Shows, messages: Sequence[Mapping]) -> tuple[str, list[int], list[np.ndarray]]:
    """A chat's text and ids, and its pictures in their order. Raises `ApiError`."""
    pictures, written = [], []
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list):
            for j, part in enumerate(content):
                if isinstance(part, bytes):
                    try:
                        pictures.append(shows.picture(part))
                    except ValueError as error:
                        raise bad(f"messages[{i}].content[{j}].image_url", cut(error)) from error
            content = [None if isinstance(part, bytes) else part for part in content]
        written.append({**message, "content": content})
    try:
        text, ids = shows.chat(written)
    except ValueError as error:
        raise bad("messages", cut(error)) from error
    return text, ids, pictures
