"""Linear maps of weights: the one place that fixes the dtype of their products.

The grouped matmul of the experts, which has no equation, is the exception: `model/experts.py`, and on a mesh
`parallel/expert.py`.
"""

import jax

from deepseek_jax.core.context import Context
from deepseek_jax.core.fp8 import fp8_product, plain
from deepseek_jax.core.lowrank import held
from deepseek_jax.core.ops import ONE_DEVICE
from deepseek_jax.kernels.native import linear as native


def linear(equation: str, x: jax.Array, w, ctx: Context, precision=None, dtype=None) -> jax.Array:
    """``einsum(equation, x, w)`` in x's dtype, accumulated in float32, forward and backward.

    ``w``: a parameter, an array, or a `Quantized`, `Bits` or `LowRank` leaf. ``ctx``: how the model runs; what changes
    the arithmetic of all linear maps belongs here. ``precision``: as in `jnp.einsum`; the router passes HIGHEST, since
    a float32 product is otherwise bfloat16 on TPU and TF32 on GPU. ``dtype``: of the result, by default x's.
    With ``ctx.fp8`` a map that asks for neither is emulated in FP8: the router and the head are not.

    x's first two axes are rows and tokens.
    """
    if ctx.fp8 is not None and precision is None and dtype is None:
        return fp8_product(equation, x, plain(w, x.dtype), ctx.fp8).astype(x.dtype)
    if ctx.linear == "native" and ctx.ops is ONE_DEVICE and native.multiplies(equation, x, own := held(w)):
        return native.product(equation, x, own).astype(dtype or x.dtype)
    return ctx.ops.product(equation, x, w, precision).astype(dtype or x.dtype)
