"""Block-wise quantised weights, as published checkpoints store them.

A block of 128 x 128 FP8 (E4M3) values shares one scale; ``w = values * scale`` (the published name
``weight_scale_inv`` notwithstanding). Blocks at the edges are partial: the scale grid is rounded up.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FP8 = ml_dtypes.float8_e4m3fn
FP8_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight kept as low-precision values with a scale a block.

    ``values``: [..., *dims], low precision. ``scale``: [..., *ceil(dims / block)], float32 or float8_e8m0fnu.
    ``block``: the block's extent along each of the trailing ``len(block)`` axes. ``dims``: the logical shape of
    one leaf, to which ``values``'s trailing axes are reshaped (heads are fused in the stored matrix).
    Leading axes (stacked layers) stand before both.
    """

    values: jax.Array
    scale: jax.Array
    block: tuple[int, ...] = field(metadata={"static": True})
    dims: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        lead = self.values.shape[: self.values.ndim - len(self.block)]
        return (*lead, *self.dims)

    @property
    def dtype(self):
        return self.values.dtype

    def dequantize(self, dtype) -> jax.Array:
        """The weight as ``dtype``, the product taken in float32; shape [..., *dims]."""
        scale = self.scale.astype(jnp.float32)
        first = self.values.ndim - len(self.block)
        for axis, size in enumerate(self.block, start=first):
            scale = spread(scale, axis, size, self.values.shape[axis], jnp)
        return (self.values.astype(jnp.float32) * scale).astype(dtype).reshape(self.shape)


def spread(scale, axis: int, size: int, length: int, xp):
    """Repeats each entry of ``scale`` ``size`` times along ``axis`` and cuts to ``length``."""
    if size == 1:
        return scale
    scale = xp.repeat(scale, size, axis=axis)
    return scale[(slice(None),) * axis + (slice(0, length),)]


def dequantize_matrix(values: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 [N, K] from values [N, K] and scale [ceil(N/bn), ceil(K/bk)], on the host."""
    scale = scale.astype(np.float32)
    for axis in (0, 1):
        scale = spread(scale, axis, block[axis], values.shape[axis], np)
    return values.astype(np.float32) * scale


def quantize_matrix(
    w: np.ndarray, block: tuple[int, int], like: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """FP8 values [N, K] and float32 scales for a matrix w [N, K], on the host.

    A block's scale is its largest magnitude / 448, 1 for a block of zeros. ``like``: values and scales that w
    may have been dequantised from; a block whose stored values still represent w exactly in w's dtype keeps
    both, any other is quantised anew.

    Raises ValueError for values that are not finite.
    """
    n, k = w.shape
    bn, bk = block
    rows, cols = -(-n // bn), -(-k // bk)
    w32 = w.astype(np.float32)
    if not np.isfinite(w32).all():
        raise ValueError(f"a matrix of shape {w.shape} holds values that are not finite; it cannot be quantised.")
    padded = np.zeros((rows * bn, cols * bk), np.float32)
    padded[:n, :k] = np.abs(w32)
    amax = padded.reshape(rows, bn, cols, bk).max(axis=(1, 3))
    scale = np.where(amax > 0, amax / np.float32(FP8_MAX), np.float32(1)).astype(np.float32)
    if like is not None:
        values, stored = like
        same = dequantize_matrix(values, stored, block).astype(w.dtype) == w
        padded = np.ones((rows * bn, cols * bk), bool)
        padded[:n, :k] = same
        keep = padded.reshape(rows, bn, cols, bk).all(axis=(1, 3))
        scale = np.where(keep, stored.astype(np.float32), scale)
    spreaded = spread(spread(scale, 0, bn, n, np), 1, bk, k, np)
    quantized = np.clip(w32 / spreaded, -FP8_MAX, FP8_MAX).astype(FP8)
    if like is not None:
        kept = spread(spread(keep, 0, bn, n, np), 1, bk, k, np)
        quantized = np.where(kept, values, quantized)
    return quantized, scale
