"""What decoding keeps of a row's last tokens: rings, in which a token's slot is its number modulo the ring's size.

Suffixes: B rows, T new tokens, S slots of a ring, L = S + T tokens in a line, X what is kept of a token.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.core.cached import kept, put, read, taken
from deepseek_jax.core.served import Served
from deepseek_jax.model.tokens import Tokens


def entered(ring: jax.Array | Served, i: jax.Array | int, new_BTX: jax.Array, tokens: Tokens):
    """Layer ``i``'s last S tokens, then the new ones, in order, [B, L, X]; and the ring [layers, B, S, X] with them.

    Padding is left out; the line then ends in zeros.
    """
    S, T = ring.shape[2], new_BTX.shape[1]
    rows = jnp.arange(new_BTX.shape[0])[:, None]
    slot_BS = _before(tokens, S) % S
    old_BSX, new = taken(ring, new_BTX.dtype, i, rows, slot_BS), kept(new_BTX, ring)
    new_BTX = read(new, ring, new_BTX.dtype)
    order_BT = order(tokens)
    line_BLX = jnp.concatenate([old_BSX, jnp.zeros_like(new_BTX)], axis=1)
    line_BLX = line_BLX.at[rows, S + order_BT].set(new_BTX, mode="drop")
    # Of more new tokens than there are slots the last ones stay.
    stays_BT = (order_BT < T) & (order_BT >= (tokens.segment != 0).sum(-1, keepdims=True) - S)
    slot_BT = jnp.where(stays_BT, tokens.slot % S, S)
    return line_BLX, put(ring, i, rows, slot_BT, new)


def marks(size: int, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """position and segment, int32 [B, L], of the tokens in `entered`'s line; segment 0 where there is none."""
    rows, order_BT, slot_BS = jnp.arange(tokens.slot.shape[0])[:, None], order(tokens), _before(tokens, size)

    def line(held, new, missing):
        old_BS = jnp.take_along_axis(held, jnp.maximum(slot_BS, 0), axis=1)
        old_BS = jnp.where(slot_BS >= 0, old_BS, missing)
        return jnp.concatenate([old_BS, jnp.zeros_like(new)], axis=1).at[rows, size + order_BT].set(new, mode="drop")

    return line(tokens.key_position, tokens.position, 0), line(tokens.key_segment, tokens.segment, 0)


def order(tokens: Tokens) -> jax.Array:
    """int32 [B, T]: the place of each new token among its row's real ones; T for padding."""
    return jnp.where(tokens.segment != 0, tokens.slot - tokens.length[:, None], tokens.segment.shape[1])


def _before(tokens: Tokens, size: int) -> jax.Array:
    """int32 [B, size]: the numbers of a row's last tokens before this call, negative where there were fewer."""
    return tokens.length[:, None] - size + jnp.arange(size)
