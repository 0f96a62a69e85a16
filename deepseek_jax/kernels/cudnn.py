"""Causal attention by cuDNN's kernels on NVIDIA Hopper, through `jax.nn.dot_product_attention`.

A block of queries meets the keys of its own and earlier blocks only, with a running softmax in float32, so that neither
scores nor a mask are in memory. `model.attention.attend` decides where it applies. Lowered in the tests, with JAX's own
form in its place checked against ours; not yet run on a card.

Suffixes: B batch, T tokens, N query heads, G key heads, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.hopper import DTYPES
from deepseek_jax.kernels.platform import require_hopper

# JAX's limits of cuDNN on Hopper: of a key's numbers, and what divides them.
MOST_KEY_DIM, MULTIPLE = 256, 8


def causal_attention(q_BTNK, k_BTGK, v_BTGV, scale: float) -> jax.Array:
    """[B, T, N, V]: causal attention over whole rows; N query heads share G key heads.

    JAX's function takes values as wide as keys: narrower ones get zeros behind them, whose products are left out of the
    result (at V3's 192 and 128 a fifth more multiplications). What the backward pass needs of the forward one has no
    name in JAX, so that `Context.remat` keeps nothing of it. Raises ValueError where the devices are not Hopper
    GPUs.
    """
    require_hopper('Context(attention="hopper")')
    K, V = k_BTGK.shape[-1], v_BTGV.shape[-1]
    v_BTGK = jnp.pad(v_BTGV, ((0, 0), (0, 0), (0, 0), (0, K - V)))
    attend = jax.nn.dot_product_attention
    return attend(q_BTNK, k_BTGK, v_BTGK, scale=scale, is_causal=True, implementation="cudnn")[..., :V]


def refusal(q_BTNK, v_BTGV) -> str:
    """Why these arrays cannot run so; empty if they can."""
    K, V = q_BTNK.shape[-1], v_BTGV.shape[-1]
    if q_BTNK.dtype not in DTYPES:
        return f"it takes bfloat16 or float16, not {q_BTNK.dtype}"
    if K > MOST_KEY_DIM or K % MULTIPLE:
        return f"it takes keys of a multiple of {MULTIPLE} numbers up to {MOST_KEY_DIM}, not {K}"
    return f"it takes values no wider than keys, not {V} beside {K}" if V > K else ""
