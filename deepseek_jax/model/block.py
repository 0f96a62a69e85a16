"""A pre-norm transformer layer: attention, then a dense or MoE network, each on the residual stream."""

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
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.tokens import Tokens

# "block_norm" is the root mean square of "block", a float32 number a token; "index_kl", another, how far the indexer is
# from attention.
CAPTURABLE = ("block", "attn", "ffn", "router_scores", "block_norm", "index_kl")

ATTENTION = {schema.MLA: MLA, schema.GQA: GQA}


class Block(nnx.Module):
    """``x + attn(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, cfg: schema.ModelConfig, layer: Layer, dtype):
        self.attn_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        if isinstance(layer.attention, schema.Compressed):
            self.attn = Compressed(layer.attention, cfg.dim, dtype, cfg.norm_eps)
        else:
            self.attn = ATTENTION[type(layer.attention)](layer.attention, cfg.dim, dtype)
        self.ffn_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        self.ffn = MoE(layer.ffn, cfg.dim, dtype) if layer.is_moe else FFN(cfg.dim, layer.ffn.dim, dtype)

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        ctx: Context,
        held: Any = None,
        i: jax.Array | int = 0,
        given: jax.Array | KnockOut | None = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Any, Aux | None, dict[str, jax.Array]]:
        """The stream, what attention holds (this is layer ``i`` of those held together), router statistics (None for a
        dense layer), activations; ``capture``: those of them that would not be computed otherwise."""
        x_BTD = checkpoint_name(x_BTD, "stream")
        attn, held, report = self.attn(self.attn_norm(x_BTD), tokens, ctx, held, i, capture)
        attn = checkpoint_name(ctx.ops.constrain(attn, (BATCH, SEQUENCE, None)), "attn")
        x_BTD = x_BTD + attn
        aux = None
        if isinstance(self.ffn, MoE):
            ffn, aux, score_BTE = self.ffn(self.ffn_norm(x_BTD), tokens.segment, ctx, given)
            report = report | {"router_scores": score_BTE}
        else:
            network, y_BTD = ctx.ops.fence((self.ffn, self.ffn_norm(x_BTD)))
            ffn = network(y_BTD, ctx)
        ffn = checkpoint_name(ctx.ops.constrain(ffn, (BATCH, SEQUENCE, None)), "ffn")
        x_BTD = x_BTD + ffn
        norm_BT = jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1))
        return x_BTD, held, aux, {"block": x_BTD, "attn": attn, "ffn": ffn, "block_norm": norm_BT, **report}
