"""bfloat16 weights for decoding on a CPU, held as their bits and rebuilt a tile at a time.

XLA:CPU multiplies bfloat16 by way of float32, and makes that float32 copy of the whole weight: at every product, or
once for a loop over decoding steps, which then holds the model two times more. It cannot convert bits ahead; a tile of
them is rebuilt in the cache, and a product reads a weight's own two bytes a value.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

# Of a tile in float32: what a core's own cache holds.
TILE_BYTES = 1 << 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits:
    """A bfloat16 array as ``values``, uint16, of the same shape."""

    values: jax.Array

    @classmethod
    def of(cls, a: jax.Array) -> "Bits":
        """Of a bfloat16 array on a CPU, sharing its memory; outside jit."""
        return cls(jax.device_put(np.asarray(a).view(np.uint16), next(iter(a.devices()))))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self):
        return jnp.dtype(jnp.bfloat16)

    def dequantize(self, dtype) -> jax.Array:
        """The array as ``dtype``."""
        return jax.lax.bitcast_convert_type(self.values.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)


def tiled_product(equation: str, x: jax.Array, w: Bits) -> jax.Array:
    """float32 ``einsum(equation, x, w)``, a tile of the weight's first axis after the other: the products are those of
    bfloat16 operands, added up in another order.

    Tiles fit into a core's cache. Where the first axis is summed over they divide it, and are at least as long as x has
    rows, or adding up would move more than the weight; otherwise the last one begins early and repeats some products.
    Has no gradient.
    """
    terms, of_y = equation.split("->")
    of_x, of_w = terms.split(",")
    sizes = dict(zip(of_x + of_w, x.shape + w.shape, strict=True))
    first, length, rest = of_w[0], w.shape[0], math.prod(w.shape[1:])
    size = min(length, max(TILE_BYTES // (4 * rest), 1))
    if first not in of_y:
        rows = math.prod(n for a, n in sizes.items() if a in of_x and a not in of_w)
        size = max(n for n in range(1, min(length, max(size, rows)) + 1) if length % n == 0)
    x = x.astype(jnp.float32)

    def part(a, term: str, number):
        if first not in term:
            return a
        return jax.lax.dynamic_slice_in_dim(a, number * size, size, axis=term.index(first))

    def add(number, y):
        tile = Bits(part(w.values, of_w, number)).dequantize(jnp.float32)
        product = jnp.einsum(equation, part(x, of_x, number), tile)
        if first in of_y:
            return jax.lax.dynamic_update_slice_in_dim(y, product, number * size, axis=of_y.index(first))
        return y + product

    # A slice that would end behind its array begins earlier, in all three terms alike.
    return jax.lax.fori_loop(0, -(-length // size), add, jnp.zeros([sizes[a] for a in of_y], jnp.float32))
