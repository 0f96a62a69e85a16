"""Multi-token prediction (V3 §2.2): module d predicts the token d + 2 ahead, keeping the causal chain.

Suffixes: B batch, T tokens, H streams, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import Context
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.core.params import param
from deepseek_jax.model.block import Block
from deepseek_jax.model.linear import linear
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.residual import Collapse
from deepseek_jax.model.tokens import Tokens


class MTP(nnx.Module):
    """``norm(block(proj([norm(embedding of the next token); norm(hidden)])))``.

    The paper's equation 21 writes the hidden state first; released weights, and this module, put the
    embedding first. Embedding and head are the main model's, handed in: they are no leaves of this module.

    Of a model with several streams a module reads them as they are after the last layer, hands on its own, and has a
    collapse before its norm (V4): ``block(embed_proj(norm(embedding)) + hidden_proj(norm(stream)))``, of each stream.
    """

    def __init__(self, cfg: ModelConfig, dtype):
        self.embed_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        self.hidden_norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)
        if cfg.residual is None:
            self.proj = param(dtype, (2 * cfg.dim, cfg.dim), (None, "embed"), inputs=1)
            self.embed_proj = self.hidden_proj = self.collapse = None
        else:
            self.proj = None
            self.embed_proj = param(dtype, (cfg.dim, cfg.dim), (None, "embed"), inputs=1)
            self.hidden_proj = param(dtype, (cfg.dim, cfg.dim), (None, "embed"), inputs=1)
            self.collapse = Collapse(cfg)
        self.block = Block(cfg, cfg.mtp_layer, dtype, cfg.n_layers)
        self.norm = RMSNorm(dtype, cfg.dim, "embed", cfg.norm_eps)

    def __call__(
        self,
        carry: jax.Array,
        next_embedding_BTD: jax.Array,
        tokens: Tokens,
        ctx: Context,
        held: Any = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Any, Aux | None, dict[str, jax.Array]]:
        """``carry``: what the model, or the module before, hands on; this one's is returned first: hidden states after
        its norm [B, T, D], or streams [B, T, H, D]. Then what attention holds, router statistics, activations.

        ``tokens.segment`` is 0 where the next token is unknown; such positions return zero.

        Rotary positions are those of the hidden state; the reference takes those of the next token. Attention
        depends on differences only.
        """
        embedding_BTD, read = self.embed_norm(next_embedding_BTD), self.hidden_norm(carry)
        if self.collapse is None:
            x = linear("BTX,XD->BTD", jnp.concatenate([embedding_BTD, read], axis=-1), self.proj, ctx)
        else:
            token_BTD = linear("BTX,XD->BTD", embedding_BTD, self.embed_proj, ctx)
            x = token_BTD[:, :, None] + linear("BTHX,XD->BTHD", read, self.hidden_proj, ctx)
        x, held, aux, seen = self.block(x, tokens, ctx, held, capture=capture)
        seen = {name: seen[name] for name in capture if name in seen}
        if self.collapse is None:
            return jnp.where(tokens.segment[..., None] != 0, self.norm(x), 0), held, aux, seen
        return jnp.where(tokens.segment[..., None, None] != 0, x, 0), held, aux, seen

    def hidden(self, carry: jax.Array, ctx: Context) -> jax.Array:
        """The hidden states [B, T, D] that the head reads, of what the module hands on."""
        return carry if self.collapse is None else self.norm(self.collapse(carry, ctx))


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
