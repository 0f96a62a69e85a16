"""Causal attention as a Pallas kernel for TPU: JAX's splash attention.

A block of queries meets the keys of its own and earlier blocks only, with a running softmax in float32, so that no
scores are in memory. `model.attention.attend` decides where it applies.

Suffixes: B batch, T tokens, N query heads, G key heads, K key dim, V value dim.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.platform import one_pass

# Rows are cut into blocks of a multiple of this many tokens, a vector register's lanes.
LANES = 128
# Tokens of a block of queries or keys, and the keys that meet a block of queries at once. Larger blocks read keys and
# values less often; smaller ones leave out more of what causality hides. Those of wide keys (the absorbed form's 576)
# would otherwise not fit into the 16 MB of a core's vector memory that a kernel may use.
BLOCK, WIDE_BLOCK, COMPUTE = 1024, 512, 512
WIDE = 256
PARTIAL_GRADIENTS = 4


def causal_attention(
    q_BTNK, k_BTGK, v_BTGV, segment_BT, scale: float, fused: bool, interpret: bool = False
) -> jax.Array:
    """[B, T, N, V]: causal attention within segments, zero where the segment is 0; N query heads share G key heads.

    ``segment_BT``: int32, or None where each row is one segment. T is a multiple of `LANES`, G is N or 1. The scale
    multiplies the queries, which rounds them once more in their dtype. Products take the inputs' dtype and
    accumulate in float32. ``fused``: the backward pass is one kernel, which takes more memory (`_blocks`).
    ``interpret``: run the kernel on any platform, as a slow loop of plain operations.
    """
    return _attend(q_BTNK, k_BTGK, v_BTGV, segment_BT, scale, fused, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BTNK, k_BTGK, v_BTGV, segment_BT, scale: float, fused: bool, interpret: bool) -> jax.Array:
    with one_pass(q_BTNK.dtype):
        return _splash(q_BTNK, k_BTGK, v_BTGV, segment_BT, scale, fused, interpret)


def _forward(q_BTNK, k_BTGK, v_BTGV, segment_BT, scale: float, fused: bool, interpret: bool):
    with one_pass(q_BTNK.dtype):
        return jax.vjp(lambda q, k, v: _splash(q, k, v, segment_BT, scale, fused, interpret), q_BTNK, k_BTGK, v_BTGV)


def _backward(scale: float, fused: bool, interpret: bool, vjp, do_BTNV):
    with one_pass(do_BTNV.dtype):
        return *vjp(do_BTNV), None


_attend.defvjp(_forward, _backward)


def _splash(q_BTNK, k_BTGK, v_BTGV, segment_BT, scale: float, fused: bool, interpret: bool) -> jax.Array:
    # Pallas takes a tenth of a second, which a command on a CPU need not wait for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, G = *q_BTNK.shape[1:3], k_BTGK.shape[2]
    kernel = splash.make_splash_mqa if G == 1 else splash.make_splash_mha
    attend = kernel(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
        block_sizes=splash.BlockSizes(**_blocks(T, q_BTNK.shape[-1], fused)),
        # With its sums, which the backward pass needs and `remat` may keep.
        residual_checkpoint_name="core",
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q_TNK, k_TGK, v_TGV, segment_T):
        q, k, v = (a.swapaxes(0, 1) for a in (q_TNK, k_TGK, v_TGV))
        k, v = (k[0], v[0]) if G == 1 else (k, v)
        o_NTV = attend(q, k, v, None if segment_T is None else splash.SegmentIds(segment_T, segment_T))
        return o_NTV.swapaxes(0, 1)

    q_BTNK = (q_BTNK.astype(jnp.float32) * scale).astype(q_BTNK.dtype)
    o_BTNV = jax.vmap(row, in_axes=(0, 0, 0, None if segment_BT is None else 0))(q_BTNK, k_BTGK, v_BTGV, segment_BT)
    # Padding is a segment of its own to the kernel, whose softmax needs a key for every query.
    return o_BTNV if segment_BT is None else jnp.where(segment_BT[..., None, None] != 0, o_BTNV, 0)


def _blocks(T: int, key_dim: int, fused: bool) -> dict[str, int | bool | None]:
    """Block sizes for rows of T tokens, by their names in splash attention.

    ``fused``: the backward pass is one kernel, which computes the probabilities once and holds a partial gradient of
    the queries for every block of keys; else, and where these would be more than `PARTIAL_GRADIENTS`, it is two
    kernels, which hold none and compute them once each.
    """
    block, compute = math.gcd(T, WIDE_BLOCK if key_dim > WIDE else BLOCK), math.gcd(T, COMPUTE)
    fused = fused and T // block <= PARTIAL_GRADIENTS
    return {
        "block_q": block,
        "block_kv": block,
        "block_kv_compute": compute,
        "block_q_dkv": block,
        "block_kv_dkv": block,
        "block_kv_dkv_compute": compute,
        "block_q_dq": None if fused else block,
        "block_kv_dq": None if fused else block,
        "use_fused_bwd_kernel": fused,
    }
