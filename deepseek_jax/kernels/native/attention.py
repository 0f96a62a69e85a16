"""Attention (`attention.cc`, `attention_gradients.cc`): keeps a tile of keys and its scores in a core's cache, and
reads no keys that no query sees.

Suffixes: B batch, T queries, S keys, N heads, G key heads, K key dim, V value dim.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.kernels.native.library import call, check, fit

ATTENTION = 'Context(attention="native")'


def attention(q_BTNK, k_BSGK, v_BSGV, places: Sequence[jax.Array], scale: float) -> jax.Array:
    """float32 [B, T, N, V]: softmax attention of queries over keys that N / G heads share, of float32 or bfloat16.

    ``places``: int32, the positions and segments [B, T] of the queries, and those [B, S] of the keys. A query sees the
    keys of its own segment at its own and earlier positions; one of segment 0 sees none, and is zero. Has a gradient,
    which computes the probabilities again; a row's key head is one thread's there.

    Raises ValueError for other dtypes, shapes that do not fit, where the platform is no CPU, or nothing can be built.
    """
    check(ATTENTION, q_BTNK, k_BSGK, v_BSGV)
    fit(q=("BTNK", q_BTNK), k=("BSGK", k_BSGK), v=("BSGV", v_BSGV), **_placed(places))
    if q_BTNK.shape[2] % k_BSGK.shape[2]:
        raise ValueError(f"{k_BSGK.shape[2]} heads of keys do not serve {q_BTNK.shape[2]} of queries alike.")
    return _attention(q_BTNK, k_BSGK, v_BSGV, tuple(a.astype(jnp.int32) for a in places), scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_BTNK, k_BSGK, v_BSGV, places, scale: float) -> jax.Array:
    return _attention_forward(q_BTNK, k_BSGK, v_BSGV, places, scale)[0]


def _attention_forward(q_BTNK, k_BSGK, v_BSGV, places, scale: float):
    o = jax.ShapeDtypeStruct((*q_BTNK.shape[:3], v_BSGV.shape[-1]), jnp.float32)
    logs = jax.ShapeDtypeStruct(q_BTNK.shape[:3], jnp.float32)
    run = call("Attend", (o, logs), k_BSGK)
    found = run(q_BTNK.astype(jnp.float32), k_BSGK, v_BSGV, *places, scale=np.float32(scale))
    # With its sums, which the backward pass needs and `remat` may keep.
    o_BTNV, logs_BTN = (checkpoint_name(a, "core") for a in found)
    return o_BTNV, (q_BTNK, k_BSGK, v_BSGV, places, o_BTNV, logs_BTN)


def _attention_backward(scale: float, kept, do_BTNV):
    q_BTNK, k_BSGK, v_BSGV, places, o_BTNV, logs_BTN = kept
    operands = (q_BTNK, k_BSGK, v_BSGV)
    run = call("AttendGradients", [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands], k_BSGK)
    sums = (o_BTNV, logs_BTN, do_BTNV)
    gradients = run(q_BTNK.astype(jnp.float32), k_BSGK, v_BSGV, *places, *sums, scale=np.float32(scale))
    return *(g.astype(a.dtype) for g, a in zip(gradients, operands, strict=True)), None


_attention.defvjp(_attention_forward, _attention_backward)


def latent_attention(q_BTNK, k_LBSK, layer, V: int, places: Sequence[jax.Array], scale: float) -> jax.Array:
    """`attention` over a cache's ``layer``, of keys that all heads share and whose first ``V`` numbers are the values,
    without a gradient.

    Of the whole cache: XLA copies a part of it before it hands it on.
    """
    check(ATTENTION, q_BTNK, k_LBSK)
    fit(q=("BTNK", q_BTNK), k=("LBSK", k_LBSK), **_placed(places))
    if k_LBSK.shape[3] < V:
        raise ValueError(f"values of {V} numbers are no part of keys of {k_LBSK.shape[3]}.")
    out = jax.ShapeDtypeStruct((*q_BTNK.shape[:3], V), jnp.float32)
    run = call("AttendLatents", out, k_LBSK)
    places = (a.astype(jnp.int32) for a in places)
    return run(q_BTNK.astype(jnp.float32), k_LBSK, jnp.asarray(layer, jnp.int32), *places, scale=np.float32(scale))


def _placed(places: Sequence[jax.Array]) -> dict[str, tuple[str, jax.Array]]:
    names = ("positions", "segments", "positions of keys", "segments of keys")
    return {name: (axes, place) for name, axes, place in zip(names, ("BT", "BT", "BS", "BS"), places, strict=True)}
