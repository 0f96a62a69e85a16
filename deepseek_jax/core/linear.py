"""Every linear map goes through `linear`: the one place that dequantises and fixes accumulation."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.context import Context
from deepseek_jax.core.quant import Quantized


def dense(w: nnx.Variable | Quantized | jax.Array, dtype) -> jax.Array:
    """A weight as an array of ``dtype``, dequantised if it is quantised."""
    if isinstance(w, nnx.Variable):
        w = w.get_value()
    return w.dequantize(dtype) if isinstance(w, Quantized) else w.astype(dtype)


def linear(equation: str, x: jax.Array, w, ctx: Context, precision=None) -> jax.Array:
    """``einsum(equation, x, w)`` in x's dtype, accumulated in float32.

    ``w`` is a parameter, an array or a `Quantized` leaf. ``precision``: as in `jnp.einsum`; the router passes
    HIGHEST, since a float32 product is otherwise bfloat16 on TPU and TF32 on GPU.
    """
    y = jnp.einsum(equation, x, dense(w, x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
