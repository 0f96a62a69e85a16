"""What a model asks of its devices: ``ctx.ops``, here for one device. `parallel/operations.py` has a mesh's.

A model is written for one device. Where on a mesh an array would lie apart, or another array would have to be brought,
it calls one of these; what is computed is the same.

Suffixes: B rows, T tokens, S keys, D width, K chosen experts, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from deepseek_jax.core.bits import Bits
from deepseek_jax.core.layout import Axes
from deepseek_jax.core.lowrank import dense, held
from deepseek_jax.core.product import product, product_of_weight

Tree = TypeVar("Tree")


class Operations:
    """On one device."""

    # Whether the tokens of a row lie on different devices.
    splits_rows = False

    # Weights.

    def product(self, equation: str, x: jax.Array, w, precision=None) -> jax.Array:
        """float32 ``einsum(equation, x, w)`` of an activation, whose first axes are rows and tokens, and a weight."""
        return product_of_weight(equation, x, w, precision)

    def apart(self, w) -> bool:
        """Whether `product_of_columns` should multiply by a weight's parts, rather than `product` by arrays of them."""
        return False

    def product_of_columns(self, equation: str, x: jax.Array, w, start: int, stop: int) -> jax.Array:
        """`product` of an activation and a part of a weight's last axis."""
        return product(equation, x, self.weight(w, x.dtype)[..., start:stop])

    def lookup(self, table_VD, tokens_BT: jax.Array, dtype) -> jax.Array:
        """[B, T, D] as ``dtype``: the tokens' rows of a table (a parameter, an array, `Quantized`, `Bits`, `LowRank`).

        An id outside the table gives NaN: under jit nothing can be raised, and it should not pass for another token.
        """
        table = held(table_VD)
        if isinstance(table, Bits):
            rows = Bits(table.values.at[tokens_BT].get(mode="clip", wrap_negative_indices=False)).dequantize(dtype)
            inside_BT1 = ((tokens_BT >= 0) & (tokens_BT < table.shape[0]))[..., None]
            return jnp.where(inside_BT1, rows, jnp.nan)
        rows = stored(table, dtype).at[tokens_BT]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(dtype)

    def weight(self, w, dtype) -> jax.Array:
        """A weight as an array of ``dtype``, for what no other operation multiplies."""
        return dense(w, dtype)

    def experts(self, experts, x_BTD, index_BTK, weight_BTK, gate_up, down) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of each token's experts [B, T, D], and int32, the assignments that were not computed.

        ``experts``: the computation on one device, `model.experts.Experts`; an index of -1 is nobody's.
        """
        rows = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, index_BTK, weight_BTK))
        return experts.routed(*rows, gate_up, down).reshape(x_BTD.shape), jnp.zeros((), jnp.int32)

    def nats(self, compute: Callable, hidden_BTD, head, target_BT, axes: Axes):
        """``compute(hidden, head, target)``, a loss summed over tokens (`train.cross_entropy`)."""
        return compute(hidden_BTD, head, target_BT)

    # Attention.

    def rows(self, attend: Callable, queries: Sequence[jax.Array], keys: Sequence[jax.Array], tokens, ctx) -> jax.Array:
        """``attend(*queries, *keys, tokens, ctx)``, [B, T, ...]: queries [B, T, N, ...], whose rows' keys are all here.

        ``keys``: what keys and values follow from, as narrow as it is: [B, S, G, ...], or [B, S, C] for all heads. What
        is given and what is returned may be trees of such arrays.
        """
        return attend(*queries, *keys, tokens, ctx)

    def attend(self, attend: Callable, q_BT, k_BS, v_BS, tokens) -> jax.Array:
        """``attend(q, k, v, tokens)`` within `rows`, without what causality hides."""
        return attend(q_BT, k_BS, v_BS, tokens)

    def heads(self, kernel: Callable, q_BTNK, k_BTGK, v_BTGV, segment_BT) -> jax.Array:
        """``kernel(q, k, v, segment)`` [B, T, N, V], which takes rows and heads apart."""
        return kernel(q_BTNK, k_BTGK, v_BTGV, segment_BT)

    # Tokens.

    def top_k(self, x_BT: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """`jax.lax.top_k` of an activation [B, T, ...] that is no longer differentiated."""
        return jax.lax.top_k(x_BT, k)

    def count(self, index_BTK: jax.Array, size: int) -> jax.Array:
        """int32 [size]: how often each number stands in int32 [B, T, K]; -1 counts for none."""
        return counted(index_BTK, size)

    def row_order(self, length: int, ctx) -> tuple[Any, Any]:
        """The order in which a row's tokens are computed (int [length], None as they stand), and how."""
        return None, ctx

    # Where arrays lie, and when.

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """``x``, an activation with named axes (`core.layout`), where it is to lie."""
        return x

    def fence(self, tree: Tree) -> Tree:
        """``tree``, whose gradients are all computed before any is used: where memory is what limits."""
        return tree

    def zeros(self, shape: tuple[int, ...], dtype, axes: Axes) -> jax.Array:
        """An activation of zeros."""
        return jnp.zeros(shape, dtype)

    def made(self, make: Callable[..., Tree], *arguments) -> Tree:
        """``make(*arguments)``, a tree of variables made under jit."""
        return make(*arguments)


def stored(table, dtype) -> jax.Array:
    """A table to look up in: in its own dtype, which its gradient, a sum over all of a token's places, then has as
    well; one that is quantised or adapted as ``dtype``."""
    table = held(table)
    return table if isinstance(table, jax.Array) else dense(table, dtype)


def counted(index: jax.Array, size: int) -> jax.Array:
    """int32 [size]: how often each number stands in ``index``; -1 counts for none."""
    return jnp.zeros(size, jnp.int32).at[index.reshape(-1)].add(1, mode="drop", wrap_negative_indices=False)


ONE_DEVICE = Operations()
