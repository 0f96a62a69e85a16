"""The encoder of pictures that are shown: SigLIP's tower (2303.15343), of which every patch is a token.

Suffixes: B pictures, Y and X pixels, C colours, P patch, T patches, D width, N heads, H head dimension, F inner width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.configs import multimodal
from deepseek_jax.core.context import Context
from deepseek_jax.core.norm import LayerNorm
from deepseek_jax.core.params import param
from deepseek_jax.model.attention import attend_block
from deepseek_jax.model.linear import linear
from deepseek_jax.multimodal.layers import Linear, gelu

COLOURS = 3


class VisionLayer(nnx.Module):
    """``x + attn(norm(x))``, then ``x + mlp(norm(x))``; every patch sees every other."""

    def __init__(self, cfg: multimodal.Vision, dtype):
        D, N, H = cfg.dim, cfg.n_heads, cfg.dim // cfg.n_heads
        self.norm1 = LayerNorm(dtype, D, None, cfg.norm_eps)
        for name in ("q", "k", "v"):
            setattr(self, name, param(dtype, (D, N, H), ("embed", "heads", "head_dim"), inputs=1))
            setattr(self, f"{name}_bias", param(dtype, (D,), ("heads",), inputs=0, decay=False))
        self.o = param(dtype, (N, H, D), ("heads", "head_dim", "embed"), inputs=2)
        self.o_bias = param(dtype, (D,), ("embed",), inputs=0, decay=False)
        self.norm2 = LayerNorm(dtype, D, None, cfg.norm_eps)
        self.fc1 = Linear(dtype, D, cfg.ffn_dim, ("embed", "ffn"))
        self.fc2 = Linear(dtype, cfg.ffn_dim, D, ("ffn", "embed"))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        y_BTD = self.norm1(x_BTD)
        q_BNTH, k_BNTH, v_BNTH = (
            jnp.moveaxis(
                linear("BTD,DNH->BTNH", y_BTD, w, ctx) + b.get_value().astype(y_BTD.dtype).reshape(w.shape[1:]), 1, 2
            )
            for w, b in ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        )
        visible = jnp.ones((1, 1, 1), bool)
        o_BNTH = attend_block(q_BNTH[:, :, None], k_BNTH, v_BNTH, visible, q_BNTH.shape[-1] ** -0.5)[:, :, 0]
        o_BTD = linear("BTNH,NHD->BTD", jnp.moveaxis(o_BNTH, 1, 2), self.o, ctx)
        x_BTD = x_BTD + o_BTD + self.o_bias.get_value().astype(x_BTD.dtype)
        return x_BTD + self.fc2(gelu(self.fc1(self.norm2(x_BTD), ctx)), ctx)


class Vision(nnx.Module):
    """Pictures [B, Y, X, 3], values from -1 to 1, to tokens [B, T, D]. ``layers``: leaves have a leading layer axis."""

    def __init__(self, cfg: multimodal.Vision, dtype):
        self.cfg = cfg
        P = cfg.patch
        self.patch = param(dtype, (COLOURS, P, P, cfg.dim), (None, None, None, "embed"), inputs=3)
        self.patch_bias = param(dtype, (cfg.dim,), ("embed",), inputs=0, decay=False)
        self.position = param(dtype, (cfg.n_tokens, cfg.dim), ("place", "embed"), inputs=1)
        self.layers = jax.vmap(lambda number: VisionLayer(cfg, dtype))(np.arange(cfg.n_layers))
        self.norm = LayerNorm(dtype, cfg.dim, None, cfg.norm_eps)

    def __call__(self, x_BYXC: jax.Array, ctx: Context) -> jax.Array:
        patch_BTCPP = patches(x_BYXC, self.cfg.patch)
        x_BTD = linear("BTCPQ,CPQD->BTD", patch_BTCPP, self.patch, ctx)
        x_BTD = x_BTD + (self.patch_bias.get_value() + self.position.get_value()).astype(x_BTD.dtype)
        x_BTD, _ = jax.lax.scan(lambda x, layer: (layer(x, ctx), None), x_BTD, self.layers)
        return self.norm(x_BTD)


def patches(x_BYXC: jax.Array, size: int) -> jax.Array:
    """[B, T, C, size, size]: a picture's patches, row by row, as a convolution's kernel reads them."""
    B, Y, X, C = x_BYXC.shape
    tiled = x_BYXC.reshape(B, Y // size, size, X // size, size, C)
    return tiled.transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, C, size, size)
