"""What the vision parts are made of that the language model has none of: maps with biases, convolutions, group norm.

Suffixes: B pictures, Y and X rows and columns, C channels, T tokens, D and E widths.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs.multimodal import GROUPS
from deepseek_jax.core.context import Context
from deepseek_jax.core.params import gain, param
from deepseek_jax.model.linear import linear


class Linear(nnx.Module):
    """``x w + b``. ``axes``: of the weight, which say where it lies on a mesh."""

    def __init__(self, dtype, inputs: int, outputs: int, axes):
        self.weight = param(dtype, (inputs, outputs), axes, inputs=1)
        self.bias = param(dtype, (outputs,), (None,), inputs=0, decay=False)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        y_BTE = linear("BTD,DE->BTE", x_BTD, self.weight, ctx)
        return y_BTE + self.bias.get_value().astype(y_BTE.dtype)


class Perceptron(nnx.Module):
    """Linear maps with an exact GELU between each two, as aligners and the generation head are. ``last``: the axes of
    the last one's weight."""

    def __init__(self, dtype, *sizes: int, last=("embed", None)):
        *pairs, end = pairwise(sizes)
        # A code has eight numbers only: what lies apart of a weight is its outputs.
        self.layers = nnx.List([*(Linear(dtype, *pair, (None, "embed")) for pair in pairs), Linear(dtype, *end, last)])

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        first, *others = self.layers
        x_BTD = first(x_BTD, ctx)
        for layer in others:
            x_BTD = layer(gelu(x_BTD), ctx)
        return x_BTD


def gelu(x: jax.Array) -> jax.Array:
    """With the error function itself: JAX's default is the tanh that approximates it."""
    return jax.nn.gelu(x, approximate=False)


class Conv(nnx.Module):
    """A square convolution of pictures [B, Y, X, C]. The leaf is [C, size, size, outputs], the published tensor's
    transpose, so that it is a linear map with three axes of inputs like any other.

    ``stride`` 1: as large as its input, zeros around it. 2: half as large, one row and column of zeros below and right.
    """

    def __init__(self, dtype, inputs: int, outputs: int, size: int = 3, stride: int = 1):
        self.stride = stride
        self.weight = param(dtype, (inputs, size, size, outputs), (None,) * 4, inputs=3)
        self.bias = param(dtype, (outputs,), (None,), inputs=0, decay=False)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        w, b = (v.get_value().astype(x_BYXC.dtype) for v in (self.weight, self.bias))
        around = w.shape[1] // 2
        padding = (around, around) if self.stride == 1 else (0, 1)
        y_BYXC = jax.lax.conv_general_dilated(
            x_BYXC, w, (self.stride, self.stride), (padding, padding), dimension_numbers=("NHWC", "IHWO", "NHWC")
        )
        return y_BYXC + b


class GroupNorm(nnx.Module):
    """Wu and He 1803.08494, in float32: mean and variance of each group of channels over the whole picture."""

    def __init__(self, dtype, channels: int):
        self.eps = 1e-6
        self.weight = gain(dtype, channels, None)
        self.bias = param(dtype, (channels,), (None,), inputs=0, decay=False)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        x = x_BYXC.astype(jnp.float32).reshape(B, Y * X, GROUPS, C // GROUPS)
        centred = x - jnp.mean(x, axis=(1, 3), keepdims=True)
        x = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=(1, 3), keepdims=True) + self.eps)
        weight, bias = (v.get_value().astype(jnp.float32) for v in (self.weight, self.bias))
        return (x.reshape(B, Y, X, C) * weight + bias).astype(x_BYXC.dtype)
