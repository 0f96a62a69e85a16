"""The lightning indexer of DeepSeek sparse attention (V3.2, 2512.02556 §2.1): which earlier tokens a query sees, and
V4's (2606.19348 §2.3.1): which entries.

A few light heads score every earlier key; a query attends to the best of them only. The indexer's inputs are cut off
from the gradient, and so is its choice: a loss of the model does not reach it, and no weight decay moves it. It learns
by `divergence`.

Suffixes: B batch, T queries, S keys, K chosen keys, D width, Q query rank, H heads of the indexer, I their dimension.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import schema
from deepseek_jax.core import served
from deepseek_jax.core.context import Context
from deepseek_jax.core.norm import LATENT_EPS, LayerNorm
from deepseek_jax.core.params import param
from deepseek_jax.core.product import product
from deepseek_jax.model.compressor import Compressor
from deepseek_jax.model.linear import linear
from deepseek_jax.model.tokens import Tokens

HIGHEST = jax.lax.Precision.HIGHEST
# Of `divergence`: queries at once, but for long rows a sixteenth of them.
MIN_BLOCK = 64
BLOCKS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seeking:
    """What the indexer asks with, ``q_BTHI`` and the float32 weight of each head, ``weight_BTH``; and how many keys it
    chooses."""

    q_BTHI: jax.Array
    weight_BTH: jax.Array
    top_k: int = field(metadata={"static": True})

    def turned(self) -> "Seeking":
        """For keys that are (`core.served`)."""
        return replace(self, q_BTHI=served.turned(self.q_BTHI.astype(jnp.float32)))


class Indexer(nnx.Module):
    """``score(t, s) = sum_h weight_h(t) relu(q_h(t) . k(s) / sqrt(I))``; one key for all heads.

    Of a head the first R dimensions are rotated, in halves, where MLA rotates its last ones.
    """

    def __init__(self, cfg: schema.MLA, dim: int, dtype):
        self.cfg = cfg
        H, I = cfg.indexer.index_heads, cfg.indexer.index_dim  # noqa: E741
        self.q = param(dtype, (cfg.q_rank, H, I), ("q_rank", None, None), inputs=1, decay=False)
        self.k = param(dtype, (dim, I), ("embed", None), inputs=1, decay=False)
        self.k_norm = LayerNorm(dtype, I, None, LATENT_EPS)
        self.weight = param(dtype, (dim, H), ("embed", None), inputs=1, decay=False)

    def __call__(self, x_BTD: jax.Array, q_BTQ: jax.Array, tokens: Tokens, ctx: Context) -> tuple[Seeking, jax.Array]:
        """Of the layer's input and MLA's normalised query latents: what tokens ask with, and their keys [B, T, I]."""
        x_BTD, q_BTQ = jax.lax.stop_gradient((x_BTD, q_BTQ))
        q_BTHI = self._rotated(linear("BTQ,QHI->BTHI", q_BTQ, self.q, ctx), tokens)
        k_BTI = self._rotated(self.k_norm(linear("BTD,DI->BTI", x_BTD, self.k, ctx)), tokens)
        return _seeking(q_BTHI, x_BTD, self.weight, self.cfg.indexer, ctx), k_BTI

    def _rotated(self, x, tokens: Tokens) -> jax.Array:
        rotated, rest = jnp.split(x, [self.cfg.rope_dim], axis=-1)
        rotated = tokens.rotated(rotated, self.cfg.rope_dim, self.cfg.rope, interleaved=False)
        return jnp.concatenate([rotated, rest], axis=-1)


class EntryIndexer(nnx.Module):
    """V4's, of ``score(t, e)``, whose keys are entries of a compressor of its own, over the windows of attention's.

    Of a head, as of attention's, the last R dimensions are rotated.
    """

    def __init__(self, cfg: schema.Compressed, dim: int, dtype, eps: float):
        self.cfg = cfg.indexer
        H, I = cfg.indexer.index_heads, cfg.indexer.index_dim  # noqa: E741
        self.q = param(dtype, (cfg.q_rank, H, I), ("q_rank", None, None), inputs=1, decay=False)
        self.weight = param(dtype, (dim, H), ("embed", None), inputs=1, decay=False)
        self.compressor = Compressor(I, cfg.ratio, True, dim, dtype, eps)

    def __call__(self, x_BTD: jax.Array, q_BTQ: jax.Array, ctx: Context) -> tuple[Seeking, jax.Array]:
        """What tokens ask with, not rotated yet, and what of each goes into its compressor's entries."""
        x_BTD, q_BTQ = jax.lax.stop_gradient((x_BTD, q_BTQ))
        q_BTHI = linear("BTQ,QHI->BTHI", q_BTQ, self.q, ctx)
        return _seeking(q_BTHI, x_BTD, self.weight, self.cfg, ctx), self.compressor.parts(x_BTD, ctx)


def _seeking(q_BTHI, x_BTD, weight, cfg: schema.Indexer, ctx: Context) -> Seeking:
    weight_BTH = linear("BTD,DH->BTH", x_BTD.astype(jnp.float32), weight, ctx, precision=HIGHEST)
    return Seeking(q_BTHI, weight_BTH * (cfg.index_heads * cfg.index_dim) ** -0.5, cfg.index_top_k)


def index_scores(seeking: Seeking, k_BSI: jax.Array) -> jax.Array:
    """float32 [B, T, S]."""
    s_BTHS = jax.nn.relu(product("BTHI,BSI->BTHS", seeking.q_BTHI, k_BSI, HIGHEST))
    return product("BTHS,BTH->BTS", s_BTHS, seeking.weight_BTH, HIGHEST)


def chosen_keys(seeking: Seeking, k_BSI: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """int32 [B, T, K]: the best of the visible keys; where there are fewer than K, others too."""
    score_BTS = jnp.where(visible_BTS, jax.lax.stop_gradient(index_scores(seeking, k_BSI)), -jnp.inf)
    return jax.lax.top_k(score_BTS, min(seeking.top_k, score_BTS.shape[-1]))[1]


def only_chosen(visible_BTS: jax.Array, index_BTK: jax.Array) -> jax.Array:
    """bool [B, T, S]: of the visible keys those that were chosen."""
    B, T, S = jnp.broadcast_shapes(visible_BTS.shape, (*index_BTK.shape[:2], 1))
    b, t = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
    return visible_BTS & jnp.zeros((B, T, S), bool).at[b, t, index_BTK].set(True)


def divergence(q_BTNK, k_BSGK, tokens: Tokens, scale: float, seeking: Seeking, index_BSI: jax.Array) -> jax.Array:
    """float32 [B, T]: KL(p || softmax(I)) in nats, by which the indexer learns (§2.1.1); 0 at padding.

    Over the keys that a query attends to: the chosen ones, or all that it sees where these are no more. p: what the
    heads of attention give each key, added up and divided by their number. Its gradient goes into I alone.
    """
    q_BTNK, k_BSGK = jax.lax.stop_gradient((q_BTNK, k_BSGK))
    T, size = q_BTNK.shape[1], max(MIN_BLOCK, -(-q_BTNK.shape[1] // BLOCKS))
    # Computed again in the backward pass: memory does not grow with T x S.
    block = jax.checkpoint(partial(divergence_of, scale=scale))
    pieces = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        keys = stop if tokens.causal and tokens.slot is None else k_BSGK.shape[1]
        rows = jax.tree.map(lambda a, start=start, stop=stop: a[:, start:stop], (q_BTNK, seeking))
        seen = jnp.broadcast_to(tokens.visible(start, stop - start, keys), (q_BTNK.shape[0], stop - start, keys))
        pieces.append(block(*rows, k_BSGK[:, :keys], index_BSI[:, :keys], seen))
    return jnp.concatenate(pieces, axis=1)


def divergence_of(q_BTNK, seeking: Seeking, k_BSGK, index_BSI, seen_BTS, scale: float) -> jax.Array:
    """`divergence` of some queries, over the keys that each sees, bool [B, T, S]."""
    if seeking.top_k < seen_BTS.shape[-1]:
        seen_BTS = only_chosen(seen_BTS, chosen_keys(seeking, index_BSI, seen_BTS))
    B, T, N, K = q_BTNK.shape
    q = q_BTNK.reshape(B, T, k_BSGK.shape[2], -1, K)
    s = product("BTGJK,BSGK->BTGJS", q, k_BSGK) * scale
    p_BTS = jnp.exp(_log_softmax(s, seen_BTS[:, :, None, None])).sum((2, 3)) / N
    log_q_BTS = _log_softmax(index_scores(seeking, index_BSI), seen_BTS)
    differs = jnp.log(jnp.where(p_BTS > 0, p_BTS, 1)) - jnp.where(p_BTS > 0, log_q_BTS, 0)
    return (p_BTS * differs).sum(-1)


def _log_softmax(score, seen) -> jax.Array:
    """Over the keys that are seen, minus infinity at the others; of a query that sees none, everywhere."""
    some = seen.any(-1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(some, jnp.where(seen, score, -jnp.inf), 0), axis=-1, keepdims=True)
    return jnp.where(seen, score - total, -jnp.inf)
