"""What layers read from and write to: one stream, or several that mix (hyper-connections, 2409.19606; mHC, 2512.24880
§4; V4, 2606.19348 §2.2).

A sublayer reads a weighted sum of the streams; its output is added to each by a weight of its own, after the streams
have been mixed. The weights follow from the streams themselves, token by token, in float32.

Suffixes: B batch, T tokens, H streams, D width, X = H D, O weights. In [H, H] the first axis is the stream that is
read, the second the one that is written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.configs.layers import HyperConnections
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE
from deepseek_jax.core.params import declared, param
from deepseek_jax.model.linear import linear

HIGHEST = jax.lax.Precision.HIGHEST
# How much what depends on the token counts at first beside what is alike for all: the papers' value.
SCALE = 0.01
# Before the sigmoid, and before the softmax: at first a sublayer reads one stream with a weight of 0.88 and the others
# with 0.12, and a stream keeps 0.95 of itself.
READ, KEPT = 2.0, 4.0


class Plain:
    """One stream [B, T, D]: a sublayer reads it and its output is added. It has no parameters."""

    def read(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
        return x_BTD, None

    def write(self, x_BTD: jax.Array, out_BTD: jax.Array, back: Any, ctx: Context) -> jax.Array:
        return x_BTD + out_BTD


PLAIN = Plain()


class Streams(nnx.Module):
    """A sublayer's hyper-connection between streams [B, T, H, D].

    The leaves are those of the published files, float32 whatever the model's dtype: ``map``, from all streams of a
    token (without the constraint: from each by itself) to the weights of reading, of writing and of mixing, in that
    order; ``scale``, a factor for each kind; ``base``, what is added.

    A fresh one is nearly a plain residual: ``scale`` is 0.01, each stream is written to with a weight of 1 and kept,
    and sublayer i reads stream i mod H. Streams begin as copies, so that neither which is read nor how they mix
    matters for the first output; it does for the gradients, by which they grow apart.
    """

    def __init__(self, cfg: ModelConfig, place: jax.Array | int):
        """``place``: which of the model's sublayers it is, of which two make a layer."""
        self.cfg, self.eps = cfg.residual, cfg.norm_eps
        H, constrained = self.cfg.n_streams, self.cfg.constrained
        inputs, outputs = (H * cfg.dim, 2 * H + H * H) if constrained else (cfg.dim, 2 + H)
        self.map = param(jnp.float32, (inputs, outputs), ("embed", None), inputs=1)
        read_H, eye_HH = jnp.arange(H) == place % H, jnp.eye(H)
        if constrained:
            base = jnp.where(read_H, READ, -READ), jnp.zeros(H), KEPT * eye_HH
        else:
            base = read_H, jnp.ones(H), eye_HH
        self.base = _vector(jnp.concatenate([part.reshape(-1) for part in base]))
        self.scale = _vector(jnp.full(3, SCALE))

    def read(self, x_BTHD: jax.Array, ctx: Context) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """What the sublayer gets, [B, T, D], and what `write` needs."""
        pre_BTH, post_BTH, mix_BTHH = self.weights(x_BTHD, ctx)
        y_BTD = jnp.einsum("BTH,BTHD->BTD", pre_BTH, x_BTHD.astype(jnp.float32), precision=HIGHEST)
        return y_BTD.astype(x_BTHD.dtype), (post_BTH, mix_BTHH)

    def write(
        self, x_BTHD: jax.Array, out_BTD: jax.Array, back: tuple[jax.Array, jax.Array], ctx: Context
    ) -> jax.Array:
        """The streams, mixed, with the sublayer's output."""
        post_BTH, mix_BTHH = back
        x32_BTHD, out32_BTD = x_BTHD.astype(jnp.float32), out_BTD.astype(jnp.float32)
        mixed_BTHD = jnp.einsum("BTJH,BTJD->BTHD", mix_BTHH, x32_BTHD, precision=HIGHEST)
        x_BTHD = (mixed_BTHD + post_BTH[..., None] * out32_BTD[:, :, None]).astype(x_BTHD.dtype)
        return ctx.ops.constrain(x_BTHD, (BATCH, SEQUENCE, None, None))

    def weights(self, x_BTHD: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """float32 weights of reading [B, T, H], of writing [B, T, H] and of mixing [B, T, H, H]."""
        H, base = self.cfg.n_streams, self.base.get_value()
        base_H, base_post_H, base_HH = base[:H], base[H : 2 * H], base[2 * H :].reshape(H, H)
        pre_scale, post_scale, mix_scale = self.scale.get_value()
        if not self.cfg.constrained:
            raw_BTHO = jnp.tanh(_mapped(x_BTHD, self.map, "BTHD,DO->BTHO", self.eps, ctx))
            pre_BTH, post_BTH = pre_scale * raw_BTHO[..., 0] + base_H, post_scale * raw_BTHO[..., 1] + base_post_H
            return pre_BTH, post_BTH, mix_scale * raw_BTHO[..., 2:] + base_HH
        raw_BTO = _mapped(_flat(x_BTHD), self.map, "BTX,XO->BTO", self.eps, ctx)
        pre_BTH, post_BTH, mix_BTO = jnp.split(raw_BTO, (H, 2 * H), axis=-1)
        mix_BTHH = mix_scale * mix_BTO.reshape(*mix_BTO.shape[:2], H, H) + base_HH
        return (
            jax.nn.sigmoid(pre_scale * pre_BTH + base_H) + self.cfg.eps,
            2 * jax.nn.sigmoid(post_scale * post_BTH + base_post_H),
            doubly_stochastic(jax.nn.softmax(mix_BTHH) + self.cfg.eps, self.cfg),
        )


class Collapse(nnx.Module):
    """Streams [B, T, H, D] to the one [B, T, D] that the final norm reads: a weighted sum, its weights made as those of
    reading are (V4); without the constraint their sum, and no parameters (2409.19606 §2)."""

    def __init__(self, cfg: ModelConfig):
        self.cfg, self.eps = cfg.residual, cfg.norm_eps
        if not self.cfg.constrained:
            self.map = self.base = self.scale = None
            return
        H = self.cfg.n_streams
        self.map = param(jnp.float32, (H * cfg.dim, H), ("embed", None), inputs=1)
        self.base, self.scale = _vector(jnp.zeros(H)), _vector(jnp.full(1, SCALE))

    def __call__(self, x_BTHD: jax.Array, ctx: Context) -> jax.Array:
        x32_BTHD = x_BTHD.astype(jnp.float32)
        if self.map is None:
            return x32_BTHD.sum(2).astype(x_BTHD.dtype)
        raw_BTH = _mapped(_flat(x_BTHD), self.map, "BTX,XO->BTO", self.eps, ctx)
        pre_BTH = jax.nn.sigmoid(self.scale.get_value() * raw_BTH + self.base.get_value()) + self.cfg.eps
        return jnp.einsum("BTH,BTHD->BTD", pre_BTH, x32_BTHD, precision=HIGHEST).astype(x_BTHD.dtype)


def spread(x_BTD: jax.Array, cfg: ModelConfig, ctx: Context) -> jax.Array:
    """What the first layer reads: the embeddings, of several streams a copy for each."""
    if cfg.residual is None:
        return x_BTD
    x_BTHD = jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], *cfg.stream_shape))
    return ctx.ops.constrain(x_BTHD, (BATCH, SEQUENCE, None, None))


def doubly_stochastic(mix: jax.Array, cfg: HyperConnections) -> jax.Array:
    """Positive matrices [..., H, H] whose columns, and in the end rows, add up to 1 (Sinkhorn and Knopp 1967).

    Columns come first and last, as in V4's code; mHC's equation (9) begins with rows.
    """

    def over(mix, axis: int):
        return mix / (mix.sum(axis, keepdims=True) + cfg.eps)

    # Tokens stand last meanwhile: of sums over a few numbers, many are taken at once.
    mix = over(jnp.moveaxis(mix, (-2, -1), (0, 1)), 0)
    mix = jax.lax.fori_loop(0, cfg.sinkhorn_steps - 1, lambda _, mix: over(over(mix, 1), 0), mix)
    return jnp.moveaxis(mix, (0, 1), (-2, -1))


def _mapped(x: jax.Array, weight, equation: str, eps: float, ctx: Context) -> jax.Array:
    """float32: the map of x, whose last axis first gets a root mean square of 1."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return linear(equation, x32, weight, ctx, precision=HIGHEST)


def _flat(x_BTHD: jax.Array) -> jax.Array:
    return x_BTHD.reshape(*x_BTHD.shape[:2], -1)


def _vector(value: jax.Array) -> nnx.Param:
    return nnx.Param(value.astype(jnp.float32), **declared((None,), 0, decay=False))
