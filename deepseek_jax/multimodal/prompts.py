"""Janus-Pro's prompts, as DeepSeek's own processor writes them: a conversation, and where pictures stand in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.text.tokenizer import Tokenizer

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PLACEHOLDER, BEGIN, END, PAD = "<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts for one model by its tokenizer. Raises ValueError where the tokenizer lacks what it needs."""

    tokenizer: Tokenizer
    cfg: JanusConfig

    def __post_init__(self):
        self.tokenizer.check_fits(self.cfg.language.vocab_size)

    @property
    def pad_id(self) -> int:
        return self.id_of(PAD)

    def about_pictures(self, text: str, count: int, system: str = SYSTEM) -> list[int]:
        """A user's message with ``count`` pictures: in the places of ``<image_placeholder>`` in the text, or before it.

        Raises ValueError where the text has another number of places.
        """
        places = text.count(PLACEHOLDER)
        if places == 0:
            text = f"{PLACEHOLDER}\n" * count + text
        elif places != count:
            raise ValueError(f"the prompt has {places} places {PLACEHOLDER} for {count} pictures.")
        first, *others = conversation([(USER, text), (ASSISTANT, "")], system).split(PLACEHOLDER)
        picture = [self.id_of(BEGIN), *[self.cfg.image_id] * self.cfg.vision.n_tokens, self.id_of(END)]
        ids = self._encoded(first, first=True)
        for part in others:
            ids += picture + self._encoded(part)
        return ids

    def to_draw(self, text: str) -> list[int]:
        """A user's message that is to be drawn: the picture's codes follow."""
        return [*self._encoded(conversation([(USER, text), (ASSISTANT, "")]), first=True), self.id_of(BEGIN)]

    def _encoded(self, text: str, first: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_bos=first and self.tokenizer.bos_id is not None)

    def id_of(self, token: str) -> int:
        """Raises ValueError for a token that there is not."""
        found = self.tokenizer.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token}, which a Janus's prompts need.")
        return found


def conversation(messages: Sequence[tuple[str, str]], system: str = "") -> str:
    """The text of a conversation, (role, content) each; an empty content is an answer that is to come."""
    text = f"{system}\n\n" if system else ""
    for number, (role, content) in enumerate(messages):
        ending = ("\n\n", "<｜end▁of▁sentence｜>")[number % 2]
        text += f"{role}: {content.strip()}{ending}" if content.strip() else f"{role}:"
    return text.strip()
