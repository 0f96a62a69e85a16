"""The code of pictures that are drawn: LlamaGen's VQ tokenizer (2406.06525 §2.1), an encoder and a decoder of
convolutions around a codebook.

Modules are called as DeepSeek's own code calls them. Suffixes: B pictures, Y and X rows and columns, C channels,
K codes, T positions of a picture's codes, Z dimensions of a code.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs import multimodal
from deepseek_jax.core.params import param
from deepseek_jax.core.product import product
from deepseek_jax.multimodal.layers import Conv, GroupNorm

COLOURS = 3
# What `torch.nn.functional.normalize` divides by at least.
TINY = 1e-12


class ResnetBlock(nnx.Module):
    """``x + conv(swish(norm(conv(swish(norm(x))))))``; where the width changes, x goes through a map of its own."""

    def __init__(self, dtype, inputs: int, outputs: int):
        self.norm1, self.conv1 = GroupNorm(dtype, inputs), Conv(dtype, inputs, outputs)
        self.norm2, self.conv2 = GroupNorm(dtype, outputs), Conv(dtype, outputs, outputs)
        self.nin_shortcut = Conv(dtype, inputs, outputs, size=1) if inputs != outputs else None

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        y_BYXC = self.conv1(jax.nn.silu(self.norm1(x_BYXC)))
        y_BYXC = self.conv2(jax.nn.silu(self.norm2(y_BYXC)))
        return (x_BYXC if self.nin_shortcut is None else self.nin_shortcut(x_BYXC)) + y_BYXC


class AttnBlock(nnx.Module):
    """Attention of one head among the positions of a picture."""

    def __init__(self, dtype, channels: int):
        self.norm = GroupNorm(dtype, channels)
        self.q, self.k, self.v, self.proj_out = (Conv(dtype, channels, channels, size=1) for _ in range(4))

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        B, Y, X, C = x_BYXC.shape
        y_BYXC = self.norm(x_BYXC)
        q_BTC, k_BSC, v_BSC = (conv(y_BYXC).reshape(B, Y * X, C) for conv in (self.q, self.k, self.v))
        p_BTS = jax.nn.softmax(product("BTC,BSC->BTS", q_BTC, k_BSC) * C**-0.5, axis=-1)
        o_BTC = product("BTS,BSC->BTC", p_BTS.astype(v_BSC.dtype), v_BSC).astype(x_BYXC.dtype)
        return x_BYXC + self.proj_out(o_BTC.reshape(B, Y, X, C))


class Level(nnx.Module):
    """The blocks of one resolution, with attention after each at the lowest, and what changes the resolution."""

    def __init__(self, dtype, widths: list[int], attends: bool):
        self.res = nnx.List(ResnetBlock(dtype, *pair) for pair in pairwise(widths))
        self.attn = nnx.List(AttnBlock(dtype, width) for width in (widths[1:] if attends else ()))

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        for i, block in enumerate(self.res):
            x_BYXC = block(x_BYXC)
            if self.attn:
                x_BYXC = self.attn[i](x_BYXC)
        return x_BYXC


class Down(Level):
    """An encoder's; all but the last halve the resolution."""

    def __init__(self, dtype, widths: list[int], last: bool):
        super().__init__(dtype, widths, last)
        self.downsample = None if last else Conv(dtype, widths[-1], widths[-1], stride=2)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = super().__call__(x_BYXC)
        return x_BYXC if self.downsample is None else self.downsample(x_BYXC)


class Up(Level):
    """A decoder's; all but the last double the resolution, each position becoming four."""

    def __init__(self, dtype, widths: list[int], first: bool, last: bool):
        super().__init__(dtype, widths, first)
        self.upsample = None if last else Conv(dtype, widths[-1], widths[-1])

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = super().__call__(x_BYXC)
        if self.upsample is None:
            return x_BYXC
        return self.upsample(jnp.repeat(jnp.repeat(x_BYXC, 2, axis=1), 2, axis=2))


def _middle(dtype, width: int) -> nnx.List:
    blocks = ResnetBlock(dtype, width, width), AttnBlock(dtype, width)
    return nnx.List([*blocks, ResnetBlock(dtype, width, width)])


class Encoder(nnx.Module):
    """Pictures [B, Y, X, 3] to [B, Y / factor, X / factor, z_dim]."""

    def __init__(self, cfg: multimodal.VQ, dtype):
        widths = [cfg.channels * m for m in cfg.multipliers]
        self.conv_in = Conv(dtype, COLOURS, cfg.channels)
        self.conv_blocks = nnx.List(
            Down(dtype, [before, *[width] * cfg.n_blocks], last=i == len(widths) - 1)
            for i, (before, width) in enumerate(zip([cfg.channels, *widths], widths, strict=False))
        )
        self.mid = _middle(dtype, widths[-1])
        self.norm_out, self.conv_out = GroupNorm(dtype, widths[-1]), Conv(dtype, widths[-1], cfg.z_dim)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = self.conv_in(x_BYXC)
        for block in (*self.conv_blocks, *self.mid):
            x_BYXC = block(x_BYXC)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BYXC)))


class Decoder(nnx.Module):
    """[B, Y, X, z_dim] to pictures [B, factor Y, factor X, 3]."""

    def __init__(self, cfg: multimodal.VQ, dtype):
        widths = [cfg.channels * m for m in reversed(cfg.multipliers)]
        self.conv_in = Conv(dtype, cfg.z_dim, widths[0])
        self.mid = _middle(dtype, widths[0])
        self.conv_blocks = nnx.List(
            Up(dtype, [before, *[width] * (cfg.n_blocks + 1)], first=i == 0, last=i == len(widths) - 1)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out, self.conv_out = GroupNorm(dtype, widths[-1]), Conv(dtype, widths[-1], COLOURS)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x_BYXC = self.conv_in(x_BYXC)
        for block in (*self.mid, *self.conv_blocks):
            x_BYXC = block(x_BYXC)
        return self.conv_out(jax.nn.silu(self.norm_out(x_BYXC)))


class VQ(nnx.Module):
    """Pictures to codes and back. A code is looked up, and the nearest one found, among unit vectors: what the encoder
    makes and what the codebook holds are divided by their lengths (DeepSeek's code; transformers' ``encode`` does not).
    """

    def __init__(self, cfg: multimodal.VQ, dtype):
        self.encoder, self.decoder = Encoder(cfg, dtype), Decoder(cfg, dtype)
        self.codebook = param(dtype, (cfg.n_codes, cfg.code_dim), ("place", None), inputs=1)
        self.quant_conv = Conv(dtype, cfg.z_dim, cfg.code_dim, size=1)
        self.post_quant_conv = Conv(dtype, cfg.code_dim, cfg.z_dim, size=1)

    def encode(self, x_BYXC: jax.Array) -> jax.Array:
        """int32 [B, T]: the codes of pictures [B, Y, X, 3] with values from -1 to 1, row by row."""
        return self.nearest(self.vectors(x_BYXC))

    def vectors(self, x_BYXC: jax.Array) -> jax.Array:
        """[B, T, Z] of unit length: what the encoder makes of pictures, before it is quantised."""
        z_BYXZ = self.quant_conv(self.encoder(x_BYXC))
        return unit(z_BYXZ.reshape(z_BYXZ.shape[0], -1, z_BYXZ.shape[-1]))

    def nearest(self, z_BTZ: jax.Array) -> jax.Array:
        """int32 [B, T]: of equally near codes the first. Between unit vectors the nearest has the largest product."""
        code_KZ = unit(self.codebook.get_value())
        score_BTK = product("BTZ,KZ->BTK", z_BTZ.astype(code_KZ.dtype), code_KZ, jax.lax.Precision.HIGHEST)
        return jnp.argmax(score_BTK, axis=-1).astype(jnp.int32)

    def look_up(self, code_BT: jax.Array) -> jax.Array:
        """[B, T, Z] of unit length."""
        return unit(self.codebook.get_value())[code_BT]

    def decode(self, code_BT: jax.Array) -> jax.Array:
        """Pictures [B, Y, X, 3] of int32 codes [B, T] that make a square; values from -1 to 1, or a little beyond."""
        return self.draw(self.look_up(code_BT))

    def draw(self, z_BTZ: jax.Array) -> jax.Array:
        """Pictures of vectors."""
        B, T, Z = z_BTZ.shape
        side = round(T**0.5)
        return self.decoder(self.post_quant_conv(z_BTZ.reshape(B, side, side, Z)))


def unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis at length 1."""
    x32 = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True))
    return (x32 / jnp.maximum(length, TINY)).astype(x.dtype)
