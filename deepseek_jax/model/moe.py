"""A DeepSeekMoE layer: shared experts for every token plus routed ones (2401.06066; V3 §2.1.2).

Suffixes: B batch, T tokens, D width, K chosen experts, E experts, F expert width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import param
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.ffn import FFN
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.router import KnockOut, Router, Routing, score_share, sequence_balance
from deepseek_jax.model.tokens import Tokens


class MoE(nnx.Module):
    """Pure: (x, tokens) -> (y, statistics, scores). ``vocab_size``: of the ids that a hash layer has experts for."""

    def __init__(self, cfg: schema.MoE, dim: int, dtype, vocab_size: int | None = None):
        self.cfg = cfg
        E, F = cfg.n_experts, cfg.expert_dim
        self.router = Router(cfg, dim, dtype, vocab_size)
        self.gate_up = param(dtype, (E, dim, 2, F), ("expert", "embed", None, "expert_ffn"), inputs=1, apart=(0, 2))
        self.down = param(dtype, (E, F, dim), ("expert", "expert_ffn", "embed"), inputs=1, apart=(0,))
        # Published checkpoints fuse the shared experts into one network of their summed width.
        self.shared = FFN(dim, cfg.shared_width, dtype, cfg.limit) if cfg.n_shared else None

    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, ctx: Context, given: jax.Array | KnockOut | None = None
    ) -> tuple[jax.Array, Aux, jax.Array]:
        routing, segment_BT = self.router(x_BTD, tokens, ctx, given), tokens.segment
        chosen = routing.index_BTK, routing.weight_BTK
        experts = Experts(ctx.experts, self.cfg.limit, ctx.fp8)
        y_BTD, dropped = ctx.ops.experts(experts, x_BTD, *chosen, self.gate_up, self.down)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, ctx)
        load = ctx.ops.count(routing.index_BTK, self.cfg.n_experts)
        balance_B, share_BE = self._balance(routing, segment_BT, ctx)
        aux = Aux(
            expert_index=routing.index_BTK,
            load=load,
            balance={"sequence": balance_B},
            share=share_BE,
            dropped=dropped,
        )
        return y_BTD, aux, routing.score_BTE

    def _balance(self, routing: Routing, segment_BT: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """What balance losses are made of, [B] and [B, E]; 0 in a hash layer, whose gate chooses nobody: they would
        move the weights of experts and not balance these."""
        if self.router.table is not None:
            rows = segment_BT.shape[0]
            return jnp.zeros(rows), jnp.zeros((rows, self.cfg.n_experts))
        balance_B = sequence_balance(routing.score_BTE, segment_BT, self.cfg.top_k, ctx)
        return balance_B, score_share(routing.score_BTE, segment_BT)
