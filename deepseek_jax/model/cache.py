"""The decoding cache: what attention keeps of a token in each layer, `cache_width` numbers.

Suffixes: L layers, D MTP modules, B rows, S slots, X cache width.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.layout import BATCH


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What decoding keeps. A token's slot is its index in its row; a slot is used when its segment is not 0.

    ``latent``: [L, B, S, X]: MLA's normalised latent, then the rotated key, shared by all heads (V2 §2.1.2; 576 numbers
    for V3); or GQA's rotated keys, then values, of all key heads. ``mtp_latent``: [D, B, S, X], the same for the MTP
    modules. ``position``, ``segment``: int32 [B, S].
    ``mtp_segment``: int32 [D, B, S], 0 where a module had no next token. ``length``: int32 [B], tokens held.
    ``capacity``: S. ``max_rewind``: tokens of each row that `rewind` may take back.
    """

    latent: jax.Array
    mtp_latent: jax.Array
    position: jax.Array
    segment: jax.Array
    mtp_segment: jax.Array
    length: jax.Array
    max_rewind: int = field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.latent.shape[2]

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
        length = jnp.maximum(self.length - n_B, 0)
        kept = jnp.arange(self.capacity)[None, :] < length[:, None]
        return replace(
            self,
            length=length,
            segment=jnp.where(kept, self.segment, 0),
            mtp_segment=jnp.where(kept[None], self.mtp_segment, 0),
        )


def init_cache(cfg: ModelConfig, batch: int, length: int, rewind: int, dtype, ctx: Context = DEFAULT) -> Cache:
    """An empty cache of ``length`` tokens a row; on a mesh each device holds its rows."""
    if batch < 1 or length < 1 or not 0 <= rewind < length:
        raise ValueError(
            f"init_cache(batch={batch}, length={length}, rewind={rewind}): batch and length must be positive "
            "and rewind must lie in [0, length)."
        )
    width, zeros = cfg.attention.cache_width, ctx.ops.zeros
    return Cache(
        latent=zeros((cfg.n_layers, batch, length, width), dtype, (None, BATCH, None, None)),
        mtp_latent=zeros((cfg.mtp_depth, batch, length, width), dtype, (None, BATCH, None, None)),
        position=zeros((batch, length), jnp.int32, (BATCH, None)),
        segment=zeros((batch, length), jnp.int32, (BATCH, None)),
        mtp_segment=zeros((cfg.mtp_depth, batch, length), jnp.int32, (None, BATCH, None)),
        length=zeros((batch,), jnp.int32, (BATCH,)),
        max_rewind=rewind,
    )


def write_slots(held_BS: jax.Array, new_BT: jax.Array, slot_BT: jax.Array) -> jax.Array:
    """Enters a value a token at its slot; slots beyond the capacity are dropped."""
    rows = jnp.arange(held_BS.shape[0])[:, None]
    return held_BS.at[rows, slot_BT].set(new_BT.astype(held_BS.dtype), mode="drop")
