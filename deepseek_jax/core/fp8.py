"""Emulated FP8 training (V3 2412.19437 §3.3): operands are rounded to FP8 with scales, and multiplied in float32.

Each of a linear map's three products rounds its operands along its own contraction: inputs and gradients in tiles,
weights in blocks. For studies of accuracy, on any device: nothing gets faster.

Suffixes of a product as a matrix product: N batch (what all three terms have), M rows, K contraction, Z outputs.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes

from deepseek_jax.configs.fp8 import INSTRUCTION, KINDS, Fp8
from deepseek_jax.core.bits import Bits
from deepseek_jax.core.lowrank import LowRank, dense, held
from deepseek_jax.core.quant import SMALLEST_SCALE

FORMATS = dict(zip(KINDS, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2), strict=True))
HIGHEST = jax.lax.Precision.HIGHEST


def rounded(a: jax.Array, sizes: tuple[int | None, ...], fp8: Fp8, kind: str = "e4m3") -> jax.Array:
    """float32: ``a`` as FP8 holds it. ``sizes``: for each axis the extent that shares a scale, None for all of it;
    those at the ends are partial."""
    sizes = [n if size is None else min(size, n) for size, n in zip(sizes, a.shape, strict=True)]
    padded = jnp.pad(a.astype(jnp.float32), [(0, -n % size) for size, n in zip(sizes, a.shape, strict=True)])
    parts = padded.reshape([n for whole, size in zip(padded.shape, sizes, strict=True) for n in (whole // size, size)])
    most = jnp.abs(parts).max(tuple(range(1, parts.ndim, 2)), keepdims=True)
    parts = nearest(parts, scales(most, fp8, kind), kind)
    return parts.reshape(padded.shape)[tuple(slice(n) for n in a.shape)]


def scales(most: jax.Array, fp8: Fp8, kind: str) -> jax.Array:
    """For values up to ``most`` the scale at which they fill the format's range; 1 where all are zero."""
    scale = jnp.where(most > 0, jnp.maximum(most / float(ml_dtypes.finfo(FORMATS[kind]).max), SMALLEST_SCALE), 1)
    if fp8.powers_of_two:
        mantissa, exponent = jnp.frexp(scale)
        scale = jnp.ldexp(jnp.ones_like(scale), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    return scale


def nearest(a: jax.Array, scale: jax.Array, kind: str) -> jax.Array:
    """float32 ``a``, each value the nearest of the format times its scale, in a tie the even one.

    Not by a cast there and back, which compilers may take out as excess precision.
    """
    info = ml_dtypes.finfo(FORMATS[kind])
    value = jnp.clip(a / scale, -float(info.max), float(info.max))
    exponent = jnp.maximum(jnp.frexp(value)[1] - 1, int(info.minexp)) - int(info.nmant)
    step = jnp.ldexp(jnp.ones_like(value), exponent)
    return jnp.round(value / step) * step * scale


def cut(a: jax.Array, bits: int) -> jax.Array:
    """float32 ``a`` with so many significant bits, towards zero."""
    raw = jax.lax.bitcast_convert_type(a, jnp.uint32)
    return jax.lax.bitcast_convert_type(raw & jnp.uint32(0xFFFFFFFF << (24 - bits) & 0xFFFFFFFF), jnp.float32)


def accumulated(multiply, a: jax.Array, b: jax.Array, axes: tuple[int, int], fp8: Fp8) -> jax.Array:
    """float32 ``multiply(a, b)``, a product that contracts these axes of a and b, in sums as wide as fp8 says."""
    if fp8.accumulation_bits is None:
        return multiply(a, b)

    def instructions(x, axis: int):
        """[promotions, instructions, ...]: parts of the contraction."""
        width = -(-x.shape[axis] // INSTRUCTION) * INSTRUCTION if fp8.promotion is None else fp8.promotion
        x = jnp.moveaxis(x, axis, 0)
        x = jnp.pad(x, [(0, -x.shape[0] % width)] + [(0, 0)] * (x.ndim - 1))
        x = x.reshape(-1, width // INSTRUCTION, INSTRUCTION, *x.shape[1:])
        return jnp.moveaxis(x, 2, axis + 2)

    def narrow(total, operands):
        return cut(total + multiply(*operands), fp8.accumulation_bits), None

    def promoted(total, operands):
        return total + jax.lax.scan(narrow, jnp.zeros_like(total), operands)[0], None

    parts = instructions(a, axes[0]), instructions(b, axes[1])
    shape = jax.eval_shape(multiply, a, b).shape
    return jax.lax.scan(promoted, jnp.zeros(shape, jnp.float32), parts)[0]


def plain(w, dtype) -> jax.Array:
    """A weight as an array. Raises ValueError for one that is multiplied in another way than whole."""
    w = held(w)
    if isinstance(w, LowRank | Bits):
        raise ValueError(
            f"Context(fp8=...): FP8 is emulated for plain and quantised weights, not for {type(w).__name__}; give a "
            "context without fp8."
        )
    return dense(w, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def fp8_product(equation: str, x: jax.Array, w: jax.Array, fp8: Fp8) -> jax.Array:
    """float32 ``einsum(equation, x, w)``, forward and backward with the operands that ``fp8`` says."""
    return _forward(equation, x, w, fp8)[0]


def _forward(equation, x, w, fp8):
    matrices = _Matrices(equation, x, w)
    x_NMK, w_NKZ = matrices.of("x", x), matrices.of("w", w)
    if fp8.forward:
        one = None if fp8.tile is None else 1
        x_NMK, w_NKZ = rounded(x_NMK, (one, one, fp8.tile), fp8), _rounded_weight(w_NKZ, fp8)
    y_NMZ = _multiplied("NMK,NKZ->NMZ", x_NMK, w_NKZ, (2, 1), fp8, fp8.forward)
    return matrices.back("out", y_NMZ), (x, w)


def _backward(equation, fp8, operands, dy):
    x, w = operands
    matrices = _Matrices(equation, x, w)
    x_NMK, w_NKZ, dy_NMZ = matrices.of("x", x), matrices.of("w", w), matrices.of("out", dy)
    one, (along, across) = (None if fp8.tile is None else 1), fp8.gradient_sizes
    stack = None if along is None else 1
    dz_NMZ = dy_NMZ
    if fp8.input_gradient:
        dz_NMZ = rounded(dy_NMZ, (stack, across, along), fp8, fp8.gradient)
        w_NKZ = _rounded_weight(w_NKZ, fp8)
    dx_NMK = _multiplied("NMZ,NKZ->NMK", dz_NMZ, w_NKZ, (2, 2), fp8, fp8.input_gradient)
    if fp8.weight_gradient:
        x_NMK = rounded(x_NMK, (one, fp8.tile, one), fp8)
        dy_NMZ = rounded(dy_NMZ, (stack, along, across), fp8, fp8.gradient)
    dw_NKZ = _multiplied("NMK,NMZ->NKZ", x_NMK, dy_NMZ, (1, 1), fp8, fp8.weight_gradient)
    return matrices.back("x", dx_NMK).astype(x.dtype), matrices.back("w", dw_NKZ).astype(w.dtype)


fp8_product.defvjp(_forward, _backward)


def _rounded_weight(w_NKZ, fp8: Fp8) -> jax.Array:
    return rounded(w_NKZ, (None if fp8.block is None else 1, fp8.block, fp8.block), fp8)


def _multiplied(equation: str, a, b, axes: tuple[int, int], fp8: Fp8, emulated: bool) -> jax.Array:
    multiply = partial(jnp.einsum, equation, precision=HIGHEST, preferred_element_type=jnp.float32)
    return accumulated(multiply, a, b, axes, fp8) if emulated else multiply(a, b)


class _Matrices:
    """An equation's terms as stacks of matrices, the axes of one kind fused in the order of the term that has them."""

    def __init__(self, equation: str, x, w):
        of_x, of_w, out = equation.replace("->", ",").split(",")
        self.size = dict(zip(of_x + of_w, (*x.shape, *w.shape), strict=True))
        N = "".join(letter for letter in of_w if letter in of_x and letter in out)
        K = "".join(letter for letter in of_w if letter in of_x and letter not in out)
        M, Z = ("".join(letter for letter in a if letter not in b) for a, b in ((of_x, of_w), (of_w, of_x)))
        self.terms = {"x": (of_x, (N, M, K)), "w": (of_w, (N, K, Z)), "out": (out, (N, M, Z))}

    def of(self, name: str, a) -> jax.Array:
        """float32 [N, rows, columns] of a term's array."""
        term, kinds = self.terms[name]
        a = jnp.einsum(f"{term}->{''.join(kinds)}", a.astype(jnp.float32))
        return a.reshape([math.prod(self.size[letter] for letter in kind) for kind in kinds])

    def back(self, name: str, a_NXY) -> jax.Array:
        term, kinds = self.terms[name]
        letters = "".join(kinds)
        return jnp.einsum(f"{letters}->{term}", a_NXY.reshape([self.size[letter] for letter in letters]))
