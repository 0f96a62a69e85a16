"""The experts' grouped matmul as a Pallas kernel for TPU: JAX's megablox.

Tiles of rows meet the weights of the groups that they hold rows of, and no others.

Suffixes: M rows sorted by group, E groups, D and Z widths.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.attention import LANES
from deepseek_jax.kernels.platform import one_pass

# Rows of a tile of the grouped matmul, and bytes of its other dimensions: what a core's 16 MB of
# vector memory hold.
TILE_ROWS, TILE_BYTES = 512, 2048


def grouped_matmul(x_MD, w_EDZ, sizes_E, transpose: bool = False, interpret: bool = False) -> jax.Array:
    """[M, Z] in x's dtype: rows of group e times w[e] (or its transpose), accumulated in float32.

    Rows beyond the groups hold anything, NaN included.
    """
    # Late, as in `attention`.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    x_pad, tiles = _tiled(x_MD, w_EDZ.shape[1 if transpose else 2])
    with one_pass(x_MD.dtype):
        y_pad = gmm(x_pad, w_EDZ, sizes_E, x_MD.dtype, tiles, transpose_rhs=transpose, interpret=interpret)
    return y_pad[: x_MD.shape[0]]


def grouped_outer(x_MD, y_MZ, sizes_E, dtype, interpret: bool = False) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], accumulated in float32; zero for a group of no rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_pad, tiles = _tiled(x_MD, y_MZ.shape[1])
    y_pad, _ = _tiled(y_MZ, 1)
    with one_pass(x_MD.dtype):
        return tgmm(x_pad.T, y_pad, sizes_E, dtype, tiles, interpret=interpret)


def _tiled(x_MD, width: int) -> tuple[jax.Array, tuple[int, int, int]]:
    """The rows, padded to a whole number of tiles, and a tile's rows, inner and outer dimension."""
    rows = min(TILE_ROWS, -(-x_MD.shape[0] // LANES) * LANES)
    largest = TILE_BYTES // x_MD.dtype.itemsize
    x_pad = jnp.pad(x_MD, ((0, -x_MD.shape[0] % rows), (0, 0)))
    return x_pad, (rows, min(largest, x_MD.shape[1]), min(largest, width))
