"""RMSNorm (Zhang and Sennrich 1910.07467) and LayerNorm (1607.06450), in float32 whatever the compute dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.params import gain, param

# The norms of the query and key-value latents ignore the config's epsilon in every published implementation.
LATENT_EPS = 1e-6


class RMSNorm(nnx.Module):
    """``weight * x / sqrt(mean(x**2) + eps)`` over the last axis."""

    def __init__(self, dtype, size: int, axis: str, eps: float):
        self.eps = eps
        self.weight = gain(dtype, size, axis)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (self.weight.get_value().astype(jnp.float32) * y).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`` over the last axis."""

    def __init__(self, dtype, size: int, axis: str | None, eps: float):
        self.eps = eps
        self.weight = gain(dtype, size, axis)
        self.bias = param(dtype, (size,), (axis,), inputs=0, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        weight, bias = (v.get_value().astype(jnp.float32) for v in (self.weight, self.bias))
        return (weight * y + bias).astype(x.dtype)
