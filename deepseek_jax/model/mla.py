"""Multi-head latent attention (DeepSeek-V2, 2405.04434 §2.1; V3 §2.1.1).

Keys and values of all heads are linear maps of one latent a token; only the latent and one rotated key are
cached. Two forms give the same numbers: *expanded* computes keys and values from the latents; *absorbed*
moves the key map into the query and the value map behind the softmax, so that attention runs on the latents.

Suffixes: B batch, T queries, S keys, D width, Q query rank, C latent rank, N heads, H nope, R rope, V value
dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core.cached import empty, kept, put, taken
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.core.norm import LATENT_EPS, RMSNorm
from deepseek_jax.core.ops import ONE_DEVICE
from deepseek_jax.core.params import param
from deepseek_jax.core.rope import softmax_scale
from deepseek_jax.core.served import Form, Served
from deepseek_jax.model.attention import attend, attend_cache
from deepseek_jax.model.indexer import Indexer, divergence
from deepseek_jax.model.linear import linear
from deepseek_jax.model.tokens import Tokens

# Values of a latent or an indexer's key that share a scale where they are kept in FP8.
KEY_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absorbed:
    """``kv_b`` as the absorbed form multiplies by it, beside the whole: a step of decoding need not cut and turn it.

    ``key``: [N, H, C], from a head's query to the latent. ``value``: [N, C, V], from the latent to a head's values.
    """

    whole: Any
    key: Any
    value: Any


class MLA(nnx.Module):
    """Pure: (x, tokens, held) -> (y, held, report). Leaves follow the published matrices, fused where they are."""

    def __init__(self, cfg: schema.MLA, dim: int, dtype):
        self.cfg = cfg
        D, N, C, H, R, V = dim, cfg.n_heads, cfg.kv_rank, cfg.nope_dim, cfg.rope_dim, cfg.v_dim
        if cfg.q_rank is None:
            self.q = param(dtype, (D, N, H + R), ("embed", "heads", "head_dim"), inputs=1)
        else:
            self.q_a = param(dtype, (D, cfg.q_rank), ("embed", "q_rank"), inputs=1)
            self.q_norm = RMSNorm(dtype, cfg.q_rank, "q_rank", LATENT_EPS)
            self.q_b = param(dtype, (cfg.q_rank, N, H + R), ("q_rank", "heads", "head_dim"), inputs=1)
        self.kv_a = param(dtype, (D, C + R), ("embed", "kv_rank"), inputs=1)
        self.kv_norm = RMSNorm(dtype, C, "kv_rank", LATENT_EPS)
        self.kv_b = param(dtype, (C, N, H + V), ("kv_rank", "heads", "head_dim"), inputs=1)
        self.o = param(dtype, (N, V, D), ("heads", "head_dim", "embed"), inputs=2)
        self.indexer = None if cfg.indexer is None else Indexer(cfg, dim, dtype)

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        ctx: Context,
        held: tuple[jax.Array, jax.Array | None] | None = None,
        i: jax.Array | int = 0,
        report: tuple[str, ...] = (),
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None] | None, dict[str, jax.Array]]:
        """``held``: what `held` made, of which the rows of layer ``i`` are written. ``report``: what to return besides
        y and that; "index_kl", float32 [B, T], is `indexer.divergence`.
        """
        cfg = self.cfg
        q_BTQ = None if cfg.q_rank is None else self.q_norm(linear("BTD,DQ->BTQ", x_BTD, self.q_a, ctx))
        q_BTNH, q_BTNR = self._queries(x_BTD, q_BTQ, tokens, ctx)
        latent = linear("BTD,DC->BTC", x_BTD, self.kv_a, ctx)
        c_BTC, k_BTR = jnp.split(latent, [cfg.kv_rank], axis=-1)
        c_BTC = self.kv_norm(c_BTC)
        k_BTR = tokens.rotated(k_BTR, cfg.rope_dim, cfg.rope)
        latent_BTX, seeking, index = jnp.concatenate([c_BTC, k_BTR], axis=-1), None, None
        if self.indexer is not None:
            seeking, index = self.indexer(x_BTD, q_BTQ, tokens, ctx)
        keys = (latent_BTX, index)
        if held is not None:
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            held = tuple(
                None if h is None else put(h, i, rows, tokens.slot, kept(k, h)) for h, k in zip(held, keys, strict=True)
            )
            keys = tuple(None if h is None else taken(h, x_BTD.dtype, i) for h in held)
            if seeking is not None and isinstance(held[1], Served):
                seeking = seeking.turned()

        form = self._absorbed if self._absorbs(x_BTD.shape[1], keys[0].shape[1], ctx) else self._expanded
        if form == self._absorbed and self._attends_by_kernel(x_BTD.shape[1], held, ctx):
            form = partial(form, attends=partial(attend_cache, held[0], i))
        form = partial(form, reports=seeking is not None and "index_kl" in report)
        o_BTNV, kl_BT = ctx.ops.rows(form, (q_BTNH, q_BTNR, seeking), keys, tokens, ctx)
        return linear("BTNV,NVD->BTD", o_BTNV, self.o, ctx), held, {} if kl_BT is None else {"index_kl": kl_BT}

    def held(
        self, layers: int, batch: int, length: int, rewind: int, dtype, ctx: Context
    ) -> tuple[jax.Array | Served, jax.Array | Served | None]:
        """For a cache, [layers, B, S, C + R]: each token's normalised latent, then its rotated key, shared by all heads
        (V2 §2.1.2; 576 numbers for V3); and [layers, B, S, I], the indexer's keys, where there is one."""
        cfg, of_latent, of_index, index = self.cfg, None, None, None

        def zeros(shape, dtype):
            return ctx.ops.zeros(shape, dtype, (None, BATCH, None, None))

        if ctx.cache == "served":
            of_latent = Form(cfg.kv_rank, KEY_BLOCK)
        if cfg.indexer is not None:
            size = cfg.indexer.index_dim
            if ctx.cache == "served":
                of_index = Form(size, KEY_BLOCK, turned=True)
            index = empty(of_index, (layers, batch, length, size), dtype, zeros)
        return empty(of_latent, (layers, batch, length, cfg.kv_rank + cfg.rope_dim), dtype, zeros), index

    def _queries(self, x_BTD, q_BTQ, tokens: Tokens, ctx: Context):
        if q_BTQ is None:
            q = linear("BTD,DNX->BTNX", x_BTD, self.q, ctx)
        else:
            q = linear("BTQ,QNX->BTNX", q_BTQ, self.q_b, ctx)
        q_BTNH, q_BTNR = jnp.split(q, [self.cfg.nope_dim], axis=-1)
        return q_BTNH, tokens.rotated(q_BTNR, self.cfg.rope_dim, self.cfg.rope)

    def _expanded(self, q_BTNH, q_BTNR, seeking, latent_BSX, index_BSI, tokens: Tokens, ctx: Context, reports: bool):
        cfg = self.cfg
        c_BSC, k_BSR = jnp.split(latent_BSX, [cfg.kv_rank], axis=-1)
        kv_b = self.kv_b.whole if isinstance(self.kv_b, Absorbed) else self.kv_b
        kv = linear("BSC,CNX->BSNX", c_BSC, kv_b, ctx)
        k_BSNH, v_BSNV = jnp.split(kv, [cfg.nope_dim], axis=-1)
        k_BSNR = jnp.broadcast_to(k_BSR[:, :, None], (*k_BSNH.shape[:3], cfg.rope_dim))
        q, k = jnp.concatenate([q_BTNH, q_BTNR], -1), jnp.concatenate([k_BSNH, k_BSNR], -1)
        scale = softmax_scale(cfg.nope_dim + cfg.rope_dim, cfg.rope)
        kl_BT = divergence(q, k, tokens, scale, seeking, index_BSI) if reports else None
        return attend(q, k, v_BSNV, tokens, scale, ctx, seeking, index_BSI), kl_BT

    def _absorbed(
        self,
        q_BTNH,
        q_BTNR,
        seeking,
        latent_BSX,
        index_BSI,
        tokens: Tokens,
        ctx: Context,
        reports: bool,
        attends=attend,
    ):
        cfg = self.cfg
        parts = ctx.ops.apart(self.kv_b)
        if parts:
            columns, dtype = ctx.ops.product_of_columns, q_BTNH.dtype
            q_BTNC = columns("BTNH,CNH->BTNC", q_BTNH, self.kv_b, 0, cfg.nope_dim).astype(dtype)
        else:
            kv_b = self.kv_b if isinstance(self.kv_b, Absorbed) else self.absorbed(latent_BSX.dtype, ctx)
            q_BTNC = linear("BTNH,NHC->BTNC", q_BTNH, kv_b.key, ctx)
        q = jnp.concatenate([q_BTNC, q_BTNR], axis=-1)
        key, value = latent_BSX[:, :, None], latent_BSX[:, :, None, : cfg.kv_rank]
        scale = softmax_scale(cfg.nope_dim + cfg.rope_dim, cfg.rope)
        o_BTNC = attends(q, key, value, tokens, scale, ctx, seeking, index_BSI)
        kl_BT = divergence(q, key, tokens, scale, seeking, index_BSI) if reports else None
        if parts:
            width = cfg.nope_dim + cfg.v_dim
            return columns("BTNC,CNV->BTNV", o_BTNC, self.kv_b, cfg.nope_dim, width).astype(dtype), kl_BT
        return linear("BTNC,NCV->BTNV", o_BTNC, kv_b.value, ctx), kl_BT

    def absorbed(self, dtype, ctx: Context = DEFAULT) -> Absorbed:
        """``kv_b`` in both forms, its maps in ``dtype``."""
        w_k_CNH, w_v_CNV = jnp.split(ctx.ops.weight(self.kv_b, dtype), [self.cfg.nope_dim], axis=-1)
        return Absorbed(self.kv_b, w_k_CNH.transpose(1, 2, 0), w_v_CNV.transpose(1, 0, 2))

    def _attends_by_kernel(self, T: int, held, ctx: Context) -> bool:
        """Whether a call is one that a kernel over the cache is for: its other conditions it raises errors for."""
        plain = held is not None and not isinstance(held[0], Served) and self.indexer is None and ctx.ops is ONE_DEVICE
        return plain and (ctx.attention == "native" or (ctx.attention == "hopper" and T == 1))

    def _absorbs(self, T: int, S: int, ctx: Context) -> bool:
        """The form with fewer multiplications, unless ``ctx.mla`` names one."""
        if ctx.mla != "auto":
            return ctx.mla == "absorbed"
        C, H, R, V = self.cfg.kv_rank, self.cfg.nope_dim, self.cfg.rope_dim, self.cfg.v_dim
        expanded = S * C * (H + V) + T * S * (H + R + V)
        absorbed = T * C * (H + V) + T * S * (2 * C + R)
        return absorbed < expanded
