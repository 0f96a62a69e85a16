"""V4's attention (2606.19348 §2.3): a window of recent tokens, and entries that each stand for several earlier ones.

All heads share one key, which is the value as well. A layer without entries is sliding-window attention; with entries
that an indexer chooses, compressed sparse attention (CSA); with entries that all are seen, heavily compressed attention
(HCA). Tokens and entries share one softmax, in which a learned logit of each head stands for seeing nothing. Keys are
rotated at their position, so that values are as well: the output is rotated back at the query's.

Suffixes: B batch, T queries, L tokens in a line, E entries, C chosen entries, D width, Q query rank, N heads in G
groups of J, K head dimension, R rank of the output.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.configs import schema
from deepseek_jax.core import cached
from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.core.norm import RMSNorm
from deepseek_jax.core.params import param
from deepseek_jax.core.product import product
from deepseek_jax.core.quant import FP4_BLOCK
from deepseek_jax.core.rope import apply_rope, rope_tables
from deepseek_jax.core.served import Form, Served
from deepseek_jax.model import ring
from deepseek_jax.model.attention import KEPT_PROBABILITIES, in_blocks
from deepseek_jax.model.compressor import Compressor
from deepseek_jax.model.indexer import EntryIndexer, Seeking, chosen_keys, divergence_of, only_chosen
from deepseek_jax.model.linear import linear
from deepseek_jax.model.tokens import Tokens

# Values of a key or an entry that share a scale where they are kept in FP8.
KEY_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """What a cache keeps of a stack's layers. ``recent``: [layers, B, S, K], keys of the last tokens, a `ring`.
    ``parts``: what of the last ones goes into entries that are to come, a ring. ``entries``: [layers, B, E, K], by the
    number of their window; ``index``: the indexer's. None where a layer has none."""

    recent: jax.Array | Served
    parts: jax.Array | None
    entries: jax.Array | Served | None
    index: jax.Array | Served | None


@dataclass(frozen=True)
class Keys:
    """What the queries of a call see. ``recent``: [B, L, K], ``position`` and ``segment``: int32 [B, L]. ``entries``:
    [B, E, K], ``chosen``: those of int32 [B, T, C], [B, T, C, K], brought from where they lie; ``number`` and
    ``entry_segment``: int32 [B, E]; ``index``: the indexer's keys; None without entries."""

    recent: jax.Array
    position: jax.Array
    segment: jax.Array
    entries: jax.Array | None = None
    chosen: Callable[[jax.Array], jax.Array] | None = None
    number: jax.Array | None = None
    entry_segment: jax.Array | None = None
    index: jax.Array | None = None


class Compressed(nnx.Module):
    """Pure: (x, tokens, held) -> (y, held, report). Leaves follow the published matrices."""

    def __init__(self, cfg: schema.Compressed, dim: int, dtype, eps: float):
        self.cfg, self.eps = cfg, eps
        D, N, K, Q, G, R = dim, cfg.n_heads, cfg.head_dim, cfg.q_rank, cfg.o_groups, cfg.o_rank
        self.q_a = param(dtype, (D, Q), ("embed", "q_rank"), inputs=1)
        self.q_norm = RMSNorm(dtype, Q, "q_rank", eps)
        self.q_b = param(dtype, (Q, N, K), ("q_rank", "heads", "head_dim"), inputs=1)
        self.kv = param(dtype, (D, K), ("embed", "kv_rank"), inputs=1)
        self.kv_norm = RMSNorm(dtype, K, "kv_rank", eps)
        self.sink = param(jnp.float32, (N,), ("heads",), inputs=0, decay=False)
        self.o_a = param(dtype, (N // G, K, G, R), (None, "head_dim", "heads", "kv_rank"), inputs=2)
        self.o_b = param(dtype, (G, R, D), ("heads", None, "embed"), inputs=2)
        self.compressor = Compressor(K, cfg.ratio, cfg.sparse, D, dtype, eps) if cfg.ratio else None
        self.indexer = EntryIndexer(cfg, D, dtype, eps) if cfg.sparse else None

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        ctx: Context,
        held: Held | None = None,
        i: jax.Array | int = 0,
        report: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Held | None, dict[str, jax.Array]]:
        """``held``: what `held` made, of which the rows of layer ``i`` are written. ``report``: what to return besides
        y and that; "index_kl", float32 [B, T], is `indexer.divergence_of`, over entries."""
        cfg = self.cfg
        q_BTQ = self.q_norm(linear("BTD,DQ->BTQ", x_BTD, self.q_a, ctx))
        q_BTNK = self._rotated(_normalised(linear("BTQ,QNK->BTNK", q_BTQ, self.q_b, ctx), self.eps), tokens)
        kv_BTK = self._rotated(self.kv_norm(linear("BTD,DK->BTK", x_BTD, self.kv, ctx)), tokens)
        parts, seeking = None, None
        if self.compressor is not None:
            parts = self.compressor.parts(x_BTD, ctx)
        if self.indexer is not None:
            seeking, of_index = self.indexer(x_BTD, q_BTQ, ctx)
            seeking = replace(seeking, q_BTHI=self._rotated(seeking.q_BTHI, tokens))
            parts = jnp.concatenate([parts, of_index], axis=-1)
        keys, held = self._keys(kv_BTK, parts, tokens, held, i)
        if seeking is not None and held is not None and isinstance(held.index, Served):
            seeking = seeking.turned()

        o_BTNK = checkpoint_name(self._attend(q_BTNK, seeking, keys, tokens, held is not None), "core")
        o_BTNK = self._rotated(o_BTNK, tokens, back=True)
        o_BTGJK = o_BTNK.reshape(*o_BTNK.shape[:2], cfg.o_groups, -1, cfg.head_dim)
        o_BTGR = linear("BTGJK,JKGR->BTGR", o_BTGJK, self.o_a, ctx)
        y_BTD = linear("BTGR,GRD->BTD", o_BTGR, self.o_b, ctx)
        if seeking is None or "index_kl" not in report:
            return y_BTD, held, {}
        return y_BTD, held, {"index_kl": self._divergence(q_BTNK, seeking, keys, tokens)}

    def held(self, layers: int, batch: int, length: int, rewind: int, dtype, ctx: Context) -> Held:
        """For a cache of ``length`` tokens a row, of which ``rewind`` may be taken back."""
        cfg, m = self.cfg, self.cfg.ratio

        def empty(size: int, width: int, form: Form | None = None):
            zeros = lambda shape, dtype: ctx.ops.zeros(shape, dtype, (None, BATCH, None, None))  # noqa: E731
            return cached.empty(form, (layers, batch, size, width), dtype, zeros)

        of_keys = of_index = None
        if ctx.cache == "served":
            of_keys = Form(cfg.head_dim - cfg.rope_dim, KEY_BLOCK, powers_of_two=True)

        parts = entries = index = None
        if self.compressor is not None:
            c = self.compressor
            width, made = c.width, -(-length // m)
            entries = empty(made, cfg.head_dim, of_keys)
            if self.indexer is not None:
                width += self.indexer.compressor.width
                size = cfg.indexer.index_dim
                if ctx.cache == "served":
                    of_index = Form(size, FP4_BLOCK[-1], bits=4, powers_of_two=True, turned=True)
                index = empty(made, size, of_index)
            parts = empty(c.span - 1 + rewind, width)
        return Held(empty(max(cfg.window - 1 + rewind, 1), cfg.head_dim, of_keys), parts, entries, index)

    def _rotated(self, x: jax.Array, tokens: Tokens, back: bool = False) -> jax.Array:
        """x [B, T, ..., K] of which the last dimensions are rotated at the tokens' positions, or back."""
        rest, rotated = jnp.split(x, [x.shape[-1] - self.cfg.rope_dim], axis=-1)
        return jnp.concatenate([rest, tokens.rotated(rotated, self.cfg.rope_dim, self.cfg.rope, back=back)], axis=-1)

    def _keys(self, kv_BTK, parts_BTP, tokens: Tokens, held: Held | None, i) -> tuple[Keys, Held | None]:
        """All that there is to see, and what is held with the new tokens and their entries."""
        if held is None:
            recent, position, segment = kv_BTK, tokens.position, tokens.segment
        else:
            position, segment = ring.marks(held.recent.shape[2], tokens)
            recent, ring_of_keys = ring.entered(held.recent, i, kv_BTK, tokens)
            held = replace(held, recent=ring_of_keys)
        keys = Keys(recent, position, segment)
        if parts_BTP is None:
            return keys, held
        made = tokens.windows[tokens.ratios.index(self.cfg.ratio)]
        last_BE, parts = None if tokens.uniform else made.last, parts_BTP
        if held is not None:
            parts, ring_of_parts = ring.entered(held.parts, i, parts_BTP, tokens)
            last_BE = held.parts.shape[2] + jnp.take_along_axis(ring.order(tokens), made.last, axis=1)
        width = self.compressor.width
        number_BE = made.number
        if tokens.uniform:
            number_BE = jnp.broadcast_to(jnp.arange(number_BE.shape[1]), number_BE.shape)
        entries = self._entries(self.compressor, parts[..., :width], last_BE, number_BE)
        index = None
        if self.indexer is not None:
            index = self._entries(self.indexer.compressor, parts[..., width:], last_BE, number_BE)
        if held is None:
            entry_segment = jnp.ones_like(number_BE) if tokens.uniform else made.segment
            chosen = lambda index_BTC: jax.vmap(lambda a, index: a[index])(entries, index_BTC)  # noqa: E731
            return Keys(recent, position, segment, entries, chosen, number_BE, entry_segment, index), None

        rows, E = jnp.arange(kv_BTK.shape[0])[:, None], held.entries.shape[2]
        slot_BE = jnp.where(made.segment != 0, number_BE, E)
        write = lambda h, new: cached.put(h, i, rows, slot_BE, cached.kept(new, h))  # noqa: E731
        entries = write(held.entries, entries)
        index = None if index is None else write(held.index, index)
        held = replace(held, parts=ring_of_parts, entries=entries, index=index)
        number_BE = jnp.broadcast_to(jnp.arange(E), (kv_BTK.shape[0], E))
        # Of one segment: entries that are not made yet have numbers that no query sees.
        # Not cut out of the stack first: of many entries few are chosen.
        read = partial(cached.taken, dtype=kv_BTK.dtype, i=i)
        chosen = lambda index_BTC: cached.taken(entries, kv_BTK.dtype, i, rows[..., None], index_BTC)  # noqa: E731
        one, of_index = jnp.ones_like(number_BE), None if index is None else read(index)
        return Keys(recent, position, segment, read(entries), chosen, number_BE, one, of_index), held

    def _entries(self, compressor: Compressor, parts, last_BE, number_BE) -> jax.Array:
        """Rotated at the position of their windows' first tokens."""
        entry_BEK, cfg = compressor.entries(parts, last_BE, number_BE), self.cfg
        rest, rotated = jnp.split(entry_BEK, [entry_BEK.shape[-1] - cfg.rope_dim], axis=-1)
        cos, sin = rope_tables(number_BE * cfg.ratio, cfg.rope_dim, cfg.rope)
        return jnp.concatenate([rest, apply_rope(rotated, cos, sin, cfg.rope.interleaved)], axis=-1)

    def _attend(self, q_BTNK, seeking: Seeking | None, keys: Keys, tokens: Tokens, cached: bool) -> jax.Array:
        """[B, T, N, K], some queries at a time."""
        T, W, sink_N, scale = q_BTNK.shape[1], self.cfg.window, self.sink.get_value(), self.cfg.head_dim**-0.5
        E = 0 if keys.entries is None else keys.entries.shape[1]
        sparse = seeking is not None and seeking.top_k < E
        few = sparse and T * seeking.top_k <= E
        mix = partial(_mixed, scale=scale)
        if T * (min(T, W) + E) > KEPT_PROBABILITIES:
            mix = jax.checkpoint(mix)
        # Without a cache a query's window ends where it stands itself: of the line only that much is looked at.
        lead = 0 if cached else min(W, T) - 1
        pad = lambda a: jnp.pad(a, ((0, 0), (lead, 0), *((0, 0),) * (a.ndim - 2)))  # noqa: E731
        line = tuple(map(pad, (keys.recent, keys.position, keys.segment)))

        def piece(start, count: int, stop: int):
            rows = lambda a: jax.lax.dynamic_slice_in_dim(a, start, count, axis=1)  # noqa: E731
            q, position_BT1, segment_BT1 = (
                rows(q_BTNK),
                rows(tokens.position)[..., None],
                rows(tokens.segment)[..., None],
            )
            recent, position_BL, segment_BL = line
            if not cached:
                recent, position_BL, segment_BL = (
                    jax.lax.dynamic_slice_in_dim(a, start, count + lead, axis=1) for a in line
                )
            ago_BTL = position_BT1 - position_BL[:, None]
            seen_BTL = (segment_BL[:, None] == segment_BT1) & (segment_BT1 != 0) & (ago_BTL >= 0) & (ago_BTL < W)
            if not E:
                return mix(q, sink_N, recent, seen_BTL)
            some = slice(None) if cached else slice(0, max(stop // self.cfg.ratio, 1))
            entries, seen_BTE = keys.entries[:, some], self._seen(position_BT1, segment_BT1, keys, some)
            if not sparse or seeking.top_k >= entries.shape[1]:
                return mix(q, sink_N, recent, seen_BTL, entries, seen_BTE)
            chosen_BTC = chosen_keys(jax.tree.map(rows, seeking), keys.index[:, some], seen_BTE)
            if not few:
                return mix(q, sink_N, recent, seen_BTL, entries, only_chosen(seen_BTE, chosen_BTC))
            seen_BTC = jnp.take_along_axis(seen_BTE, chosen_BTC, axis=-1)
            return mix(q, sink_N, recent, seen_BTL, keys.chosen(chosen_BTC), seen_BTC)

        return in_blocks(piece, T, axis=1)

    def _seen(self, position_BT1, segment_BT1, keys: Keys, some: slice) -> jax.Array:
        """bool [B, T, E]: the entries of windows that lie before a query's own, or that it completes."""
        number_B1E, segment_B1E = keys.number[:, None, some], keys.entry_segment[:, None, some]
        return (segment_B1E == segment_BT1) & (segment_BT1 != 0) & (number_B1E < (position_BT1 + 1) // self.cfg.ratio)

    def _divergence(self, q_BTNK, seeking: Seeking, keys: Keys, tokens: Tokens) -> jax.Array:
        """float32 [B, T]: how far the indexer is from attention, of which the part that goes to entries counts."""
        q_BTNK, entries = jax.lax.stop_gradient((q_BTNK, keys.entries[:, :, None]))
        compute = jax.checkpoint(partial(divergence_of, scale=self.cfg.head_dim**-0.5))

        def piece(start, count: int, stop: int):
            rows = lambda a: jax.lax.dynamic_slice_in_dim(a, start, count, axis=1)  # noqa: E731
            of = rows(tokens.position)[..., None], rows(tokens.segment)[..., None]
            seen_BTE = self._seen(*of, keys, slice(None))
            return compute(rows(q_BTNK), jax.tree.map(rows, seeking), entries, keys.index, seen_BTE)

        return in_blocks(piece, q_BTNK.shape[1], axis=1)


def _normalised(x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _mixed(q_BTNK, sink_N, recent_BLK, seen_BTL, entries=None, seen_BTE=None, *, scale: float) -> jax.Array:
    """[B, T, N, K]: one softmax, in float32, over recent tokens and entries, [B, E, K] for all queries or [B, T, E, K],
    and the sink, which takes its part and gives nothing; of a query that sees nothing, zero."""
    of_entries = None if entries is None else "BEK" if entries.ndim == 3 else "BTEK"
    s_BTNL = jnp.where(seen_BTL[:, :, None], product("BTNK,BLK->BTNL", q_BTNK, recent_BLK) * scale, -jnp.inf)
    top_BTN1 = jnp.maximum(s_BTNL.max(-1, keepdims=True), sink_N[:, None])
    if of_entries:
        s_BTNE = product(f"BTNK,{of_entries}->BTNE", q_BTNK, entries) * scale
        s_BTNE = jnp.where(seen_BTE[:, :, None], s_BTNE, -jnp.inf)
        top_BTN1 = jnp.maximum(top_BTN1, s_BTNE.max(-1, keepdims=True))
    top_BTN1 = jax.lax.stop_gradient(top_BTN1)
    p_BTNL = jnp.exp(s_BTNL - top_BTN1)
    total_BTN1 = p_BTNL.sum(-1, keepdims=True) + jnp.exp(sink_N[:, None] - top_BTN1)
    o_BTNK = product("BTNL,BLK->BTNK", p_BTNL.astype(recent_BLK.dtype), recent_BLK)
    if of_entries:
        p_BTNE = jnp.exp(s_BTNE - top_BTN1)
        total_BTN1 += p_BTNE.sum(-1, keepdims=True)
        o_BTNK += product(f"BTNE,{of_entries}->BTNK", p_BTNE.astype(entries.dtype), entries)
    return (o_BTNK / total_BTN1).astype(recent_BLK.dtype)
