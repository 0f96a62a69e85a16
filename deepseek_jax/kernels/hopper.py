"""The experts' grouped matmul on NVIDIA Hopper, as Pallas kernels of warpgroup matrix products (Mosaic GPU).

Rows times weights, and times weights transposed, are JAX's own kernel (`jax.experimental.pallas.ops.gpu.
ragged_dot_mgpu`): a tile of rows meets a group's weight once for each group that has rows in it, and stores that
group's rows only. The weight gradient is written here: JAX's own (`transposed_ragged_dot_mgpu`) gives no float32 sums,
multiplies by zero what it masks, so that an infinite row reaches the neighbouring expert, and its test is skipped in
JAX as broken. All three are interpreted and lowered in the tests; none has run on a card yet.

Suffixes: M rows sorted by group, E groups, D and Z widths, R the two ragged ends of every group, a block each.
"""

from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.platform import require_hopper

# Every width is cut into blocks of so many numbers or twice as many. 64 of 16 bits are a row of 128 bytes, as wide as
# the pattern in which shared memory holds the operands.
WIDTH = 64
# Rows of a block of the weight gradient, and numbers that a step adds to a sum.
STEP = 64
# Blocks on their way to shared memory at once: of 32 KB each, with 228 KB to have.
IN_FLIGHT = 4
# Blocks of columns that the processors go through together, while the rows that they share are still near.
COLUMNS = 4
# Processors of an H100 or H200; where there are fewer, what is left over waits.
PROCESSORS = 132
DTYPES = (jnp.bfloat16, jnp.float16)


def grouped_matmul(x_MD, w_EDZ, sizes_E, transpose: bool = False) -> jax.Array:
    """[M, Z] in x's dtype: rows of group e times w[e] (or its transpose), accumulated in float32.

    Rows beyond the groups hold anything, NaN included. Raises ValueError for what `_check` says.
    """
    # Late, as in `attention`.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    (M, D), Z = x_MD.shape, w_EDZ.shape[1 if transpose else 2]
    _check(x_MD.dtype, D, Z)
    rows = 2 * STEP if sizes_E.size <= M // (2 * STEP) else STEP
    y_MZ = ragged_dot(
        jnp.pad(x_MD, ((0, -M % rows), (0, 0))),
        w_EDZ,
        group_sizes=sizes_E.astype(jnp.int32),
        block_m=rows,
        block_n=_block(Z),
        block_k=WIDTH,
        max_concurrent_steps=IN_FLIGHT,
        grid_block_n=COLUMNS,
        transpose_rhs=transpose,
    )
    return y_MZ[:M]


def grouped_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], accumulated in float32; zero for a group of no rows.

    Blocks of `STEP` rows that lie in one group whole are read where they are. The rows before a group's first such
    block and behind its last, fewer than a block each, are brought together apart, with zeros in the places of other
    groups' rows: the kernel then masks nothing, and never reads what stands beyond the groups. Raises ValueError for
    what `_check` says.
    """
    (M, D), Z = x_MD.shape, y_MZ.shape[1]
    _check(x_MD.dtype, D, Z)
    x_MD, y_MZ = (jnp.pad(a, ((0, -M % STEP), (0, 0))) for a in (x_MD, y_MZ))
    first_E, count_E, row_R, inside_R = _blocks_and_ends(sizes_E.astype(jnp.int32))
    x_RD, y_RZ = (jnp.where(inside_R[:, None], jnp.take(a, row_R, axis=0, mode="clip"), 0) for a in (x_MD, y_MZ))
    return _sums(first_E, count_E, x_RD, y_RZ, x_MD, y_MZ, dtype)


def _blocks_and_ends(sizes_E):
    """Every group's first whole block and their number; and the rows of its two ends [E * 2 * STEP], and which of them
    are its own."""
    end_E = jnp.cumsum(sizes_E)
    start_E = end_E - sizes_E
    first_E, last_E = -(-start_E // STEP), end_E // STEP
    head_E = jnp.minimum(first_E * STEP, end_E)
    tail_E = jnp.maximum(last_E * STEP, head_E)
    begin_E2, stop_E2 = jnp.stack([start_E, tail_E], axis=1), jnp.stack([head_E, end_E], axis=1)
    row_R = begin_E2[..., None] + jnp.arange(STEP)
    return first_E, jnp.maximum(last_E - first_E, 0), row_R.reshape(-1), (row_R < stop_E2[..., None]).reshape(-1)


def _sums(first_E, count_E, x_RD, y_RZ, x_MD, y_MZ, dtype) -> jax.Array:
    """[E, D, Z] in ``dtype``: each group's products of its two ends and of its whole blocks."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    E, D, Z = first_E.size, x_MD.shape[1], y_MZ.shape[1]
    block_D, block_Z = _block(D), _block(Z)

    def body(first_ref, count_ref, x_ends, y_ends, x_rows, y_rows, sums):
        @plgpu.nd_loop((E, D // block_D, Z // block_Z), collective_axes="processor")
        def tile(loop):
            e, d, z = loop.index

            def add(sum_ref, first, count, x_ref, y_ref):
                plgpu.emit_pipeline(
                    lambda _, x, y: plgpu.wgmma(sum_ref, x.transpose((1, 0)), y),
                    grid=(count,),
                    in_specs=[
                        plgpu.BlockSpec((STEP, block_D), lambda i: (first + i, d), delay_release=1),
                        plgpu.BlockSpec((STEP, block_Z), lambda i: (first + i, z), delay_release=1),
                    ],
                    max_concurrent_steps=IN_FLIGHT,
                )(x_ref, y_ref)

            def total(sum_ref):
                add(sum_ref, 2 * e, 2, x_ends, y_ends)
                # The products are asynchronous, and the next blocks come to where these ones are read.
                plgpu.wgmma_wait(0)
                add(sum_ref, first_ref[e], count_ref[e], x_rows, y_rows)
                return sum_ref[...]

            sum_DZ = pl.run_scoped(total, plgpu.ACC((block_D, block_Z)))

            @partial(pl.run_scoped, out_ref=plgpu.SMEM((block_D, block_Z), dtype=dtype))
            def store(out_ref):
                out_ref[...] = sum_DZ.astype(dtype)
                plgpu.commit_smem()
                here = sums.at[e, pl.ds(d * block_D, block_D), pl.ds(z * block_Z, block_Z)]
                plgpu.copy_smem_to_gmem(out_ref, here)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((E, D, Z), dtype),
        grid=(PROCESSORS,),
        grid_names=("processor",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return run(first_E, count_E, x_RD, y_RZ, x_MD, y_MZ)


def _block(width: int) -> int:
    return 2 * WIDTH if width % (2 * WIDTH) == 0 else WIDTH


def _check(dtype, *widths: int) -> None:
    """Raises ValueError for a machine without these processors, for another dtype than bfloat16 and float16 (float32
    would be rounded to 10 bits), and for widths that are no multiples of `WIDTH`."""
    require_hopper('Context(experts="hopper")')
    if dtype not in DTYPES:
        raise ValueError(
            f'Context(experts="hopper"): it multiplies bfloat16 or float16, not {dtype}; give '
            'Context(dtype=jnp.bfloat16), or choose "auto".'
        )
    if any(width % WIDTH for width in widths):
        raise ValueError(
            f'Context(experts="hopper"): its blocks are {WIDTH} wide, and an expert maps {widths[0]} numbers to '
            f'{widths[1]}; choose "auto".'
        )
