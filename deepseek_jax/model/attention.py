"""Softmax attention, in plain XLA in blocks of queries or by a kernel.

Suffixes: B batch, T queries, S keys, N heads, G key heads, J query heads a key head, K key dim, V value dim.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.ops import ONE_DEVICE
from deepseek_jax.core.product import product
from deepseek_jax.kernels import cudnn, hopper_decode
from deepseek_jax.kernels.attention import LANES, causal_attention
from deepseek_jax.kernels.native import attention as native
from deepseek_jax.kernels.platform import on_platform
from deepseek_jax.model.indexer import Seeking, chosen_keys, only_chosen
from deepseek_jax.model.tokens import Tokens

# At most this many query blocks are unrolled; each attends to the keys up to its own end only.
UNROLLED_BLOCKS = 16
MIN_BLOCK = 64
# Longer blocks run piece by piece, so that the scores in memory are at most this many queries by all keys.
MAX_PIECE = 512
# A block's probabilities are kept for the backward pass while all blocks together stay below this many
# numbers a head and row; beyond it they are computed again, so that memory does not grow with T x S.
KEPT_PROBABILITIES = 1024 * 1024
# With a cache, blocks of MIN_BLOCK queries or more read the keys in tiles, up to the last slot they can see.
KEY_TILE = 128


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


def attend_tiles(q_BGJTK, k_BGSK, v_BGSV, tokens: Tokens, start: int | jax.Array, scale: float) -> jax.Array:
    """`attend_block` for queries from ``start`` on over a cache, with a running softmax over tiles of keys.

    The number of tiles follows from the slots that the queries fill, so that neither later tokens of the same
    prompt nor the cache's empty slots cost anything. Has no gradient: a loop of unknown length keeps no residuals.
    """
    S, T = k_BGSK.shape[2], q_BGJTK.shape[3]
    slot_BT = jax.lax.dynamic_slice_in_dim(tokens.slot, start, T, axis=1) if tokens.causal else tokens.slot
    used = jnp.max(jnp.where(slot_BT < S, slot_BT + 1, 0))

    def add_tile(number, carry):
        o_BGJTV, top, total = carry
        # The last tile begins earlier when it would end behind the cache; what it repeats is masked.
        first = jnp.minimum(number * KEY_TILE, S - KEY_TILE)
        k, v = (jax.lax.dynamic_slice_in_dim(a, first, KEY_TILE, axis=2) for a in (k_BGSK, v_BGSV))
        fresh = first + jnp.arange(KEY_TILE) >= number * KEY_TILE
        visible_BTS = tokens.visible(start, T, KEY_TILE, first) & fresh
        s_BGJTS = product("BGJTK,BGSK->BGJTS", q_BGJTK, k)
        s_BGJTS = jnp.where(visible_BTS[:, None, None], s_BGJTS * scale, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(s_BGJTS, axis=-1, keepdims=True))
        finite = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        p_BGJTS, kept = jnp.exp(s_BGJTS - finite), jnp.exp(top - finite)
        o_BGJTV = o_BGJTV * kept + product("BGJTS,BGSV->BGJTV", p_BGJTS.astype(v.dtype), v)
        return o_BGJTV, new_top, total * kept + p_BGJTS.sum(-1, keepdims=True)

    rows = q_BGJTK.shape[:-1]
    empty = (jnp.zeros((*rows, v_BGSV.shape[-1])), jnp.full((*rows, 1), -jnp.inf), jnp.zeros((*rows, 1)))
    o_BGJTV, _, total = jax.lax.fori_loop(0, -(-used // KEY_TILE), add_tile, empty)
    return (o_BGJTV / jnp.where(total > 0, total, 1.0)).astype(v_BGSV.dtype)


def attend(
    q_BTNK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    tokens: Tokens,
    scale: float,
    ctx: Context = DEFAULT,
    seeking: Seeking | None = None,
    index_BSI: jax.Array | None = None,
) -> jax.Array:
    """Causal attention, [B, T, N, V]; N query heads share G key heads. Memory grows with T + S, not T x S.

    ``seeking``, ``index_BSI``: what an indexer asks with, and its keys: a query then sees those that it chooses only.

    ``ctx.attention`` names the form. "native" is for calls on one device without an indexer, with a cache and without;
    all others take the XLA form under it, as do calls with a cache under every other name. The kernel takes calls whose
    tokens are all of their rows, in order, a multiple of 128; the others take the XLA form under "auto". Raises
    ValueError where "kernel" is named for one of those others, or "hopper" for what `kernels.cudnn` does not take.
    Under "hopper" calls with segments or positions take the XLA form: JAX's function for cuDNN knows none. So do those
    of an MTP module, whose last tokens are unknown.
    """
    if ctx.attention == "native" and seeking is None and ctx.ops is ONE_DEVICE:
        return native.attention(q_BTNK, k_BSGK, v_BSGV, _places(tokens), scale).astype(v_BSGV.dtype)
    form = "xla" if tokens.slot is not None or ctx.attention == "native" else ctx.attention
    if form == "hopper" and not tokens.uniform and not ctx.ops.splits_rows:
        form = "xla"
    refusal = "" if form == "xla" else _refusal(q_BTNK, v_BSGV, tokens, ctx, seeking)
    if refusal and form != "auto":
        raise ValueError(f'Context(attention="{form}"): {refusal}; choose "auto" or "xla".')
    if form == "hopper":
        by_cudnn = lambda q, k, v, _: cudnn.causal_attention(q, k, v, scale)  # noqa: E731
        return ctx.ops.heads(by_cudnn, q_BTNK, k_BSGK, v_BSGV, None)
    if form != "xla" and not refusal:
        segment_BT = None if tokens.uniform else tokens.segment
        # Where activations are even sent to the host, memory is short.
        how = {"scale": scale, "fused": not ctx.remat.startswith("offload")}
        kernel = lambda interpret: partial(ctx.ops.heads, partial(causal_attention, **how, interpret=interpret))  # noqa: E731
        xla = None
        if form == "auto":
            xla = lambda q, k, v, _: attend_whole(q, k, v, tokens, scale)  # noqa: E731
        return on_platform(kernel, xla, ctx.platform)(q_BTNK, k_BSGK, v_BSGV, segment_BT)
    whole = lambda q, k, v, tokens: attend_whole(q[0], k[0], v, tokens, scale, q[1], k[1])  # noqa: E731
    return ctx.ops.attend(whole, (q_BTNK, seeking), (k_BSGK, index_BSI), v_BSGV, tokens)


def attend_cache(k_LBSK, layer, q_BTNK, k_BSGK, v_BSGV, tokens: Tokens, scale: float, ctx: Context, *_) -> jax.Array:
    """`attend` by a kernel over the whole cache's ``layer``, of which k_BSGK is a part and v_BSGV the first numbers:
    the native one, or that of `kernels.hopper_decode`, for one query a row."""
    if ctx.attention == "native":
        o = native.latent_attention(q_BTNK, k_LBSK, layer, v_BSGV.shape[-1], _places(tokens), scale)
        return o.astype(v_BSGV.dtype)
    visible_BS = tokens.visible(0, 1, k_BSGK.shape[1])[:, 0]
    o_BNV = hopper_decode.absorbed_attention(q_BTNK[:, 0], k_LBSK, layer, visible_BS, scale, v_BSGV.shape[-1])
    return o_BNV[:, None]


def _places(tokens: Tokens) -> tuple[jax.Array, ...]:
    return tokens.position, tokens.segment, tokens.key_position, tokens.key_segment


def _refusal(q_BTNK: jax.Array, v_BSGV: jax.Array, tokens: Tokens, ctx: Context, seeking: Seeking | None) -> str:
    """Why a call without a cache cannot run by the kernel, or by cuDNN; empty if it can."""
    if seeking is not None:
        return "it lets a query see all earlier tokens, and this model has an indexer that chooses them"
    if ctx.ops.splits_rows:
        return "it takes whole rows, and the mesh splits them over its axis 'context'"
    if not tokens.causal:
        return "it takes tokens in order, and this call gives positions"
    if ctx.attention == "hopper":
        return cudnn.refusal(q_BTNK, v_BSGV)
    if q_BTNK.shape[1] % LANES:
        return f"it takes rows of a multiple of {LANES} tokens, not {q_BTNK.shape[1]}"
    return ""


def attend_whole(
    q_BTNK,
    k_BSGK,
    v_BSGV,
    tokens: Tokens,
    scale: float,
    seeking: Seeking | None = None,
    index_BSI: jax.Array | None = None,
) -> jax.Array:
    T, S, G = q_BTNK.shape[1], *k_BSGK.shape[1:3]
    sparse = seeking is not None and seeking.top_k < S
    if sparse and G == 1 and T * seeking.top_k <= S:
        return attend_chosen(q_BTNK, k_BSGK[:, :, 0], v_BSGV[:, :, 0], tokens, scale, seeking, index_BSI)
    q = rearrange(q_BTNK, "B T (G J) K -> B G J T K", G=G)
    k, v = (rearrange(a, "B S G X -> B G S X") for a in (k_BSGK, v_BSGV))
    block = partial(attend_block, scale=scale)
    if T * S > KEPT_PROBABILITIES:
        block = jax.checkpoint(block)

    tiled = tokens.slot is not None and T >= MIN_BLOCK and S > KEY_TILE and not sparse

    def visible(start, count: int, keys: int):
        seen = tokens.visible(start, count, keys)
        if not sparse or keys <= seeking.top_k:
            return seen
        rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, count, axis=1), seeking)
        return only_chosen(seen, chosen_keys(rows, index_BSI[:, :keys], seen))

    def piece(start, count: int, keys: int):
        rows = jax.lax.dynamic_slice_in_dim(q, start, count, axis=3)
        if tiled:
            return attend_tiles(rows, k, v, tokens, start, scale)
        return block(rows, k[:, :, :keys], v[:, :, :keys], visible(start, count, keys))

    def keys_of(start, count: int, stop: int):
        return piece(start, count, stop if tokens.causal and tokens.slot is None else S)

    o = in_blocks(keys_of, T, axis=3)
    return checkpoint_name(rearrange(o, "B G J T V -> B T (G J) V"), "core")


def in_blocks(piece: Callable[[int | jax.Array, int, int], jax.Array], T: int, axis: int) -> jax.Array:
    """The results for T queries, some at a time, one after the other along ``axis``.

    ``piece(start, count, stop)``: of ``count`` queries from ``start`` on, which is traced in long blocks; ``stop`` is
    not, and no query of the piece stands at or after it.
    """
    size, outputs = max(MIN_BLOCK, -(-T // UNROLLED_BLOCKS)), []
    for start in range(0, T, size):
        stop = min(start + size, T)
        pieces = (stop - start) // MAX_PIECE if stop - start > MAX_PIECE else 0
        if pieces:
            starts = start + MAX_PIECE * jnp.arange(pieces)
            many = jnp.moveaxis(jax.lax.map(lambda first, stop=stop: piece(first, MAX_PIECE, stop), starts), 0, axis)
            outputs.append(many.reshape(*many.shape[:axis], -1, *many.shape[axis + 2 :]))
        if (rest := stop - start - pieces * MAX_PIECE) > 0:
            outputs.append(piece(stop - rest, rest, stop))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=axis)


def attend_chosen(q_BTNK, k_BSK, v_BSV, tokens: Tokens, scale: float, seeking: Seeking, index_BSI) -> jax.Array:
    """[B, T, N, V] of few queries: the keys that each chooses are brought to it, shared by its heads."""
    seen_BTS = jnp.broadcast_to(tokens.visible(0, q_BTNK.shape[1], k_BSK.shape[1]), (*q_BTNK.shape[:2], k_BSK.shape[1]))
    index_BTC = chosen_keys(seeking, index_BSI, seen_BTS)
    k_BTCK, v_BTCV = (jax.vmap(lambda a, i: a[i])(a, index_BTC) for a in (k_BSK, v_BSV))
    seen_BTC = jnp.take_along_axis(seen_BTS, index_BTC, axis=-1)
    s_BTNC = jnp.where(seen_BTC[:, :, None], product("BTNK,BTCK->BTNC", q_BTNK, k_BTCK) * scale, -jnp.inf)
    top = jnp.max(s_BTNC, axis=-1, keepdims=True)
    p_BTNC = jnp.exp(s_BTNC - jnp.where(jnp.isfinite(top), top, 0.0))
    total = p_BTNC.sum(-1, keepdims=True)
    o_BTNV = product("BTNC,BTCV->BTNV", p_BTNC.astype(v_BTCV.dtype), v_BTCV)
    return (o_BTNV / jnp.where(total > 0, total, 1.0)).astype(v_BSV.dtype)
