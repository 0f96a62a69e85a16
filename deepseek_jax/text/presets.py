"""How R1 and R1-Zero want to be asked, beside their chat template, and how their answers are drawn. Loads no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_jax.text.tokenizer import Tokenizer

THINK = "<think>"
# 2501.12948, table 1.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


@dataclass(frozen=True)
class Preset:
    """``temperature``, ``top_p``: as of `generation.engine.generate`. ``chat``: a message goes through the checkpoint's
    chat template, without a system prompt, and the answer is made to begin with a thought; else into R1-Zero's."""

    temperature: float
    top_p: float
    chat: bool

    def ids(self, tokenizer: Tokenizer, messages: Sequence[dict], **variables) -> list[int]:
        """What the answer to a chat is continued from; of R1-Zero, to its last message.

        Raises TokenizerError for a system prompt where there is to be none, and without a chat template.
        """
        if not self.chat:
            return tokenizer.encode(R1_ZERO.format(prompt=messages[-1]["content"]))
        if any(message["role"] == "system" for message in messages):
            raise ValueError("the preset r1 has no system prompt: R1 wants what it is told in the user's message.")
        return tokenizer.chat(messages, **variables) + opening(tokenizer, tokenizer.render(messages, **variables))


def opening(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """The ids that open a thought, none where the rendered chat has opened one."""
    return [] if rendered.rstrip().endswith(THINK) else tokenizer.encode(f"{THINK}\n", add_bos=False)


# DeepSeek-R1's README: temperature 0.5 to 0.7, 0.6 at best, and top-p 0.95, as the paper's evaluations; no system
# prompt; answers that begin with a thought.
PRESETS = {"r1": Preset(0.6, 0.95, chat=True), "r1-zero": Preset(0.6, 0.95, chat=False)}
