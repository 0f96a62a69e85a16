"""How a problem is put to a model, and how its tokens are read again. Loads no JAX."""

from collections.abc import Iterable, Sequence

from deepseek_jax.rl.rewards import THINK
from deepseek_jax.rl.tasks import Problem
from deepseek_jax.text.presets import R1_ZERO
from deepseek_jax.text.tokenizer import Tokenizer


def encode(words: Tokenizer, problems: Sequence[Problem], form: str) -> tuple[list[list[int]], bool]:
    """Each problem's prompt as ids, and whether the prompts end with ``<think>``, so that answers begin inside a
    thought.

    Raises ValueError for a checkpoint without a chat template where ``form`` is "chat".
    """
    if form == "chat":
        texts = [words.render([{"role": "user", "content": problem.prompt}]) for problem in problems]
        return words.encode_batch(texts, add_bos=False), all(t.rstrip().endswith(THINK[0]) for t in texts)
    texts = [R1_ZERO.format(prompt=p.prompt) if form == "r1-zero" else p.prompt for p in problems]
    return words.encode_batch(texts), False


def read(words: Tokenizer, answers: Iterable[Sequence[int]], stop_ids: Iterable[int]) -> list[str]:
    """The text of answers without what ended them; rewards alone are computed of it, tokens stay tokens."""
    stops = set(stop_ids)
    return [words.decode(a[:-1] if a and a[-1] in stops else a) for a in map(list, answers)]
