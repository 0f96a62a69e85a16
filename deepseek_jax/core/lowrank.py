"""Low-rank adapters (LoRA, 2106.09685): a frozen weight plus a trained product of two thin matrices.

Axes of a weight, in order: leading ones (stacked layers, experts), the inputs, then ``split`` axes of separate
published matrices (the gate and up halves), then the outputs. r: the rank.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.bits import Bits
from deepseek_jax.core.quant import Quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """The weight ``base + scale * a b``, never multiplied out where a map of it is applied.

    ``base``: [*lead, *inputs, *split, *outputs], frozen: a parameter, an array or a `Quantized`. ``a``: [*lead,
    *inputs, *split, r], the published layout's lora_A transposed. ``b``: [*lead, *split, r, *outputs], lora_B
    transposed. ``alpha``: r times the factor ``scale``. ``inputs``, ``split``, ``outputs``: how many axes each has.
    """

    base: Any
    a: Any
    b: Any
    alpha: float = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    split: int = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return held(self.base).shape

    @property
    def rank(self) -> int:
        return held(self.a).shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> jax.Array:
        """float32 ``scale * a b`` in the weight's shape."""
        a, b = (held(x).astype(jnp.float32) for x in (self.a, self.b))
        lead = a.shape[: a.ndim - self.inputs - self.split - 1]
        split = a.shape[a.ndim - 1 - self.split : -1]
        a = a.reshape(*lead, -1, math.prod(split), a.shape[-1])
        b = b.reshape(*lead, math.prod(split), a.shape[-1], -1)
        return (self.scale * jnp.einsum("...isr,...sro->...iso", a, b)).reshape(self.shape)


def held(w):
    """A weight without its variables: an array, a `Quantized`, or a `LowRank` of these."""
    if isinstance(w, LowRank):
        return LowRank(held(w.base), held(w.a), held(w.b), w.alpha, w.inputs, w.split, w.outputs)
    return w.get_value() if isinstance(w, nnx.Variable) else w


def dense(w, dtype) -> jax.Array:
    """A weight as an array of ``dtype``: dequantised if it is quantised, multiplied out if it is adapted."""
    w = held(w)
    if isinstance(w, LowRank):
        return (dense(w.base, jnp.float32) + w.delta()).astype(dtype)
    return w.dequantize(dtype) if isinstance(w, Quantized | Bits) else w.astype(dtype)
