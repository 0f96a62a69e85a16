"""The absorbed attention of a step of decoding on NVIDIA Hopper, as a Pallas kernel (Mosaic GPU).

MLA's absorbed form has one key for all heads, whose first numbers are the value (V2 §2.1.2): 576 numbers and 512 in V3.
A block of keys is read once for the scores of 64 heads and for their values, with a running softmax in float32,
straight from the cache of all layers; the plain form reads it twice, and every slot whether it is filled or not. A
row's keys are split between processors, whose results are put together after (flash-decoding). Interpreted and lowered
in the tests; it has not run on a card yet.

Suffixes: L layers, B rows, S slots, N heads, K key dim, V value dim, P parts of a row's keys, H parts of the values, U
heads of a tile.
"""

from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.hopper import DTYPES, PROCESSORS, WIDTH
from deepseek_jax.kernels.platform import require_hopper

WHAT = 'Context(attention="hopper")'
# A tile has so many heads, as rows of a warpgroup's product, and so many keys.
HEADS, KEYS = 64, 64
# The values that a warpgroup's registers hold sums of, beside the scores.
VALUES = 256
# With two blocks of keys on their way and the queries, what shared memory holds.
MOST_KEY_DIM = 576
UNSEEN = -1e30


def absorbed_attention(q_BNK, k_LBSK, layer, visible_BS, scale: float, value_dim: int) -> jax.Array:
    """[B, N, V] in q's dtype: one query a row and head over the keys of ``layer`` that are visible (bool [B, S]), whose
    first ``value_dim`` numbers are the values; zero where none is. Keys behind a row's last visible one are not read.

    Probabilities are rounded to q's dtype where they meet values, as in the plain form. Raises ValueError where the
    devices are not Hopper GPUs, and for what `_check` says.
    """
    _check(q_BNK, k_LBSK, value_dim)
    B, N, _ = q_BNK.shape
    S = k_LBSK.shape[2]
    last_B = jnp.max(jnp.where(visible_BS, jnp.arange(S) + 1, 0), axis=-1)
    block_B = -(-last_B // KEYS).astype(jnp.int32)
    q_BNK = jnp.pad(q_BNK, ((0, 0), (0, -N % HEADS), (0, 0)))
    tiles = B * (q_BNK.shape[1] // HEADS) * -(-value_dim // VALUES)
    parts = min(max(PROCESSORS // tiles, 1), S // KEYS)
    share = jnp.maximum(-(-jnp.max(block_B) // parts), 1)
    numbers = jnp.stack([jnp.asarray(layer, jnp.int32), share])
    mask_BS = jnp.where(visible_BS, 0.0, UNSEEN)
    o_PBNV, top_PBN, total_PBN = _parts(numbers, q_BNK, k_LBSK, mask_BS, block_B, scale, value_dim, parts)
    weight_PBN = jnp.exp(top_PBN - top_PBN.max(0))
    total_BN = (weight_PBN * total_PBN).sum(0)
    o_BNV = (weight_PBN[..., None] * o_PBNV).sum(0) / jnp.where(total_BN > 0, total_BN, 1.0)[..., None]
    return o_BNV[:, :N].astype(q_BNK.dtype)


def _parts(numbers, q_BNK, k_LBSK, mask_BS, block_B, scale: float, V: int, parts: int):
    """Of every part of a row's keys: the sum of values, not yet divided, the largest score and the sum of exponentials.

    ``numbers``: the layer, and how many blocks of keys a part has. All float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, N, K = q_BNK.shape
    values = min(V, VALUES)

    def body(numbers_ref, q_ref, k_ref, mask_ref, block_ref, o_ref, top_ref, total_ref, q_UK, arrived):
        b, n, p, h = (jax.lax.axis_index(name) for name in ("row", "heads", "part", "values"))
        heads = pl.ds(n * HEADS, HEADS)
        plgpu.copy_gmem_to_smem(q_ref.at[b, heads], q_UK, arrived)
        plgpu.barrier_wait(arrived)
        first = p * numbers_ref[1]

        def add(_, k_SK, mask_S, carry):
            o_UV, top_U, total_U = carry

            def scores(s_US):
                plgpu.wgmma(s_US, q_UK, k_SK.transpose((1, 0)))
                return s_US[...]

            s_US = pl.run_scoped(scores, plgpu.ACC((HEADS, KEYS))) * scale
            s_US += jax.lax.broadcast_in_dim(mask_S[...], (HEADS, KEYS), (1,))
            new_top_U = jnp.maximum(top_U, s_US.max(1))
            kept_U = jnp.exp(top_U - new_top_U)
            p_US = jnp.exp(s_US - _along(new_top_U, KEYS))
            v_SV = k_SK.at[:, pl.ds(pl.multiple_of(h * values, values), values)]
            o_UV = _sum(o_UV * _along(kept_U, values), p_US.astype(k_SK.dtype), v_SV)
            return o_UV, new_top_U, total_U * kept_U + p_US.sum(1)

        empty = jnp.zeros((HEADS, values)), jnp.full((HEADS,), UNSEEN), jnp.zeros((HEADS,))
        o_UV, top_U, total_U = plgpu.emit_pipeline(
            add,
            grid=(jnp.clip(block_ref[b] - first, 0, numbers_ref[1]),),
            in_specs=[
                plgpu.BlockSpec((KEYS, K), lambda i: (first + i, 0)),
                plgpu.BlockSpec((KEYS,), lambda i: (first + i,)),
            ],
            max_concurrent_steps=2,
            init_carry=empty,
        )(k_ref.at[numbers_ref[0], b], mask_ref.at[b])

        @partial(pl.run_scoped, out=plgpu.SMEM((HEADS, values), jnp.float32))
        def store(out):
            out[...] = o_UV
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, o_ref.at[p, b, heads, pl.ds(h * values, values)])
            plgpu.wait_smem_to_gmem(0)

        # The same of every part of the values.
        top_ref[p, h, b, heads] = top_U
        total_ref[p, h, b, heads] = total_U

    sums = jax.ShapeDtypeStruct((parts, V // values, B, N), jnp.float32)
    run = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((parts, B, N, V), jnp.float32), sums, sums),
        scratch_types=[plgpu.SMEM((HEADS, K), q_BNK.dtype), plgpu.Barrier()],
        grid=(B, N // HEADS, parts, V // values),
        grid_names=("row", "heads", "part", "values"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    o_PBNV, top_PHBN, total_PHBN = run(numbers, q_BNK, k_LBSK, mask_BS, block_B)
    return o_PBNV, top_PHBN[:, 0], total_PHBN[:, 0]


def _sum(o_UV, p_US, v_SV):
    """``o + p v``, with o in registers before and after."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl.run_state(lambda sum_UV: plgpu.wgmma(sum_UV, p_US, v_SV))(plgpu.ACC.init(o_UV))


def _along(a_U, size: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(a_U, (HEADS, size), (0,))


def _check(q_BNK, k_LBSK, V: int) -> None:
    """Raises ValueError for dtypes other than bfloat16 and float16, and for dims and slots that make no whole tiles."""
    require_hopper(WHAT)
    S, K = k_LBSK.shape[2:]
    if q_BNK.dtype not in DTYPES or k_LBSK.dtype != q_BNK.dtype:
        raise ValueError(
            f"{WHAT}: it takes queries and a cache of bfloat16 or of float16, not {q_BNK.dtype} and {k_LBSK.dtype}; "
            'give Context(dtype=jnp.bfloat16) to init_cache and the call, or choose "auto".'
        )
    if K % WIDTH or V % WIDTH or K > MOST_KEY_DIM or (V > VALUES and V % VALUES):
        raise ValueError(
            f"{WHAT}: it takes keys of a multiple of {WIDTH} numbers up to {MOST_KEY_DIM}, and values of a multiple of "
            f'{WIDTH} up to {VALUES} or of {VALUES}, not {K} and {V}; choose "auto".'
        )
    if S % KEYS:
        raise ValueError(
            f"{WHAT}: it reads blocks of {KEYS} slots, and this cache has {S} a row; make it with "
            f'init_cache(..., ctx=ctx), which rounds them up, or choose "auto".'
        )
