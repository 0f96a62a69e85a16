"""A pre-norm transformer layer: attention, then a dense or MoE network, each on the residual stream or streams.

Suffixes: B batch, T tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.configs import schema
from deepseek_jax.configs.layers import Layer
from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.model.compressed import Compressed
from deepseek_jax.model.ffn import FFN
from deepseek_jax.model.gqa import GQA
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.residual import PLAIN, Streams
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.tokens import Tokens

# "block" is what the layer hands on, [L, B, T, D], of several streams [L, B, T, H, D]; "block_norm" its root mean
# square, a float32 number a token; "index_kl", another, how far the indexer is from attention.
CAPTURABLE = ("block", "attn", "ffn", "router_scores", "block_norm", "index_kl")

ATTENTION = {schema.MLA: MLA, schema.GQA: GQA}


class Block(nnx.Module):
    """``x + attn(norm(x))``, then ``x + ffn(norm(x))``; of several streams, what `residual.Streams` reads and writes.

    ``number``: which layer of the model it is.
    """

    def __init__(self, cfg: schema.ModelConfig, layer: Layer, dtype, number: jax.Array | int):
        self.attn_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        if isinstance(layer.attention, schema.Compressed):
            self.attn = Compressed(layer.attention, cfg.dim, dtype, cfg.norm_eps)
        else:
            self.attn = ATTENTION[type(layer.attention)](layer.attention, cfg.dim, dtype)
        self.ffn_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        self.ffn = (
            MoE(layer.ffn, cfg.dim, dtype, cfg.vocab_size) if layer.is_moe else FFN(cfg.dim, layer.ffn.dim, dtype)
        )
        self.attn_streams = Streams(cfg, 2 * number) if cfg.residual else None
        self.ffn_streams = Streams(cfg, 2 * number + 1) if cfg.residual else None

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        ctx: Context,
        held: Any = None,
        i: jax.Array | int = 0,
        given: jax.Array | KnockOut | None = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Any, Aux | None, dict[str, jax.Array]]:
        """The stream [B, T, D] or streams [B, T, H, D] after the layer, what attention holds (this is layer ``i`` of
        those held together), router statistics (None for a dense layer), activations; ``capture``: those of them that
        would not be computed otherwise."""
        x = checkpoint_name(x, "stream")
        residual = self.attn_streams or PLAIN
        y_BTD, back = residual.read(x, ctx)
        attn, held, report = self.attn(self.attn_norm(y_BTD), tokens, ctx, held, i, capture)
        attn = checkpoint_name(ctx.ops.constrain(attn, (BATCH, SEQUENCE, None)), "attn")
        x = residual.write(x, attn, back, ctx)

        residual, aux = self.ffn_streams or PLAIN, None
        y_BTD, back = residual.read(x, ctx)
        if isinstance(self.ffn, MoE):
            ffn, aux, score_BTE = self.ffn(self.ffn_norm(y_BTD), tokens, ctx, given)
            report = report | {"router_scores": score_BTE}
        else:
            network, y_BTD = ctx.ops.fence((self.ffn, self.ffn_norm(y_BTD)))
            ffn = network(y_BTD, ctx)
        ffn = checkpoint_name(ctx.ops.constrain(ffn, (BATCH, SEQUENCE, None)), "ffn")
        x = residual.write(x, ffn, back, ctx)
        norm_BT = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(2, x.ndim))))
        return x, held, aux, {"block": x, "attn": attn, "ffn": ffn, "block_norm": norm_BT, **report}
