"""Grouped-query attention (2305.13245), multi-head attention where every query head has a key head of its own.

Keys, rotated, and values of all key heads are cached. Suffixes: B batch, T queries, S keys, D width, N query heads,
G key heads, H head dimension.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.context import Context
from deepseek_jax.core.linear import linear
from deepseek_jax.core.params import param
from deepseek_jax.core.rope import apply_rope
from deepseek_jax.model.attention import Span, attend


class GQA(nnx.Module):
    """Pure: (x, span, memory) -> (y, memory). Leaves follow the published matrices; biases are flat, as published."""

    def __init__(self, cfg: schema.GQA, dim: int, dtype):
        self.cfg = cfg
        N, G, H = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.q = param(dtype, (dim, N, H), ("embed", "heads", "head_dim"), inputs=1)
        self.k = param(dtype, (dim, G, H), ("embed", "heads", "head_dim"), inputs=1)
        self.v = param(dtype, (dim, G, H), ("embed", "heads", "head_dim"), inputs=1)
        self.o = param(dtype, (N, H, dim), ("heads", "head_dim", "embed"), inputs=2)
        for name, heads in (("q_bias", N), ("k_bias", G), ("v_bias", G)):
            vector = param(dtype, (heads * H,), ("heads",), inputs=0, decay=False) if cfg.bias else None
            setattr(self, name, vector)

    def __call__(
        self,
        x_BTD: jax.Array,
        span: Span,
        ctx: Context,
        memory: jax.Array | None = None,
        layer: jax.Array | int = 0,
    ) -> tuple[jax.Array, jax.Array | None]:
        """``memory``: the cached keys, then values, of all layers, [L, B, S, 2 G H]; this layer's rows are written."""
        pairs = self.cfg.rope.interleaved
        q_BTNH = _rotated(_mapped(x_BTD, self.q, self.q_bias, ctx), span, pairs)
        k_BSGH = _rotated(_mapped(x_BTD, self.k, self.k_bias, ctx), span, pairs)
        v_BSGH = _mapped(x_BTD, self.v, self.v_bias, ctx)
        if memory is not None:
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            both = jnp.stack([k_BSGH, v_BSGH], axis=2)
            memory = memory.at[layer, rows, span.slot].set(
                both.reshape(*both.shape[:2], -1).astype(memory.dtype), mode="drop"
            )
            held = memory[layer].astype(x_BTD.dtype).reshape(*memory.shape[1:3], *both.shape[2:])
            k_BSGH, v_BSGH = held[:, :, 0], held[:, :, 1]

        o_BTNH = ctx.ops.rows(self._attend, (q_BTNH,), (k_BSGH, v_BSGH), span, ctx)
        return linear("BTNH,NHD->BTD", o_BTNH, self.o, ctx), memory

    def _attend(self, q_BTNH, k_BSGH, v_BSGH, span: Span, ctx: Context) -> jax.Array:
        return attend(q_BTNH, k_BSGH, v_BSGH, span, self.cfg.head_dim**-0.5, ctx)


def _mapped(x_BTD: jax.Array, w, b: nnx.Param | None, ctx: Context) -> jax.Array:
    y_BTGH = linear("BTD,DGH->BTGH", x_BTD, w, ctx)
    return y_BTGH if b is None else y_BTGH + b.get_value().astype(y_BTGH.dtype).reshape(y_BTGH.shape[2:])


def _rotated(x_BTGH: jax.Array, span: Span, interleaved: bool) -> jax.Array:
    return apply_rope(x_BTGH, span.cos[:, :, None], span.sin[:, :, None], interleaved)
