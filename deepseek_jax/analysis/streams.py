"""How far the mixing of residual streams amplifies, over one sublayer and over many (mHC 2512.24880, figures 3 and 7).

Suffixes: S sublayers, two of them a layer, L layers, B batch, T tokens, H streams, D width; in [H, H] the first axis is
the stream that is read, the second the one that is written.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.model.block import Block
from deepseek_jax.model.residual import spread
from deepseek_jax.model.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Gains:
    """The paper's Amax gain magnitudes, means over tokens: of each sublayer's matrix, and of the product of it and all
    that follow. ``forward``: the largest sum of absolute weights of what is written to a stream; ``backward``: of what
    is read from one."""

    single_forward_S: np.ndarray
    single_backward_S: np.ndarray
    forward_S: np.ndarray
    backward_S: np.ndarray

    @property
    def largest(self) -> float:
        """Of all products, in either direction."""
        return float(max(self.forward_S.max(), self.backward_S.max()))


def stream_gains(model: Transformer, tokens_BT: jax.Array, ctx: Context = DEFAULT) -> Gains:
    """The gains of a model with several streams on int32 tokens [B, T].

    Raises ValueError for a model with one stream.
    """
    mix_SBTHH = mixing(model, tokens_BT, ctx)
    return Gains(*(np.asarray(gain_S, np.float64) for gain_S in _gains(mix_SBTHH)))


@partial(jax.jit, static_argnames=("ctx",))
def mixing(model: Transformer, tokens_BT: jax.Array, ctx: Context = DEFAULT) -> jax.Array:
    """float32 [S, B, T, H, H]: the matrices by which streams mix in each sublayer.

    Raises ValueError for a model with one stream.
    """
    if model.cfg.residual is None:
        raise ValueError(f"{model.cfg.name} has one residual stream, which mixes with no other.")
    seen = model(tokens_BT, logits="none", capture=("block", "attn"), ctx=ctx).captured
    first_BTD = ctx.ops.lookup(model.embed, tokens_BT, model.compute_dtype(ctx))
    read_LBTHD = jnp.concatenate([spread(first_BTD, model.cfg, ctx)[None], seen["block"][:-1]])

    def of_layer(block: Block, x_BTHD: jax.Array, attn_BTD: jax.Array) -> jax.Array:
        _, back = block.attn_streams.read(x_BTHD, ctx)
        between_BTHD = block.attn_streams.write(x_BTHD, attn_BTD, back, ctx)
        return jnp.stack([back[1], block.ffn_streams.weights(between_BTHD, ctx)[2]])

    found = {}
    for stack, kind in zip(model.stacks, model.cfg.stacks, strict=True):
        numbers = np.asarray(kind.numbers)
        of_stack = jax.vmap(of_layer)(stack, read_LBTHD[numbers], seen["attn"][numbers])
        found |= dict(zip(kind.numbers, of_stack, strict=True))
    return jnp.concatenate([found[number] for number in sorted(found)])


@jax.jit
def _gains(mix_SBTHH: jax.Array) -> tuple[jax.Array, ...]:
    def sizes(mix: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Forward and backward, means over tokens."""
        return tuple(jnp.abs(mix).sum(axis).max(-1).mean((-1, -2)) for axis in (-2, -1))

    def behind(product, mix):
        product = jnp.einsum("BTIJ,BTJK->BTIK", mix, product, precision=jax.lax.Precision.HIGHEST)
        return product, sizes(product)

    nothing = jnp.broadcast_to(jnp.eye(mix_SBTHH.shape[-1]), mix_SBTHH.shape[1:])
    _, composite = jax.lax.scan(behind, nothing, mix_SBTHH, reverse=True)
    return *sizes(mix_SBTHH), *composite
