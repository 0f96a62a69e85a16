"""Multi-token prediction (V3 §2.2): module d predicts the token d + 2 ahead, keeping the causal chain.

Suffixes: B batch, T tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import Context
from deepseek_jax.core.linear import linear
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.core.params import param
from deepseek_jax.model.block import Block
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.tokens import Tokens


class MTP(nnx.Module):
    """``norm(block(proj([norm(embedding of the next token); norm(hidden)])))``.

    The paper's equation 21 writes the hidden state first; released weights, and this module, put the
    embedding first. Embedding and head are the main model's, handed in: they are no leaves of this module.
    """

    def __init__(self, cfg: ModelConfig, dtype):
        self.embed_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        self.hidden_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        self.proj = param(dtype, (2 * cfg.dim, cfg.dim), (None, "embed"), inputs=1)
        self.block = Block(cfg, cfg.mtp_layer, dtype)
        self.norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        next_embedding_BTD: jax.Array,
        tokens: Tokens,
        ctx: Context,
        held: Any = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Any, Aux | None, dict[str, jax.Array]]:
        """``tokens.segment`` is 0 where the next token is unknown; such positions return zero.

        Rotary positions are those of the hidden state; the reference takes those of the next token. Attention
        depends on differences only.
        """
        x = jnp.concatenate([self.embed_norm(next_embedding_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x = linear("BTX,XD->BTD", x, self.proj, ctx)
        x, held, aux, seen = self.block(x, tokens, ctx, held, capture=capture)
        seen = {name: seen[name] for name in capture if name in seen}
        return jnp.where(tokens.segment[..., None] != 0, self.norm(x), 0), held, aux, seen


def shifted(tokens_BT: jax.Array, segment_BT: jax.Array, depth: int) -> jax.Array:
    """int32 [B, T, depth]: the tokens at +1..+depth within the same segment, -1 where there is none."""
    T = tokens_BT.shape[1]
    columns = []
    for ahead in range(1, depth + 1):
        pad = ((0, 0), (0, ahead))
        token = jnp.pad(tokens_BT, pad, constant_values=-1)[:, ahead : ahead + T]
        segment = jnp.pad(segment_BT, pad)[:, ahead : ahead + T]
        columns.append(jnp.where((segment == segment_BT) & (segment_BT != 0), token, -1))
    return jnp.stack(columns, axis=-1).astype(jnp.int32)
