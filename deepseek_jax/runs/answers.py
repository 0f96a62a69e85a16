"""Exact scores of a generated task's held-out items (`data/tasks.py`), teacher-forced.

Suffixes: I items, A answers of an item, B items a batch, T tokens, X tokens but the last.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.data.tasks import Item, Task
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import everywhere
from deepseek_jax.runs.evaluate import in_batches
from deepseek_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Answered:
    """``right_IA``: bool, whether every token of each answer is the model's own best, given the true text before it."""

    items: tuple[Item, ...]
    right_IA: np.ndarray

    @property
    def exact(self) -> float:
        """The share of items all of whose answers are right. Where nothing is given between the answers (passkey, copy,
        addition) those are the items that greedy decoding would write exactly."""
        return float(self.right_IA.all(-1).mean())

    @property
    def by_order(self) -> list[float]:
        """The share that is right of the first answers, of the second, ..."""
        return self.right_IA.mean(0).tolist()

    def by_depth(self, parts: int = 10) -> list[float | None]:
        """The share that is right of the answers whose source stands in each of ``parts`` equal parts of the text
        before them; None where there are none."""
        depth_IA = np.array(
            [[np.nan if a.source is None else a.source / a.start for a in item.answers] for item in self.items]
        )
        part_IA = np.floor(depth_IA * parts)
        return [float(self.right_IA[part_IA == i].mean()) if (part_IA == i).any() else None for i in range(parts)]


@partial(jax.jit, static_argnames=("ctx",))
def _best(model: Transformer, tokens_BT, segments_BT, ctx: Context):
    logits_BTV = model(tokens_BT, segments=segments_BT, ctx=ctx).logits
    return everywhere(jnp.argmax(logits_BTV[:, :-1], -1) == tokens_BT[:, 1:], ctx)


def score_answers(
    model: Transformer, task: Task, tokenizer: Tokenizer, items: int = 500, ctx: Context = DEFAULT
) -> Answered:
    """Scores the first ``items`` held-out items of ``task``, each in a row of its own after BOS.

    A token belongs to an answer where it has a byte of it, so a tokenizer that joins characters across an answer's
    beginning makes the model say those too.

    Raises:
        ValueError: the task has fewer items, an item is longer than the model's max_length, or the tokenizer is not
            byte-level or has no BOS.
    """
    found = task.held_out(items)
    texts = [item.text for item in found]
    ids, bytes_V = tokenizer.encode_batch(texts, add_bos=True, special_tokens=False), tokenizer.token_bytes()
    length = max(map(len, ids))
    if length > model.cfg.max_length:
        raise ValueError(
            f"An item of task:{task.spelled} has {length} tokens, more than the max_length={model.cfg.max_length} of "
            f"{model.cfg.name}: make it smaller."
        )
    tokens_IT, segments_IT = np.zeros((items, length), np.int32), np.zeros((items, length), np.int32)
    for row, tokens in enumerate(ids):
        tokens_IT[row, : len(tokens)], segments_IT[row, : len(tokens)] = tokens, 1
    right = [
        np.asarray(_best(model, batch["tokens"], batch["segments"], ctx))
        for batch in in_batches(ctx, tokens=tokens_IT, segments=segments_IT)
    ]
    right_IX = np.concatenate(right)[:items]
    right_IA = np.array(
        [_answers(item, bytes_V[tokens], row_X) for item, tokens, row_X in zip(found, ids, right_IX, strict=True)]
    )
    return Answered(found, right_IA)


def _answers(item: Item, bytes_T: np.ndarray, right_X: np.ndarray) -> list[bool]:
    """Whether each answer's tokens are all right; ``right_X[t]`` is that of token t + 1."""
    stop_T = np.cumsum(bytes_T)
    if stop_T[-1] != len(item.text):
        raise ValueError(f"The tokens of {item.text[:40]!r} stand for {stop_T[-1]} bytes, not its {len(item.text)}.")
    start_T = stop_T - bytes_T
    return [
        bool(right_X[np.flatnonzero((start_T < answer.stop) & (stop_T > answer.start)) - 1].all())
        for answer in item.answers
    ]
