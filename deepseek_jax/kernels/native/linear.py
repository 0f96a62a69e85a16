"""Linear maps of many rows or of few, and their gradients (`linear.cc`). Numbers are of float32 or bfloat16, sums
float32.

Suffixes: M rows, D inputs, Z outputs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.bits import Bits
from deepseek_jax.kernels.native.library import call, check, panels_room

LINEAR = 'Context(linear="native")'
# Numbers of rows that are multiplied natively: few, while decoding, and many. In between XLA is as fast
# (experiments/bench_cpu).
FEW, FEWEST = range(1, 13), 64
# Of few rows: units of work, columns of one (`kUnits`, `kChunk` of `linear.cc`), and fewest of the inner dimension.
UNITS, CHUNK, DEPTH = 4, 256, 64
# Of a weight's gradient: parts of the rows whose sums stand apart, of how many rows at least, and of a gradient of how
# many numbers at most.
PARTS, PART_ROWS, PARTED = 4, 256, 1 << 18


def multiplies(equation: str, x: jax.Array, w) -> bool:
    """Whether `product` is for this map: of `FEW` rows or `FEWEST` and more, a weight that is an array or bits, and an
    equation whose last axes of x are the first ones of w."""
    inputs = _inputs(equation)
    rows = math.prod(x.shape[: x.ndim - inputs])
    return inputs > 0 and isinstance(w, jax.Array | Bits) and (rows >= FEWEST or rows in FEW)


def _inputs(equation: str) -> int:
    """How many axes a map sums over; 0 where they are not x's last and w's first ones."""
    terms, out = equation.split("->")
    of_x, of_w = terms.split(",")
    inputs = "".join(letter for letter in of_x if letter not in out)
    plain = (
        of_x.endswith(inputs)
        and of_w.startswith(inputs)
        and out == of_x.removesuffix(inputs) + of_w.removeprefix(inputs)
    )
    return len(inputs) if plain else 0


def product(equation: str, x: jax.Array, w: jax.Array | Bits) -> jax.Array:
    """float32 ``einsum(equation, x, w)``, where it `multiplies`; w is taken in x's dtype, or in bfloat16 if that is its
    own. Has a gradient, bits none.

    Raises ValueError for other dtypes, where the platform is no CPU, or nothing can be built.
    """
    check(LINEAR, x)
    inputs = _inputs(equation)
    if isinstance(w, Bits):
        w = w.values
    elif w.dtype != jnp.bfloat16:
        w = w.astype(x.dtype)
    D = math.prod(w.shape[:inputs])
    y_MZ = _product(x.reshape(-1, D), w.reshape(D, -1))
    return y_MZ.reshape(*x.shape[: x.ndim - inputs], *w.shape[inputs:])


@jax.custom_vjp
def _product(x_MD, w_DZ) -> jax.Array:
    return _rows(x_MD, w_DZ, False)


def _rows(x_MD, w_DZ, transpose: bool) -> jax.Array:
    width = w_DZ.shape[0 if transpose else 1]
    M, D = x_MD.shape
    room = (panels_room(D, width),)
    if M in FEW and not transpose:
        room = (max(1, min(UNITS // -(-width // CHUNK), D // DEPTH)), M, width)
    shapes = (M, width), room
    run = call("Linear", [jax.ShapeDtypeStruct(a, jnp.float32) for a in shapes], w_DZ)
    return run(x_MD.astype(jnp.float32), w_DZ, transpose=np.bool_(transpose), halves=_halves(x_MD))[0]


def _halves(x: jax.Array) -> np.bool_:
    """Whether all numbers are those of bfloat16: matrix units take them as they are."""
    return np.bool_(x.dtype == jnp.bfloat16)


def _product_forward(x_MD, w_DZ):
    return _product(x_MD, w_DZ), (x_MD, w_DZ)


def _product_backward(operands, dy_MZ):
    x_MD, w_DZ = operands
    dx_MD = _rows(dy_MZ, w_DZ, True).astype(x_MD.dtype)
    if w_DZ.dtype == jnp.uint16:
        return dx_MD, None
    parts = min(PARTS, x_MD.shape[0] // PART_ROWS) if w_DZ.size <= PARTED else 1
    shapes = w_DZ.shape, ((parts if parts > 1 else 0), *w_DZ.shape)
    run = call("LinearGradient", [jax.ShapeDtypeStruct(a, jnp.float32) for a in shapes])
    return dx_MD, run(x_MD.astype(jnp.float32), dy_MZ, halves=_halves(x_MD))[0].astype(w_DZ.dtype)


_product.defvjp(_product_forward, _product_backward)
