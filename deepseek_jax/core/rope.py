"""Rotary position embedding and YaRN. Tables are float32 always.

Suffixes: B batch, T tokens, F rotary frequencies (half the rotary dimensions).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.configs.schema import Llama3, Rope, Yarn


def yarn_mscale(factor: float, mscale: float) -> float:
    """``0.1 * mscale * ln(factor) + 1`` (YaRN §3.4; 1.3689 for V3: factor 40, mscale 1)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(head_dim: int, rope: Rope) -> float:
    """``head_dim**-0.5``, times ``mscale(mscale_all_dim)**2`` under YaRN, at any length (0.135234 for V3)."""
    scale = head_dim**-0.5
    if rope.yarn is not None and rope.yarn.mscale_all_dim:
        scale *= yarn_mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def yarn_range(dim: int, theta: float, yarn: Yarn) -> tuple[int, int]:
    """The frequencies between which YaRN blends: floor and ceil, clipped; (10, 23) for V3."""

    def index(rotations: float) -> float:
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(index(yarn.beta_fast)), 0), min(math.ceil(index(yarn.beta_slow)), dim - 1)


def inverse_frequencies(dim: int, rope: Rope) -> np.ndarray:
    """float32 [dim / 2] radians a token. Where it is extended, slow pairs are divided by the factor, fast ones kept."""
    # Rounded to float32 at the steps where the reference rounds: at position 100,000 one unit in the last
    # place of a frequency is visible.
    pairs = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    periods = np.power(rope.theta, pairs.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / periods
    if rope.llama3 is not None:
        return _llama3(frequencies, rope.llama3)
    if rope.yarn is None:
        return frequencies
    low, high = yarn_range(dim, rope.theta, rope.yarn)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 0.001))
    keep = np.float32(1) - np.clip(ramp, 0, 1)
    interpolated = np.float32(1) / (np.float32(rope.yarn.factor) * periods)
    return interpolated * (1 - keep) + frequencies * keep


def _llama3(frequencies: np.ndarray, cfg: Llama3) -> np.ndarray:
    """Pairs by the turns that they make in the original context: few, and the frequency is divided; many, and it stays;
    blended between (float32, rounded where the reference rounds)."""
    periods = np.float32(2 * math.pi) / frequencies
    slow = periods > np.float32(cfg.original_length / cfg.low_turns)
    fast = periods < np.float32(cfg.original_length / cfg.high_turns)
    keep = np.float32(cfg.original_length) / periods - np.float32(cfg.low_turns)
    keep = keep / np.float32(cfg.high_turns - cfg.low_turns)
    divided = frequencies / np.float32(cfg.factor)
    blended = (1 - keep) * frequencies / np.float32(cfg.factor) + keep * frequencies
    return np.where(slow, divided, np.where(fast, frequencies, blended))


def rope_tables(positions_BT: jax.Array, dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, F], for integer positions [B, T]."""
    angle_BTF = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(dim, rope)
    amplitude = 1.0
    if rope.yarn is not None and rope.yarn.mscale and rope.yarn.mscale_all_dim:
        yarn = rope.yarn
        amplitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    elif rope.yarn is not None:
        amplitude = yarn_mscale(rope.yarn.factor, 1.0)
    return jnp.cos(angle_BTF) * amplitude, jnp.sin(angle_BTF) * amplitude


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates x [..., 2F] by tables that broadcast against [..., F]; the result is laid out as x is.

    Interleaved input pairs (0, 1), (2, 3), ...; otherwise i is paired with F + i.
    """
    x32 = x.astype(jnp.float32)
    if not interleaved:
        a, b = jnp.split(x32, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (cos, sin))
    partner = jax.lax.platform_dependent(x, cpu=_turned_pairs, default=_permuted)
    return (x32 * cos + partner * sin).astype(x.dtype)


def _turned_pairs(x: jax.Array) -> jax.Array:
    """float32 (-x1, x0, -x3, x2, ...): on a CPU a part of the loop that multiplies by it."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    return (pairs[..., ::-1] * jnp.array([-1.0, 1.0])).reshape(x.shape)


def _permuted(x: jax.Array) -> jax.Array:
    """`_turned_pairs` as a product with a signed permutation, which is exact: pairs as an axis of two, or shifts by
    one, cost an accelerator several passes over the array."""
    size = x.shape[-1]
    swap, even = np.zeros((size, size), np.float32), np.arange(0, size, 2)
    swap[even + 1, even], swap[even, even + 1] = -1, 1
    return jnp.matmul(
        x, jnp.asarray(swap, x.dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
