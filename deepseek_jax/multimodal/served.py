"""A Janus behind a server: its eyes for `generation.batcher`, and its conversations for `serving`."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import jax
import numpy as np

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.core.context import Context
from deepseek_jax.multimodal.janus import Janus
from deepseek_jax.multimodal.pictures import read_picture, shown
from deepseek_jax.multimodal.prompts import ASSISTANT, BEGIN, END, SYSTEM, USER, PromptWriter
from deepseek_jax.multimodal.vision import COLOURS
from deepseek_jax.text.tokenizer import Tokenizer


class Seen:
    """The `generation.request.Sight` of a Janus."""

    def __init__(self, model: Janus, ctx: Context | None = None):
        cfg = model.cfg
        self.image_id, self.tokens = cfg.image_id, cfg.vision.n_tokens
        self.shape = (cfg.vision.image_size, cfg.vision.image_size, COLOURS)
        self._model = model
        self._embed = jax.jit(lambda model, picture: model.embed_images(picture[None], ctx)[0])

    def __call__(self, picture: np.ndarray) -> jax.Array:
        """[P, D]."""
        return self._embed(self._model, np.asarray(picture, np.float32))


class Chats:
    """The `serving.pictures.Shows` of a Janus: users' and assistants' messages in turn, behind a system's or DeepSeek's
    own. Of one message it makes what `PromptWriter.about_pictures` does; the names of control tokens in it are text.

    Raises ValueError where the tokenizer lacks what prompts need.
    """

    def __init__(self, tokenizer: Tokenizer, cfg: JanusConfig):
        self._tokenizer, self._side = tokenizer, cfg.vision.image_size
        writer = PromptWriter(tokenizer, cfg)
        begin, end = (writer.id_of(token) for token in (BEGIN, END))
        self._picture = [begin, *[cfg.image_id] * cfg.vision.n_tokens, end]

    def picture(self, file: bytes) -> np.ndarray:
        """float32 [side, side, 3]. Raises ValueError for what is no picture."""
        return shown(read_picture(BytesIO(file)), self._side)

    def chat(self, messages: Sequence[Mapping]) -> tuple[str, list[int]]:
        """A chat's text, without pictures, and ids; in a content None stands for a picture. Raises ValueError for
        another order of roles."""
        messages, system = list(messages), SYSTEM
        if messages[0]["role"] == "system":
            system = _joined(messages.pop(0)["content"])
        roles = [message["role"] for message in messages]
        if roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
            raise ValueError(f"a Janus's chat is of user and assistant in turn, and a user's last; not {roles}.")
        parts: list[str | list[int]] = [f"{system}\n\n" if system else ""]
        for message in messages:
            user = message["role"] == "user"
            parts += [self._tag(USER if user else ASSISTANT), ": "]
            content = message["content"]
            for part in _stripped(content if isinstance(content, list) else [content]):
                parts.append(self._picture if part is None else part)
            parts += ["\n\n"] if user else [self._tag(self._tokenizer.eos_token)]
        parts += [self._tag(ASSISTANT), ":"]
        return "".join(part for part in parts if isinstance(part, str)), self._ids(parts)

    def _tag(self, token: str) -> list[int] | str:
        found = self._tokenizer.id_of(token)
        return token if found is None else [found]

    def _ids(self, parts: Sequence[str | list[int]]) -> list[int]:
        """Neighbouring texts are one."""
        ids, text = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id], ""
        for part in [*parts, []]:
            if isinstance(part, str):
                text += part
                continue
            ids += self._tokenizer.encode(text, add_bos=False, special_tokens=False) if text else []
            ids, text = [*ids, *part], ""
        return ids


def _joined(content) -> str:
    return "\n".join(content) if isinstance(content, list) else content


def _stripped(parts: Sequence[str | None]) -> list[str | None]:
    """A message's parts with a line end between them, and none around them."""
    found: list[str | None] = []
    for part in parts:
        found += ["\n"] * bool(found) + [part]
    if isinstance(found[0], str):
        found[0] = found[0].lstrip()
    if isinstance(found[-1], str):
        found[-1] = found[-1].rstrip()
    return found
