"""On-policy distillation: of what the student writes, its distribution is moved to the teacher's at every token.

Suffixes: B answers, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.config_file import read_config
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.rl.objective import reverse_kl
from deepseek_jax.runs.prepare import file_hash
from deepseek_jax.train.objective import CAPTURE, loads, squares


@dataclass(frozen=True)
class ReverseKl:
    """KL(student || teacher) in nats, over the whole vocabulary, the mean over the batch's answer tokens.

    An objective of `train.step.train_step`. Of a batch: "answer", 1 where a token counts, and "teacher" [B, T, V], the
    teacher's logits at each position (`teacher_logits`), of the token after it. ``temperature``: the rollout's, by
    which both are divided. There is no sample in it but the prefix: the sum is over all that might have come next.
    """

    temperature: float = 1.0

    # "old" and "advantage" come with every rollout and are not looked at.
    entries = frozenset(("tokens", "segments", "answer", "old", "advantage", "teacher"))

    def counts(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        real = batch["segments"] != 0
        counted = jnp.maximum((real & (batch["answer"] > 0)).sum(), 1)
        return counted.astype(jnp.float32), jnp.maximum(real.sum(), 1).astype(jnp.float32)

    def __call__(self, model: Transformer, part: Mapping[str, jax.Array], counts, knobs, ctx: Context):
        out = model(part["tokens"], segments=part["segments"], capture=CAPTURE, ctx=ctx)
        kl_BT = reverse_kl(out.logits / self.temperature, part["teacher"] / self.temperature)[:, :-1]
        # The distribution at a position is that of the token after it.
        counted_BT = ((part["segments"] != 0) & (part["answer"] > 0))[:, 1:]
        total = jnp.where(counted_BT, kl_BT, 0).sum() / counts[0]
        return total, {"reverse_kl": total, "activation_norm": squares(out, part) / counts[1], **loads(out)}


@partial(jax.jit, static_argnames="ctx")
def teacher_logits(model: Transformer, batch: Mapping[str, jax.Array], ctx: Context = DEFAULT) -> jax.Array:
    """float32 [B, T, V], of a batch's rows."""
    return model(batch["tokens"], segments=batch["segments"], ctx=ctx).logits.astype(jnp.float32)


def check_teacher(teacher: Path, student: Path, cfg: ModelConfig) -> None:
    """Raises ValueError for a teacher whose distributions are over other tokens than the student's."""
    other = read_config(teacher).vocab_size
    if other != cfg.vocab_size:
        raise ValueError(
            f"the teacher {teacher} has a vocabulary of {other} tokens, the student {student} one of {cfg.vocab_size}: "
            "distributions over other tokens cannot be compared. Distil by its answers, with --how sft."
        )
    if file_hash(teacher) != file_hash(student):
        raise ValueError(
            f"the tokenizers of the teacher {teacher} and the student {student} differ: one id is another token. "
            "Distil by its answers, with --how sft."
        )
