"""What a layer may know of its tokens: where they stand, what they see, and how they are rotated.

Suffixes: B batch, T tokens, S keys, F rotary frequencies, E entries of compressed attention.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from deepseek_jax.configs.attention import Rope
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.rope import apply_rope, rope_tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windows:
    """The windows of one ratio that the new tokens of a call complete, in each of which compressed attention makes an
    entry.

    ``last``: int32 [B, E], which of the new tokens ends the window. ``number``: int32 [B, E], which window it is of its
    segment. ``segment``: int32 [B, E], 0 where there is no window.
    """

    last: jax.Array
    number: jax.Array
    segment: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """The new tokens of a call, and all tokens whose keys there are: each sees those of its own segment at its own or
    an earlier position.

    ``id``, ``position``, ``segment``: int32 [B, T] of the new tokens. Segment 0 is padding, whose id is 0. An MTP
    module's ids are those of its own tokens, the next ones, -1 where unknown; None where only attention asks.
    ``key_position``, ``key_segment``: int32 [B, S]. ``tables``: for each of ``ropes``, a rotation and the dimensions it
    is of, float32 cosines and sines [B or 1, T, F]. ``windows``: for each of ``ratios``. ``slot``: int32 [B, T], where
    they go in the cache (S for padding, which is dropped), None without a cache; ``length``: int32 [B], the tokens that
    it held before. ``causal``: they stand in the order of their positions, so that later ones can be skipped.
    ``uniform``: besides, they are all the keys and share one segment.
    """

    id: jax.Array | None
    position: jax.Array
    segment: jax.Array
    key_position: jax.Array
    key_segment: jax.Array
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    windows: tuple[Windows, ...]
    slot: jax.Array | None
    length: jax.Array | None
    ropes: tuple[tuple[int, Rope], ...] = field(metadata={"static": True})
    ratios: tuple[int, ...] = field(metadata={"static": True})
    causal: bool = field(metadata={"static": True})
    uniform: bool = field(metadata={"static": True})

    def rotated(
        self, x: jax.Array, dim: int, rope: Rope, interleaved: bool | None = None, back: bool = False
    ) -> jax.Array:
        """x [B, T, dim] or [B, T, heads, dim] at the tokens' positions. Its rotation must be one of ``ropes``.
        ``interleaved``: which dimensions make a pair, if not as ``rope`` says. ``back``: the other way round."""
        cos, sin = self.tables[self.ropes.index((dim, rope))]
        sin = -sin if back else sin
        if x.ndim == 4:
            cos, sin = cos[:, :, None], sin[:, :, None]
        return apply_rope(x, cos, sin, rope.interleaved if interleaved is None else interleaved)

    def visible(self, start: int | jax.Array, size: int, keys: int, first_key: int | jax.Array = 0) -> jax.Array:
        """bool [B or 1, size, keys] for ``size`` queries from ``start`` on and ``keys`` keys from ``first_key`` on."""
        if self.uniform:
            return (first_key + jnp.arange(keys)[None, :] <= start + jnp.arange(size)[:, None])[None]
        rows = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in (self.position, self.segment))
        position, segment = (a[..., None] for a in rows)
        columns = (
            jax.lax.dynamic_slice_in_dim(a, first_key, keys, axis=1) for a in (self.key_position, self.key_segment)
        )
        key_position, key_segment = (a[:, None] for a in columns)
        return (key_segment == segment) & (segment != 0) & (key_position <= position)


def make_tokens(
    cfg: ModelConfig,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    slot_BT: jax.Array | None = None,
    *,
    id_BT: jax.Array | None = None,
    causal: bool = False,
    alike: bool = False,
    uniform: bool = False,
) -> Tokens:
    """Tokens that see one another; `Cache.entered` lets them see earlier ones. ``alike``: all rows have the positions
    of the first. ``id_BT``: None where the tokens meet no router that asks for it.

    Of a model that compresses, positions count the tokens of each segment, which stand in one run.
    """
    layers = (*cfg.layers, cfg.mtp_layer) if cfg.mtp_depth else cfg.layers
    ropes = tuple(dict.fromkeys((layer.attention.rope_dim, layer.attention.rope) for layer in layers))
    ratios = tuple(sorted({getattr(layer.attention, "ratio", 0) for layer in layers} - {0}))
    rotated = position_BT[:1] if alike else position_BT
    return Tokens(
        id=id_BT,
        position=position_BT,
        segment=segment_BT,
        key_position=position_BT,
        key_segment=segment_BT,
        tables=tuple(rope_tables(rotated, dim, rope) for dim, rope in ropes),
        windows=tuple(_windows(position_BT, segment_BT, ratio) for ratio in ratios),
        slot=slot_BT,
        length=None,
        ropes=ropes,
        ratios=ratios,
        causal=causal,
        uniform=uniform,
    )


def _windows(position_BT: jax.Array, segment_BT: jax.Array, ratio: int) -> Windows:
    """Those whose last token is there, in order, and room for as many as T tokens can complete."""
    ends_BT = ((position_BT + 1) % ratio == 0) & (segment_BT != 0)
    last_BE = jnp.argsort(~ends_BT, axis=1, stable=True)[:, : -(-position_BT.shape[1] // ratio)].astype(jnp.int32)
    ends_BE, position_BE, segment_BE = (
        jnp.take_along_axis(a, last_BE, axis=1) for a in (ends_BT, position_BT, segment_BT)
    )
    return Windows(last_BE, position_BE // ratio, jnp.where(ends_BE, segment_BE, 0))


def place_in_segment(segment_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: how many tokens of its segment, which stands in one run, come before each."""
    place = jnp.arange(segment_BT.shape[1])
    starts = jnp.pad(segment_BT[:, 1:] != segment_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
