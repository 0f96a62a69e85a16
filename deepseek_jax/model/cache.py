"""The decoding cache: what attention keeps of rows of tokens, and which tokens these are.

Suffixes: B rows, T new tokens, S slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.configs.schema import Compressed, ModelConfig
from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.core.served import Served
from deepseek_jax.model.tokens import Tokens, make_tokens, place_in_segment


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding keeps. A token's slot is its index in its row; what stands at slots from ``length`` on is stale:
    nothing sees it, and later tokens overwrite it.

    ``held``: what the attention of each stack keeps (`MLA.held`, `GQA.held`, `Compressed.held`), leaves
    [layers, B, ...]. ``position``,
    ``segment``: int32 [B, S]. ``length``: int32 [B], tokens held. ``mtp``: a cache for each MTP module, whose rows are
    the tokens it has seen: those whose next one was known. ``place``: int32 [B, S], in a module's cache the slots of
    its tokens in the model's; None in the model's own. ``max_rewind``: tokens of each row that `rewind` may take back.
    """

    held: tuple[Any, ...]
    position: jax.Array
    segment: jax.Array
    length: jax.Array
    mtp: tuple["Cache", ...]
    place: jax.Array | None
    max_rewind: int = field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.position.shape[1]

    @property
    def is_served(self) -> bool:
        """Whether its keys are in FP8 and FP4."""
        found = jax.tree.leaves(self.held, is_leaf=lambda x: isinstance(x, Served))
        return any(isinstance(x, Served) for x in found)

    def rewind(self, n_B: jax.Array) -> "Cache":
        """Takes back the last ``n_B`` tokens of each row (int32 [B], 0 to ``max_rewind``).

        Raises ValueError when a concrete count exceeds ``max_rewind`` or the row's length. Counts traced
        under jit cannot be checked here: the caller holds them within the bound (a row never gets shorter than empty).
        """
        n_B = jnp.asarray(n_B, jnp.int32)
        if not isinstance(n_B, jax.core.Tracer) and not isinstance(self.length, jax.core.Tracer):
            if int(n_B.min()) < 0 or int(n_B.max()) > self.max_rewind:
                raise ValueError(
                    f"rewind by {n_B.tolist()}: this cache takes back 0 to {self.max_rewind} tokens of a "
                    "row; make it with init_cache(..., rewind=N)."
                )
            if bool((n_B > self.length).any()):
                raise ValueError(f"rewind by {n_B.tolist()} exceeds the lengths {self.length.tolist()}.")
        return self.up_to(jnp.maximum(self.length - n_B, 0))

    def up_to(self, slot_B: jax.Array) -> "Cache":
        """Without the tokens from ``slot_B`` of the model's rows on."""
        length = jnp.minimum(self.length, slot_B)
        if self.place is not None:
            used = jnp.arange(self.capacity) < self.length[:, None]
            length = (used & (self.place < slot_B[:, None])).sum(-1, dtype=jnp.int32)
        return replace(self, length=length, mtp=tuple(module.up_to(slot_B) for module in self.mtp))

    def entered(self, tokens: Tokens) -> tuple[Tokens, "Cache"]:
        """The tokens, of which padding is left out, at the ends of the rows, seeing what is held; and the cache with
        them. What attention holds of them, each layer enters itself, at ``slot``."""
        order = jnp.cumsum(tokens.segment != 0, axis=-1)
        slot = jnp.where(tokens.segment != 0, self.length[:, None] + order - 1, self.capacity)
        position, segment = (
            _write(held, new, slot) for held, new in ((self.position, tokens.position), (self.segment, tokens.segment))
        )
        length = self.length + order[:, -1]
        place = None if self.place is None else _write(self.place, tokens.slot, slot)
        cache = replace(self, position=position, segment=segment, length=length, place=place)
        seen = jnp.where(jnp.arange(self.capacity) < length[:, None], segment, 0)
        tokens = replace(tokens, slot=slot, length=self.length, key_position=position, key_segment=seen, uniform=False)
        return tokens, cache


def make_cache(
    held: Sequence[Any],
    batch: int,
    length: int,
    rewind: int,
    ctx: Context,
    mtp: tuple[Cache, ...] = (),
    of_module: bool = False,
) -> Cache:
    """An empty cache of ``length`` tokens a row; on a mesh each device holds its rows."""
    row = (BATCH, None)
    slots = [ctx.ops.zeros((batch, length), jnp.int32, row) for _ in range(3 if of_module else 2)]
    return Cache(
        held=tuple(held),
        position=slots[0],
        segment=slots[1],
        length=ctx.ops.zeros((batch,), jnp.int32, (BATCH,)),
        mtp=mtp,
        place=slots[2] if of_module else None,
        max_rewind=rewind,
    )


def seen_tokens(
    cfg: ModelConfig,
    id_BT: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    cache: Cache | None,
    ctx: Context,
) -> tuple[Tokens, Cache | None]:
    """Who sees whom in a call, and the cache with the new tokens' positions and segments entered."""
    B, T = id_BT.shape
    segment = jnp.ones((B, T), jnp.int32) if segments is None else segments.astype(jnp.int32)
    # Of windows the first begins where a segment does.
    counted = isinstance(cfg.attention, Compressed) and segments is not None
    position = positions
    if positions is None and cache is None:
        position = place_in_segment(segment) if counted else jnp.broadcast_to(jnp.arange(T), (B, T))
    elif positions is None:
        position = cache.length[:, None] + jnp.maximum(jnp.cumsum(segment != 0, axis=-1) - 1, 0)
    alike = positions is None and cache is None and not ctx.ops.splits_rows and not counted
    tokens = make_tokens(
        cfg,
        position,
        segment,
        id_BT=id_BT.astype(jnp.int32),
        causal=positions is None,
        alike=alike,
        uniform=alike and segments is None,
    )
    return (tokens, None) if cache is None else cache.entered(tokens)


def _write(held_BS: jax.Array, new_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
    """Enters a value a token at its slot; slots beyond the capacity are dropped."""
    rows = jnp.arange(held_BS.shape[0])[:, None]
    return held_BS.at[rows, slot_BT].set(new_BT.astype(held_BS.dtype), mode="drop")
