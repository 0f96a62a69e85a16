"""A DeepSeekMoE layer: shared experts for every token plus routed ones (2401.06066; V3 §2.1.2).

Suffixes: B batch, T tokens, D width, K chosen experts, E experts, F expert width.
"""

import jax
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import param
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.ffn import FFN
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.router import KnockOut, Router, score_share, sequence_balance


class MoE(nnx.Module):
    """Pure: (x, segments) -> (y, statistics, scores)."""

    def __init__(self, cfg: schema.MoE, dim: int, dtype):
        self.cfg = cfg
        E, F = cfg.n_experts, cfg.expert_dim
        self.router = Router(cfg, dim, dtype)
        self.gate_up = param(dtype, (E, dim, 2, F), ("expert", "embed", None, "expert_ffn"), inputs=1, apart=(0, 2))
        self.down = param(dtype, (E, F, dim), ("expert", "expert_ffn", "embed"), inputs=1, apart=(0,))
        # Published checkpoints fuse the shared experts into one network of their summed width.
        self.shared = FFN(dim, cfg.shared_width, dtype) if cfg.n_shared else None

    def __call__(
        self, x_BTD: jax.Array, segment_BT: jax.Array, ctx: Context, given: jax.Array | KnockOut | None = None
    ) -> tuple[jax.Array, Aux, jax.Array]:
        routing = self.router(x_BTD, segment_BT, ctx, given)
        chosen = routing.index_BTK, routing.weight_BTK
        y_BTD, dropped = ctx.ops.experts(Experts(ctx.experts), x_BTD, *chosen, self.gate_up, self.down)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, ctx)
        aux = Aux(
            expert_index=routing.index_BTK,
            load=ctx.ops.count(routing.index_BTK, self.cfg.n_experts),
            balance={"sequence": sequence_balance(routing.score_BTE, segment_BT, self.cfg.top_k, ctx)},
            share=score_share(routing.score_BTE, segment_BT),
            dropped=dropped,
        )
        return y_BTD, aux, routing.score_BTE
