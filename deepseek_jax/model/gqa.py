"""Grouped-query attention (2305.13245), multi-head attention where every query head has a key head of its own.

Keys, rotated, and values of all key heads are cached. Suffixes: B batch, T queries, S keys, D width, N query heads,
G key heads, H head dimension.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.core.params import param
from deepseek_jax.model.attention import attend
from deepseek_jax.model.linear import linear
from deepseek_jax.model.tokens import Tokens


class GQA(nnx.Module):
    """Pure: (x, tokens, held) -> (y, held, report). Leaves follow the published matrices; biases are flat as there."""

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
        tokens: Tokens,
        ctx: Context,
        held: jax.Array | None = None,
        i: jax.Array | int = 0,
        report: tuple[str, ...] = (),
    ) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
        """``held``: what `held` made, of which the rows of layer ``i`` are written. Has nothing to report."""
        cfg = self.cfg
        q_BTNH = tokens.rotated(_mapped(x_BTD, self.q, self.q_bias, ctx), cfg.rope_dim, cfg.rope)
        k_BSGH = tokens.rotated(_mapped(x_BTD, self.k, self.k_bias, ctx), cfg.rope_dim, cfg.rope)
        v_BSGH = _mapped(x_BTD, self.v, self.v_bias, ctx)
        if held is not None:
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            both = jnp.stack([k_BSGH, v_BSGH], axis=2)
            new = both.reshape(*both.shape[:2], -1).astype(held.dtype)
            held = held.at[i, rows, tokens.slot].set(new, mode="drop")
            both = held[i].astype(x_BTD.dtype).reshape(*held.shape[1:3], *both.shape[2:])
            k_BSGH, v_BSGH = both[:, :, 0], both[:, :, 1]

        o_BTNH = ctx.ops.rows(self._attend, (q_BTNH,), (k_BSGH, v_BSGH), tokens, ctx)
        return linear("BTNH,NHD->BTD", o_BTNH, self.o, ctx), held, {}

    def held(self, layers: int, batch: int, length: int, rewind: int, dtype, ctx: Context) -> jax.Array:
        """[layers, B, S, 2 G H] for a cache: each token's rotated keys, then its values, of all key heads."""
        if ctx.cache != "compute":
            raise ValueError(
                f'Context(cache="{ctx.cache}"): what grouped-query attention keeps is held in the compute dtype only; '
                'leave out cache, or give "compute".'
            )
        return ctx.ops.zeros((layers, batch, length, self.cfg.cache_width), dtype, (None, BATCH, None, None))

    def _attend(self, q_BTNH, k_BSGH, v_BSGH, tokens: Tokens, ctx: Context) -> jax.Array:
        return attend(q_BTNH, k_BSGH, v_BSGH, tokens, self.cfg.head_dim**-0.5, ctx)


def _mapped(x_BTD: jax.Array, w, b: nnx.Param | None, ctx: Context) -> jax.Array:
    y_BTGH = linear("BTD,DGH->BTGH", x_BTD, w, ctx)
    return y_BTGH if b is None else y_BTGH + b.get_value().astype(y_BTGH.dtype).reshape(y_BTGH.shape[2:])
