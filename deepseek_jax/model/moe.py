"""A DeepSeekMoE layer: shared experts for every token plus routed ones (2401.06066; V3 §2.1.2).

Suffixes: B batch, T tokens, D width, K chosen experts, E experts, F expert width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import Init, param
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.ffn import FFN
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.router import Router, expert_load, sequence_balance


class MoE(nnx.Module):
    """Pure: (x, segments) -> (y, statistics, scores)."""

    def __init__(self, cfg: schema.MoE, dim: int, init: Init):
        self.cfg = cfg
        E, F = cfg.n_experts, cfg.expert_dim
        self.router = Router(cfg, dim, init)
        self.gate_up = param(init, (E, dim, 2, F), ("expert", "embed", None, "expert_ffn"))
        self.down = param(init, (E, F, dim), ("expert", "expert_ffn", "embed"))
        # Published checkpoints fuse the shared experts into one network of their summed width.
        self.shared = FFN(dim, cfg.n_shared * F, init) if cfg.n_shared else None

    def __call__(
        self, x_BTD: jax.Array, segment_BT: jax.Array, ctx: Context, replay_BTK: jax.Array | None = None
    ) -> tuple[jax.Array, Aux, jax.Array]:
        B, T, D = x_BTD.shape
        routing = self.router(x_BTD, segment_BT, ctx, replay_BTK)
        y_ND = routed_experts(
            x_BTD.reshape(B * T, D),
            routing.index_BTK.reshape(B * T, -1),
            routing.weight_BTK.reshape(B * T, -1),
            self.gate_up,
            self.down,
            ctx,
        )
        y_BTD = y_ND.reshape(B, T, D)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, ctx)
        aux = Aux(
            expert_index=routing.index_BTK,
            load=expert_load(routing.index_BTK, self.cfg.n_experts),
            balance={"sequence": sequence_balance(routing.score_BTE, segment_BT, self.cfg.top_k)},
            dropped=jnp.zeros((), jnp.int32),
        )
        return y_BTD, aux, routing.score_BTE
