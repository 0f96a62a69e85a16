"""RMSNorm (Zhang and Sennrich 1910.07467), in float32 whatever the compute dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.core.params import gain

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
