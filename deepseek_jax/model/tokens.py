"""What a layer may know of its tokens: where they stand, what they see, and how they are rotated.

Suffixes: B batch, T tokens, S keys, F rotary frequencies.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from deepseek_jax.configs.attention import Rope
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.rope import apply_rope, rope_tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """The new tokens of a call, and all tokens whose keys there are: each sees those of its own segment at its own or
    an earlier position.

    ``id``, ``position``, ``segment``: int32 [B, T] of the new tokens. Segment 0 is padding, whose id is 0. An MTP
    module's ids are those of its own tokens, the next ones, -1 where unknown; None where only attention asks.
    ``key_position``, ``key_segment``: int32 [B, S]. ``tables``: for each of ``ropes``, a rotation and the dimensions it
    is of, float32 cosines and sines [B or 1, T, F]. ``slot``: int32 [B, T], where they go in the cache (S for padding,
    which is dropped), None without a cache. ``causal``: they stand in the order of their positions, so that later ones
    can be skipped. ``uniform``: besides, they are all the keys and share one segment.
    """

    id: jax.Array | None
    position: jax.Array
    segment: jax.Array
    key_position: jax.Array
    key_segment: jax.Array
    tables: tuple[tuple[jax.Array, jax.Array], ...]
    slot: jax.Array | None
    ropes: tuple[tuple[int, Rope], ...] = field(metadata={"static": True})
    causal: bool = field(metadata={"static": True})
    uniform: bool = field(metadata={"static": True})

    def rotated(self, x: jax.Array, dim: int, rope: Rope, interleaved: bool | None = None) -> jax.Array:
        """x [B, T, dim] or [B, T, heads, dim] at the tokens' positions. Its rotation must be one of ``ropes``.
        ``interleaved``: which dimensions make a pair, if not as ``rope`` says."""
        cos, sin = self.tables[self.ropes.index((dim, rope))]
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
    of the first. ``id_BT``: None where the tokens meet no router that asks for it."""
    ropes = tuple(dict.fromkeys((layer.attention.rope_dim, layer.attention.rope) for layer in cfg.layers))
    rotated = position_BT[:1] if alike else position_BT
    return Tokens(
        id=id_BT,
        position=position_BT,
        segment=segment_BT,
        key_position=position_BT,
        key_segment=segment_BT,
        tables=tuple(rope_tables(rotated, dim, rope) for dim, rope in ropes),
        slot=slot_BT,
        ropes=ropes,
        causal=causal,
        uniform=uniform,
    )
