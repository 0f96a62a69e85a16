"""The router: scores, a selection-only bias, node-limited routing (V2 §2.2; V3 §2.1.2), hash routing (V4 §2.1).

All of it is in float32.

Suffixes: B batch, T tokens, D width, E experts, G groups, M experts a group, K chosen experts.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.params import hash_table, param, router_bias
from deepseek_jax.model.linear import linear
from deepseek_jax.model.tokens import Tokens

# The reference adds this to the sum of the chosen scores; DeepSeek's own code adds nothing.
SUM_EPS = 1e-20


def sqrt_softplus(logit: jax.Array) -> jax.Array:
    """V4's scores. Where softplus is 0 in float32 the root's slope is infinite, and the gradient would be NaN."""
    return jnp.sqrt(jnp.maximum(jax.nn.softplus(logit), jnp.finfo(jnp.float32).tiny))


SCORES = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax, "sqrtsoftplus": sqrt_softplus}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """``index_BTK``: int32, -1 at padding. ``weight_BTK``: float32, 0 there. ``score_BTE``: float32, all scores."""

    index_BTK: jax.Array
    weight_BTK: jax.Array
    score_BTE: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KnockOut:
    """Experts to choose without: a call takes it as ``routing`` in place of experts to use (2401.06066, fig. 4).

    ``expert_LE``: bool [L_moe, E], the experts of each layer that no token goes to; a router has its row. ``top``: each
    token passes over so many of the others, those of its largest scores, and chooses among the rest. Weights are as
    ever, those of what is chosen. In the score of a group such an expert counts as the token's worst; a token to which
    its groups leave fewer than top_k experts has fewer.
    """

    expert_LE: jax.Array
    top: int = field(default=0, metadata={"static": True})


class Router(nnx.Module):
    """Chooses experts by score and bias, if there is one, and weighs them by the score alone.

    In a hash layer (``cfg.n_hash``) a table has the experts of every token (2106.04426; V4 §2.1): the scores weigh, and
    choose nobody.
    """

    def __init__(self, cfg: schema.MoE, dim: int, dtype, vocab_size: int | None = None):
        self.cfg = cfg
        self.weight = param(dtype, (dim, cfg.n_experts), ("embed", "scores"), inputs=1)
        self.bias = router_bias(cfg.n_experts) if cfg.bias else None
        self.table = hash_table(vocab_size, cfg.top_k, cfg.n_experts) if cfg.n_hash else None

    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, ctx: Context, given: jax.Array | KnockOut | None = None
    ) -> Routing:
        """``given``: experts to use instead of choosing, [B, T, K], -1 for none; weights still come from the scores. Or
        this layer's experts to choose without; ValueError in a hash layer."""
        # HIGHEST: a float32 product is bfloat16 on TPU and TF32 on GPU otherwise, which flips near-ties.
        x32_BTD = x_BTD.astype(jnp.float32)
        logits_BTE = linear("BTD,DE->BTE", x32_BTD, self.weight, ctx, precision=jax.lax.Precision.HIGHEST)
        score_BTE = SCORES[self.cfg.score](logits_BTE)
        if given is not None and not isinstance(given, KnockOut):
            index_BTK = given
        elif self.table is None:
            index_BTK = self.choose(score_BTE, ctx, given)
        else:
            index_BTK = self._looked_up(tokens, given)
        chosen_BTK = (index_BTK >= 0) & (tokens.segment[..., None] != 0)
        weight_BTK = jnp.take_along_axis(score_BTE, jnp.maximum(index_BTK, 0), axis=-1)
        weight_BTK = jnp.where(chosen_BTK, weight_BTK, 0.0)
        if self.cfg.normalize:
            weight_BTK = weight_BTK / (weight_BTK.sum(-1, keepdims=True) + SUM_EPS)
        return Routing(jnp.where(chosen_BTK, index_BTK, -1), weight_BTK * self.cfg.scale, score_BTE)

    def _looked_up(self, tokens: Tokens, without: KnockOut | None) -> jax.Array:
        """int32 [B, T, K]: the tokens' experts by the table."""
        if without is not None:
            raise ValueError(
                "routing=KnockOut: in a hash layer a token's id says its experts, and there are no others to choose; "
                "give the experts to use, routing=[MoE layers, batch, length, experts a token]."
            )
        # An id outside the vocabulary has an embedding of NaN (`Operations.lookup`): its experts do not matter.
        return self.table.get_value().at[tokens.id].get(mode="clip")

    def choose(self, score_BTE: jax.Array, ctx: Context = DEFAULT, without: KnockOut | None = None) -> jax.Array:
        """int32 [B, T, K]: the K best biased scores within the best groups; -1 where none is left."""
        cfg = self.cfg
        biased_BTE = jax.lax.stop_gradient(self._biased(score_BTE))
        out_BTE = None if without is None else _left_out(jax.lax.stop_gradient(score_BTE), without, ctx)
        if cfg.n_groups > 1:
            biased_BTGM = biased_BTE.reshape(*biased_BTE.shape[:-1], cfg.n_groups, -1)
            worth_BTGM = biased_BTGM
            if out_BTE is not None:
                worth_BTE = jnp.where(out_BTE, biased_BTE.min(-1, keepdims=True), biased_BTE)
                worth_BTGM = worth_BTE.reshape(biased_BTGM.shape)
            best_of = {"top2": lambda a: ctx.ops.top_k(a, 2)[0].sum(-1), "max": lambda a: a.max(-1)}
            group_BTG = best_of[cfg.group_score](worth_BTGM)
            best = ctx.ops.top_k(group_BTG, cfg.top_groups)[1]
            kept_BTG = (best[..., None] == jnp.arange(cfg.n_groups)).any(-2)
            # -inf, not 0: a bias may make every score of a kept group negative.
            biased_BTE = jnp.where(kept_BTG[..., None], biased_BTGM, -jnp.inf).reshape(biased_BTE.shape)
        if out_BTE is None:
            return ctx.ops.top_k(biased_BTE, cfg.top_k)[1]
        best_BTK, index_BTK = ctx.ops.top_k(jnp.where(out_BTE, -jnp.inf, biased_BTE), cfg.top_k)
        return jnp.where(best_BTK > -jnp.inf, index_BTK, -1)

    def _biased(self, score_BTE: jax.Array) -> jax.Array:
        if self.bias is None:
            return score_BTE
        bias_E = self.bias.get_value()
        return score_BTE + bias_E if self.cfg.bias_form == "sum" else score_BTE * (1 + bias_E)


def _left_out(score_BTE: jax.Array, without: KnockOut, ctx: Context) -> jax.Array:
    """bool [B, T, E] of one layer's ``without``."""
    out_BTE = jnp.broadcast_to(without.expert_LE, score_BTE.shape)
    if not without.top:
        return out_BTE
    passed = ctx.ops.top_k(jnp.where(out_BTE, -jnp.inf, score_BTE), without.top)[1]
    return out_BTE | (passed[..., None] == jnp.arange(score_BTE.shape[-1])).any(-2)


def sequence_balance(score_BTE: jax.Array, segment_BT: jax.Array, chosen: int, ctx: Context = DEFAULT) -> jax.Array:
    """float32 [B]: the sequence-wise balance loss before its factor alpha (V3 eq. 17-20).

    f counts the *unbiased*, ungrouped top K of the scores; P is the mean of the normalised scores; padding
    takes no part. A row is one sequence, also when it is packed from several texts.
    """
    real_BT = (segment_BT != 0).astype(jnp.float32)
    tokens_B = jnp.maximum(real_BT.sum(-1), 1.0)
    E = score_BTE.shape[-1]
    chosen_BTK = ctx.ops.top_k(jax.lax.stop_gradient(score_BTE), chosen)[1]
    rows = jnp.arange(score_BTE.shape[0])[:, None, None]
    count_BE = jnp.zeros((score_BTE.shape[0], E)).at[rows, chosen_BTK].add(real_BT[..., None])
    f_BE = count_BE * E / (chosen * tokens_B[:, None])
    p_BE = score_share(score_BTE, segment_BT) / tokens_B[:, None]
    return (f_BE * p_BE).sum(-1)


def score_share(score_BTE: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """float32 [B, E]: the sum over a row's real tokens of the normalised scores (V3 eq. 19; eq. 20 times T)."""
    share_BTE = score_BTE / (score_BTE.sum(-1, keepdims=True) + SUM_EPS)
    real_BT = (segment_BT != 0).astype(jnp.float32)
    return jnp.einsum("BTE,BT->BE", share_BTE, real_BT, precision=jax.lax.Precision.HIGHEST)
