"""Pallas kernels for TPU behind the functions that have an XLA form: causal attention and the experts' matmul.

Attention is JAX's splash attention: a block of queries meets the keys of its own and earlier blocks only, with a
running softmax in float32, so that no scores are in memory. `model.attention.attend` decides where it applies. The
grouped matmul is JAX's megablox: tiles of rows meet the weights of the groups that they hold rows of, and no others.

Suffixes: B batch, T tokens, N query heads, G key heads, K key dim, V value dim; M rows sorted by group, E groups, D and
Z widths.
"""

import math
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from deepseek_jax.core.axes import activation_sharding
from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH

# Rows are cut into blocks of a multiple of this many tokens, a vector register's lanes.
LANES = 128
# Tokens of a block of queries or keys, and the keys that meet a block of queries at once. Larger blocks read keys and
# values less often; smaller ones leave out more of what causality hides. Those of wide keys (the absorbed form's 576)
# would otherwise not fit into the 16 MB of a core's vector memory that a kernel may use.
BLOCK, WIDE_BLOCK, COMPUTE = 1024, 512, 512
WIDE = 256
PARTIAL_GRADIENTS = 4
# Rows of a tile of the grouped matmul, and bytes of its other dimensions, by the same limit.
TILE_ROWS, TILE_BYTES = 512, 2048


def on_platform(kernel, xla=None, platform: str | None = None):
    """What `kernel(interpret)` gives, for the platform the program is lowered for.

    On TPU it is compiled; elsewhere ``xla`` takes its place, or without ``xla`` the kernel runs interpreted on the
    CPU: for checking it, slowly. Without ``xla`` other platforms cannot lower the program. ``platform``: the only one
    that the program is for, if it is known (`Context.platform`).
    """
    if platform is not None:
        return kernel(platform != "tpu") if xla is None or platform == "tpu" else xla
    if xla is None:
        return lambda *args: jax.lax.platform_dependent(*args, tpu=kernel(False), cpu=kernel(True))
    return lambda *args: jax.lax.platform_dependent(*args, tpu=kernel(False), default=xla)


def one_pass(dtype):
    """The context to multiply arrays of ``dtype`` in, whatever `jax.default_matmul_precision` says.

    TPU kernels have one precision only for operands narrower than float32, whose products are exact in one pass.
    """
    return nullcontext() if dtype == jnp.float32 else jax.default_matmul_precision("default")


def causal_attention(
    q_BTNK, k_BTGK, v_BTGV, segment_BT, scale: float, ctx: Context, interpret: bool = False
) -> jax.Array:
    """[B, T, N, V]: causal attention within segments, zero where the segment is 0; N query heads share G key heads.

    ``segment_BT``: int32, or None where each row is one segment. T is a multiple of `LANES`, G is N or 1. The scale
    multiplies the queries, which rounds them once more in their dtype. Products take the inputs' dtype and
    accumulate in float32. ``interpret``: run the kernel on any platform, as a slow loop of plain operations.

    On a mesh each device takes its own rows and heads; rows are whole.
    """
    # Where activations are even sent to the host, memory is short.
    how = (scale, ctx.remat != "offload", interpret)
    attend = lambda q, k, v, segment: _attend(q, k, v, segment, *how)  # noqa: E731
    if ctx.mesh is None:
        return attend(q_BTNK, k_BTGK, v_BTGV, segment_BT)
    heads = (BATCH, None, "heads", None)
    axes = (heads, *((heads if k_BTGK.shape[2] > 1 else (BATCH, None, None, None)),) * 2, (BATCH, None))
    arrays = [q_BTNK, k_BTGK, v_BTGV, segment_BT]
    specs = [
        PartitionSpec() if a is None else activation_sharding(names, a.shape, ctx).spec
        for names, a in zip(axes, arrays, strict=True)
    ]
    return jax.shard_map(attend, mesh=ctx.mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*arrays)


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
    T, N, G = *q_BTNK.shape[1:3], k_BTGK.shape[2]
    kernel = splash.make_splash_mqa if G == 1 else splash.make_splash_mha
    attend = kernel(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
        block_sizes=_blocks(T, q_BTNK.shape[-1], fused),
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


def _blocks(T: int, key_dim: int, fused: bool) -> splash.BlockSizes:
    """Block sizes for rows of T tokens.

    ``fused``: the backward pass is one kernel, which computes the probabilities once and holds a partial gradient of
    the queries for every block of keys; else, and where these would be more than `PARTIAL_GRADIENTS`, it is two
    kernels, which hold none and compute them once each.
    """
    block, compute = math.gcd(T, WIDE_BLOCK if key_dim > WIDE else BLOCK), math.gcd(T, COMPUTE)
    fused = fused and T // block <= PARTIAL_GRADIENTS
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )


def grouped_matmul(x_MD, w_EDZ, sizes_E, transpose: bool = False, interpret: bool = False) -> jax.Array:
    """[M, Z] in x's dtype: rows of group e times w[e] (or its transpose), accumulated in float32.

    Rows beyond the groups hold anything, NaN included.
    """
    x_pad, tiles = _tiled(x_MD, w_EDZ.shape[1 if transpose else 2])
    with one_pass(x_MD.dtype):
        y_pad = gmm(x_pad, w_EDZ, sizes_E, x_MD.dtype, tiles, transpose_rhs=transpose, interpret=interpret)
    return y_pad[: x_MD.shape[0]]


def grouped_outer(x_MD, y_MZ, sizes_E, dtype, interpret: bool = False) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], accumulated in float32; zero for a group of no rows."""
    x_pad, tiles = _tiled(x_MD, y_MZ.shape[1])
    y_pad, _ = _tiled(y_MZ, 1)
    with one_pass(x_MD.dtype):
        return tgmm(x_pad.T, y_pad, sizes_E, dtype, tiles, interpret=interpret)


def _tiled(x_MD, width: int) -> tuple[jax.Array, tuple[int, int, int]]:
    """The rows, padded to a whole number of tiles, and a tile's rows, inner and outer dimension."""
    rows = min(TILE_ROWS, -(-x_MD.shape[0] // LANES) * LANES)
    largest = TILE_BYTES // x_MD.dtype.itemsize
    x_pad = jnp.pad(x_MD, ((0, -x_MD.shape[0] % rows), (0, 0)))
    return x_pad, (rows, min(largest, x_MD.shape[1]), min(largest, width))
