"""Keys in a cache: an array in the compute dtype, or words in a format that releases are served in (`core.served`).

Suffixes: B rows, S slots, T new tokens, K values of a key, M numbers that hold one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax.core import served
from deepseek_jax.core.served import Form, Served


def empty(form: Form | None, shape: tuple[int, ...], dtype, zeros: Callable) -> jax.Array | Served:
    """Zeros for keys of ``shape`` [layers, B, S, K], in ``dtype`` where there is no form; ``zeros(shape, dtype)`` makes
    an array."""
    if form is None:
        return zeros(shape, dtype)
    *lead, width = shape
    return Served(zeros((*lead, sum(form.words(width - form.width))), jnp.uint32), form, width)


def put(held: jax.Array | Served, i, rows_B1: jax.Array, slot_BT: jax.Array, new: jax.Array) -> jax.Array | Served:
    """``held`` [layers, B, S, K] with `kept` keys of layer ``i`` at slots of rows; slots from S on are dropped."""
    return jax.tree.map(lambda a: a.at[i, rows_B1, slot_BT].set(new, mode="drop"), held)


def taken(held: jax.Array | Served, dtype, i, *at) -> jax.Array:
    """Layer ``i``'s keys as ``dtype``, [B, S, K]; with ``at``, rows and slots, those that stand there."""
    (keys,) = jax.tree.leaves(held)
    return read(keys[i, *at], held, dtype)


def kept(x: jax.Array, like: jax.Array | Served) -> jax.Array:
    """Keys [..., K] as ``like`` keeps them, [..., M]: in its dtype, or as its words."""
    return served.kept(x, like) if isinstance(like, Served) else x.astype(like.dtype)


def read(keys: jax.Array, like: jax.Array | Served, dtype) -> jax.Array:
    """What `kept` gave for ``like``, as an array [..., K] of ``dtype``."""
    return served.read(keys, like, dtype) if isinstance(like, Served) else keys.astype(dtype)
