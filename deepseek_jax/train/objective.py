"""What a training step differentiates, as a value: `Objective`, and `NextToken`, which pre-training and SFT have.

Suffixes: A micro-batches, B rows, T tokens, L MoE layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.model.outputs import Output
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.loss import ENTRIES, Counts, count, part_loss
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.weights import LossWeights

CAPTURE = ("block_norm",)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """What a schedule turns from step to step, as scalars, so that a change compiles nothing.

    ``lr``: learning rate. ``bias_speed``: gamma of the router bias. ``mtp_weight``: lambda of MTP.
    ``micro_batches``: int32, how many of the A micro-batches count.
    """

    lr: Any
    bias_speed: Any
    mtp_weight: Any
    micro_batches: Any

    @classmethod
    def of(cls, now: Setting) -> "Knobs":
        """A schedule's numbers as scalars of fixed dtypes."""
        return cls(
            np.float32(now.lr), np.float32(now.bias_speed), np.float32(now.mtp_weight), np.int32(now.micro_batches)
        )


class Objective(Protocol):
    """What `train_step` makes small, over a batch that it takes in parts.

    A frozen, hashable value: equal ones give one compiled step. It says what it divides by before it sees a part, from
    the batch alone, so that the parts' losses and gradients add up to the whole batch's.
    """

    entries: frozenset[str]
    """A batch's entries that it knows, "tokens" among them: arrays [A, B, T], or [A, B, T, ...] for its own."""

    def counts(self, batch: Mapping[str, jax.Array]) -> Any:
        """What the terms are divided by, a tree of arrays: over the whole batch, entries [A, B, T], in which "segments"
        is 0 at padding and in micro-batches that the step does not take."""
        ...

    def __call__(
        self, model: Transformer, part: Mapping[str, jax.Array], counts: Any, knobs: Knobs, ctx: Context
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The part's share of the batch's loss, and sums: figures that add up over the parts as the loss does.

        ``part``: entries [B, T] of one micro-batch, those that the batch has. The sums become metrics of the step.
        Some mean something to it: by those of `loads` it moves the router biases, which stay where there are none; of
        "activation_norm" (`squares`) it takes the root.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """Next-token prediction with MTP and the balance terms: `loss.loss`. With the entry "loss_mask" it is SFT's.

    ``weights``: of the terms. Of ``weights.mtp`` matters only whether it is 0: then no module is run;
    `Knobs.mtp_weight` weighs the term. ``mtp_depth``: the model's MTP modules.
    """

    weights: LossWeights
    mtp_depth: int

    entries = ENTRIES

    def counts(self, batch: Mapping[str, jax.Array]) -> Counts:
        return count(batch, self.mtp_depth if self.weights.mtp else 0)

    def __call__(self, model, part, counts, knobs, ctx):
        if model.cfg.mtp_depth != self.mtp_depth:
            raise ValueError(
                f"the objective counts the targets of {self.mtp_depth} MTP modules, but {model.cfg.name} has "
                f"{model.cfg.mtp_depth}: make it with mtp_depth={model.cfg.mtp_depth}."
            )
        total, out = part_loss(model, part, counts, self.weights, knobs.mtp_weight, ctx, CAPTURE)
        seen = {"activation_norm": squares(out, part) / counts.tokens[0], **loads(out)}
        return total, {**out.losses, **seen}


def loads(out: Output) -> dict[str, jax.Array]:
    """What a forward pass's routers did, as sums: "load" int32 [L, E], "dropped", and "mtp_load" where MTP ran; nothing
    of a model without experts."""
    if out.aux is None:
        return {}
    sums = {"load": out.aux.load, "dropped": out.aux.dropped.sum()}
    return sums if out.mtp_aux is None else sums | {"mtp_load": out.mtp_aux.load}


def squares(out: Output, part: Mapping[str, jax.Array]) -> jax.Array:
    """float32 [layers]: the mean squares of the residual stream after each block, which `CAPTURE` captures, summed over
    the part's real tokens. Over the batch's they are "activation_norm", of which the step takes the root."""
    square = jnp.square(out.captured["block_norm"])
    if "segments" in part:
        square = jnp.where(part["segments"] != 0, square, 0)
    return square.sum((1, 2))
