"""The dense SwiGLU network. Suffixes: B batch, T tokens, D width, F inner width."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.context import Context
from deepseek_jax.core.params import param
from deepseek_jax.model.linear import linear


def swiglu(gate: jax.Array, up: jax.Array, limit: float | None = None) -> jax.Array:
    """What every network multiplies by ``down`` (Shazeer 2002.05202). ``limit``: the gate's input is cut off above it,
    the other factor on both sides; no gradient passes where one is cut (V4)."""
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


class FFN(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one leaf [D, 2, F], multiplied at once. ``limit``: `swiglu`."""

    def __init__(self, dim: int, ffn_dim: int, dtype, limit: float | None = None):
        self.limit = limit
        self.gate_up = param(dtype, (dim, 2, ffn_dim), ("embed", None, "ffn"), inputs=1, apart=(1,))
        self.down = param(dtype, (ffn_dim, dim), ("ffn", "embed"), inputs=1)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        gate_BTF, up_BTF = jnp.moveaxis(linear("BTD,DZF->BTZF", x_BTD, self.gate_up, ctx), 2, 0)
        return linear("BTF,FD->BTD", swiglu(gate_BTF, up_BTF, self.limit), self.down, ctx)
