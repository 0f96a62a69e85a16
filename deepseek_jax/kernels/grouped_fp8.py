"""The grouped matmuls of experts with operands that are rounded to FP8 as `core.fp8` says.

Every expert is a matrix product of its own: its weight has blocks or a scale of its own, and tiles of tokens begin at
its first row.

Suffixes: M rows sorted by group, E groups, D and Z widths, P tiles of rows.
"""

from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.core.fp8 import Fp8, accumulated, nearest, plain, rounded, scales
from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer


def fp8_matmul(x_MD, w_EDZ, sizes_E, form: str, fp8: Fp8) -> jax.Array:
    """`grouped_matmul`, emulated if ``fp8.forward``. ``w_EDZ``: an array or a `Quantized`."""
    if not fp8.forward:
        return grouped_matmul(x_MD, plain(w_EDZ, x_MD.dtype), sizes_E, form)
    x = rounded(_inside(x_MD, sizes_E), (None if fp8.tile is None else 1, fp8.tile), fp8)
    return _matmul(x, w_EDZ, sizes_E, form, fp8, transpose=False).astype(x_MD.dtype)


def fp8_transposed(dy_MZ, w_EDZ, sizes_E, form: str, fp8: Fp8) -> jax.Array:
    """`grouped_matmul` with weights transposed, emulated if ``fp8.input_gradient``."""
    if not fp8.input_gradient:
        return grouped_matmul(dy_MZ, plain(w_EDZ, dy_MZ.dtype), sizes_E, form, transpose=True)
    along, across = fp8.gradient_sizes
    dy = _rounded_rows(dy_MZ, sizes_E, across, along, fp8, fp8.gradient)
    return _matmul(dy, w_EDZ, sizes_E, form, fp8, transpose=True).astype(dy_MZ.dtype)


def fp8_outer(x_MD, dy_MZ, sizes_E, form: str, dtype, fp8: Fp8) -> jax.Array:
    """`grouped_outer`, emulated if ``fp8.weight_gradient``.

    Raises ValueError for sums that are not float32: there are as many products in them as tokens chose the expert.
    """
    if not fp8.weight_gradient:
        return grouped_outer(x_MD, dy_MZ, sizes_E, form, dtype)
    if fp8.accumulation_bits is not None:
        raise ValueError(
            f"Fp8(accumulation_bits={fp8.accumulation_bits}): narrow sums of experts' weight gradients are not "
            "emulated; set weight_gradient=False, or study a dense model."
        )
    along, across = fp8.gradient_sizes
    x = _rounded_rows(x_MD, sizes_E, fp8.tile, None if fp8.tile is None else 1, fp8, "e4m3")
    dy = _rounded_rows(dy_MZ, sizes_E, along, across, fp8, fp8.gradient)
    with jax.default_matmul_precision("highest"):
        return grouped_outer(x, dy, sizes_E, form, dtype)


def _matmul(x_MD, w_EDZ, sizes_E, form: str, fp8: Fp8, transpose: bool) -> jax.Array:
    """float32, of rounded rows."""
    w = plain(w_EDZ, jnp.float32)
    w = rounded(w.reshape(*w.shape[:2], -1), (1, fp8.block, fp8.block), fp8)
    multiply = partial(grouped_matmul, sizes_E=sizes_E, form=form, transpose=transpose)
    with jax.default_matmul_precision("highest"):
        y = accumulated(multiply, x_MD, w, (1, 2 if transpose else 1), fp8)
    return y


def _inside(a_MX, sizes_E) -> jax.Array:
    """Zero behind the groups: what stands there is nobody's, and is to have no part in a scale."""
    return jnp.where(jnp.arange(a_MX.shape[0])[:, None] < sizes_E.sum(), a_MX, 0)


def _rounded_rows(a_MX, sizes_E, rows: int | None, columns: int | None, fp8: Fp8, kind: str) -> jax.Array:
    """float32: ``a`` as FP8 holds it, in blocks of so many rows of a group and so many columns."""
    a = _inside(a_MX, sizes_E).astype(jnp.float32)
    if rows is None or rows == 1:
        return rounded(a, (rows, columns), fp8, kind)
    M, X = a.shape
    columns = min(columns, X)
    tiles_E, end_E = -(-sizes_E // rows), jnp.cumsum(sizes_E)
    row = jnp.arange(M)
    group = jnp.minimum(jnp.searchsorted(end_E, row, side="right"), sizes_E.size - 1)
    tile_M = (jnp.cumsum(tiles_E) - tiles_E)[group] + (row - (end_E - sizes_E)[group]) // rows
    parts = jnp.pad(jnp.abs(a), ((0, 0), (0, -X % columns))).reshape(M, -1, columns).max(-1)
    # A tile more for each group that does not fill its last one, and for the rows behind the groups.
    most_PX = jax.ops.segment_max(parts, tile_M, num_segments=2 * (-(-M // rows) + sizes_E.size))
    scale = jnp.repeat(scales(most_PX, fp8, kind)[tile_M], columns, axis=1)[:, :X]
    return nearest(a, scale, kind)
