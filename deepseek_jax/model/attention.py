"""Softmax attention in plain XLA, in blocks of queries, and the description of who sees whom.

Suffixes: B batch, T queries, S keys, N heads, G key heads, J query heads a key head, K key dim, V value dim,
F rotary frequencies.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from deepseek_jax.core.linear import product

# At most this many query blocks are unrolled; each attends to the keys up to its own end only.
UNROLLED_BLOCKS = 16
MIN_BLOCK = 64
# Longer blocks run piece by piece, so that the scores in memory are at most this many queries by all keys.
MAX_PIECE = 512
# A block's probabilities are kept for the backward pass while all blocks together stay below this many
# numbers a head and row; beyond it they are computed again, so that memory does not grow with T x S.
KEPT_PROBABILITIES = 1024 * 1024


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Span:
    """Which keys each query sees: those of its own segment at its own or an earlier position.

    ``position``, ``segment``: int32 [B, T] of the new tokens; segment 0 is padding. ``key_position``,
    ``key_segment``: int32 [B, S] of all keys. ``cos``, ``sin``: float32 [B, T, F]. ``slot``: int32 [B, T],
    where new tokens go in the cache (S for padding, which is dropped), None without a cache. ``causal``: keys
    are the queries themselves in increasing order, so that later blocks can be skipped. ``uniform``: besides,
    all tokens share one segment.
    """

    position: jax.Array
    segment: jax.Array
    key_position: jax.Array
    key_segment: jax.Array
    cos: jax.Array
    sin: jax.Array
    slot: jax.Array | None
    causal: bool = field(metadata={"static": True})
    uniform: bool = field(metadata={"static": True})

    def visible(self, start: int | jax.Array, size: int, keys: int) -> jax.Array:
        """bool [B or 1, size, keys] for ``size`` queries from ``start`` on and the first ``keys`` keys."""
        if self.uniform:
            return (jnp.arange(keys)[None, :] <= start + jnp.arange(size)[:, None])[None]
        rows = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in (self.position, self.segment))
        position, segment = (a[..., None] for a in rows)
        same = (self.key_segment[:, None, :keys] == segment) & (segment != 0)
        return same & (self.key_position[:, None, :keys] <= position)


def attend_block(q_BGJTK, k_BGSK, v_BGSV, visible_BTS, scale: float) -> jax.Array:
    """One block of queries; softmax in float32; queries that see nothing return zero."""
    s_BGJTS = product("BGJTK,BGSK->BGJTS", q_BGJTK, k_BGSK)
    s_BGJTS = jnp.where(visible_BTS[:, None, None], s_BGJTS * scale, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s_BGJTS, axis=-1, keepdims=True))
    p_BGJTS = jnp.exp(s_BGJTS - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(p_BGJTS, axis=-1, keepdims=True)
    # The sum divides the output, which is narrower than the probabilities: a pass less over T x S, both ways.
    o_BGJTV = product("BGJTS,BGSV->BGJTV", p_BGJTS.astype(v_BGSV.dtype), v_BGSV)
    return (o_BGJTV / jnp.where(total > 0, total, 1.0)).astype(v_BGSV.dtype)


def attend(q_BTNK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, span: Span, scale: float) -> jax.Array:
    """Causal attention, [B, T, N, V]; N query heads share G key heads. Memory grows with T + S, not T x S."""
    T, S, G = q_BTNK.shape[1], *k_BSGK.shape[1:3]
    q = rearrange(q_BTNK, "B T (G J) K -> B G J T K", G=G)
    k, v = (rearrange(a, "B S G X -> B G S X") for a in (k_BSGK, v_BSGV))
    size = max(MIN_BLOCK, -(-T // UNROLLED_BLOCKS))
    block = partial(attend_block, scale=scale)
    if T * S > KEPT_PROBABILITIES:
        block = jax.checkpoint(block)

    def piece(start, count: int, keys: int):
        rows = jax.lax.dynamic_slice_in_dim(q, start, count, axis=3)
        return block(rows, k[:, :, :keys], v[:, :, :keys], span.visible(start, count, keys))

    outputs = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        keys = stop if span.causal else S
        pieces = (stop - start) // MAX_PIECE if stop - start > MAX_PIECE else 0
        if pieces:
            starts = start + MAX_PIECE * jnp.arange(pieces)
            many = jax.lax.map(lambda first, keys=keys: piece(first, MAX_PIECE, keys), starts)
            outputs.append(rearrange(many, "n B G J T V -> B G J (n T) V"))
        if (rest := stop - start - pieces * MAX_PIECE) > 0:
            outputs.append(piece(stop - rest, rest, keys))
    o = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return rearrange(o, "B G J T V -> B T (G J) V")
