"""Block-wise quantised weights, as published checkpoints store them.

A block of 128 x 128 FP8 (E4M3) values shares one scale; ``w = values * scale`` (the published name
``weight_scale_inv`` notwithstanding). Blocks at the edges are partial: the scale grid is rounded up. V4's experts are
FP4 (E2M1), of which 32 in a row share one; files hold two values a byte.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FP8 = ml_dtypes.float8_e4m3fn
FP4 = ml_dtypes.float4_e2m1fn
# What holds two FP4 values in a file: the low nibble is that of the even column.
PACKED = np.int8
# The rows and columns of a block in published FP8 releases, and of one of FP4, which is always this.
BLOCK = (128, 128)
FP4_BLOCK = (1, 32)
# Rows that are dequantised at once where each has scales of its own.
STRIP = 128
# The smallest normal float32: a scale below it could not be divided by.
SMALLEST_SCALE = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight kept as low-precision values with a scale a block.

    ``values``: [..., *dims], FP8, FP4, or a wider float that holds stacked matrices of FP8 and of that kind exactly,
    these under scales of 1; for decoding on a CPU uint8, the bits of FP8 (`with_bits`).
    ``scale``: [..., *ceil(dims / block)], float32, bfloat16, float16 or float8_e8m0fnu.
    ``block``: the block's extent along each of the trailing ``len(block)`` axes. ``dims``: the logical shape
    of one leaf, to which ``values``'s trailing axes are reshaped (heads are fused in the stored matrix).
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
    def size(self) -> int:
        return self.values.size

    @property
    def dtype(self):
        return jnp.dtype(FP8) if self.values.dtype == jnp.uint8 else self.values.dtype

    def with_bits(self) -> "Quantized":
        """FP8 values as their bits, sharing their memory; outside jit. XLA:CPU converts a whole stack of FP8 values
        wherever one matrix of it is used; bits it cannot, and these are rebuilt in the product."""
        if self.values.dtype != FP8:
            return self
        device = next(iter(self.values.devices()))
        return replace(self, values=jax.device_put(np.asarray(self.values).view(np.uint8), device))

    def dequantize(self, dtype) -> jax.Array:
        """The weight as ``dtype``, the product taken in float32; shape [..., *dims]."""
        values, scale = _float32(self.values), self.scale.astype(jnp.float32)
        first, shape = values.ndim - len(self.block), values.shape
        # Along the last axis each column gets its scale; along the others rows are taken block by block where blocks
        # are whole, for a scale for each value would be an array as large as the weight.
        scale = spread(scale, values.ndim - 1, self.block[-1], shape[-1], jnp)
        split, place = list(shape[:first]), first
        for size, n in zip(self.block[:-1], shape[first:-1], strict=True):
            if n % size:
                scale = spread(scale, place, size, n, jnp)
                split.append(n)
                place += 1
            else:
                scale = jnp.expand_dims(scale, place + 1)
                split += [n // size, size]
                place += 2
        return (values.reshape(*split, shape[-1]) * scale).astype(dtype).reshape(self.shape)


def _float32(values: jax.Array) -> jax.Array:
    if values.dtype != jnp.uint8:
        return values.astype(jnp.float32)
    # float16 has one bit of exponent more, and its bias is 8 more; the magnitude 0x7f is no number.
    bits = values.astype(jnp.uint16)
    half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return jnp.where(bits & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)


def spread(scale, axis: int, size: int, length: int, xp):
    """Repeats each entry of ``scale`` ``size`` times along ``axis`` and cuts to ``length``."""
    if size == 1:
        return scale
    scale = xp.repeat(scale, size, axis=axis)
    return scale[(slice(None),) * axis + (slice(0, length),)]


def unpack(packed: np.ndarray) -> np.ndarray:
    """FP4 values [N, K], a byte each, of `PACKED` ones [N, K / 2]."""
    raw = packed.view(np.uint8)
    return np.stack([raw & 15, raw >> 4], -1).reshape(*packed.shape[:-1], -1).view(FP4)


def pack(values: np.ndarray) -> np.ndarray:
    """`PACKED` values [N, K / 2] of FP4 ones [N, K]."""
    raw = np.ascontiguousarray(values).view(np.uint8)
    return (raw[..., 0::2] | raw[..., 1::2] << 4).view(PACKED)


def dequantize_matrix(values: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype=np.float32) -> np.ndarray:
    """[N, K] of ``dtype`` from values [N, K] and scale [ceil(N/bn), ceil(K/bk)], on the host.

    The product is taken in float32, some rows of blocks at a time.
    """
    table = np.arange(2 ** ml_dtypes.finfo(values.dtype).bits, dtype=np.uint8).view(values.dtype).astype(np.float32)
    scale = spread(scale.astype(np.float32), 1, block[1], values.shape[1], np)
    out = np.empty(values.shape, dtype)
    count = STRIP if block[0] == 1 else 1
    for first in range(0, len(scale), count):
        rows = slice(first * block[0], (first + count) * block[0])
        out[rows] = table[values[rows].view(np.uint8)] * (scale[first] if count == 1 else scale[first : first + count])
    return out


def quantize_matrix(
    w: np.ndarray,
    block: tuple[int, int],
    like: tuple[np.ndarray, np.ndarray] | None = None,
    powers_of_two: bool = False,
    scale_dtype=np.float32,
    dtype=FP8,
) -> tuple[np.ndarray, np.ndarray]:
    """Values [N, K] of ``dtype``, FP8 or FP4, and scales of ``scale_dtype`` for a matrix w [N, K], on the host.

    A block's scale is its largest magnitude / that of ``dtype``, as ``scale_dtype`` has it, 1 for a block of zeros;
    ``powers_of_two`` rounds it up to one (UE8M0). ``like``: values and scales that w may have been dequantised from; a
    block whose stored values still represent w exactly in w's dtype keeps both, any other is quantised anew.

    Raises ValueError for values that are not finite or need a larger scale than ``scale_dtype`` holds.
    """
    n, k = w.shape
    w32, most = w.astype(np.float32), np.float32(ml_dtypes.finfo(dtype).max)
    if not np.isfinite(w32).all():
        raise ValueError(f"a matrix of shape {w.shape} holds values that are not finite; it cannot be quantised.")
    amax = _per_block(np.abs(w32), block, np.maximum)
    smallest = max(SMALLEST_SCALE, np.float32(jnp.finfo(scale_dtype).smallest_normal))
    scale = np.where(amax > 0, np.maximum(amax / most, smallest), np.float32(1))
    if powers_of_two:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent))
    # The values are divided by the scale that is stored, rounded as it is.
    with np.errstate(over="ignore"):
        scale = scale.astype(scale_dtype).astype(np.float32)
    if not np.isfinite(scale).all():
        raise ValueError(f"values up to {amax.max():.3g} need larger scales than {np.dtype(scale_dtype)} holds.")
    if like is not None:
        values, stored = like
        same = dequantize_matrix(values, stored, block).astype(w.dtype) == w
        keep = _per_block(same, block, np.logical_and)
        scale = np.where(keep, stored.astype(np.float32), scale)

    def whole(grid: np.ndarray) -> np.ndarray:
        return spread(spread(grid, 0, block[0], n, np), 1, block[1], k, np)

    with np.errstate(all="ignore"):  # kept blocks may have a scale of 0
        quantized = np.clip(w32 / whole(scale), -most, most).astype(dtype)
    if like is not None:
        quantized = np.where(whole(keep), values, quantized)
    return quantized, scale.astype(scale_dtype)


def _per_block(x: np.ndarray, block: tuple[int, int], reduce: np.ufunc) -> np.ndarray:
    """[ceil(N / bn), ceil(K / bk)]: each block's values reduced to one; blocks at the edges are partial."""
    for axis in (0, 1):
        x = reduce.reduceat(x, np.arange(0, x.shape[axis], block[axis]), axis=axis)
    return x
