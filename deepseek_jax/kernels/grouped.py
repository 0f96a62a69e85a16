"""Grouped matmul: rows sorted by group, each times its group's weight. Five forms agree: block-wise (CPU and GPU),
`jax.lax.ragged_dot` (for TPU, where the compiler has a kernel; elsewhere it multiplies all rows by all groups), Pallas
kernels for TPU and for NVIDIA Hopper, and a compiled library for CPUs.

Suffixes: M rows sorted by group, E groups, D and Z widths (Z may be several axes of a weight).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.bits import Bits
from deepseek_jax.core.lowrank import dense
from deepseek_jax.core.quant import Quantized
from deepseek_jax.kernels import hopper, megablox
from deepseek_jax.kernels.native import experts as native_experts
from deepseek_jax.kernels.native import grouped as native
from deepseek_jax.kernels.platform import on_platform, one_pass

# Fewest and most rows of a block. On a CPU, what a block has beyond its group's rows costs as much as they do; on a GPU
# a block is a product of its own, which has to be long enough.
CPU_BLOCK_ROWS = (2, 128)
GPU_BLOCK_ROWS = (8, 1024)
# So many rows multiply a quantised matrix in no more time than it takes to read it.
FEW_ROWS = 256
# Of a quantised matrix, the rows that are rebuilt at once.
SLAB = 512


def grouped_matmul(x_MD, w_EDZ, sizes_E, form: str, transpose: bool = False) -> jax.Array:
    """[M, Z]: rows of group e times w[e] (or its transpose). Rows beyond the groups are arbitrary, even not finite.

    ``form``: "blocks", "ragged", "kernel", "hopper", "native", or "auto" for the one that suits the platform that the
    program is lowered for.
    """
    if form == "auto":
        return jax.lax.platform_dependent(
            tpu=lambda: ragged_matmul(x_MD, w_EDZ, sizes_E, transpose),
            cpu=lambda: blocks_matmul(x_MD, w_EDZ, sizes_E, transpose),
            default=lambda: blocks_matmul(x_MD, w_EDZ, sizes_E, transpose, GPU_BLOCK_ROWS),
        )
    forms = {"blocks": blocks_matmul, "ragged": ragged_matmul, "kernel": kernel_matmul}
    forms |= {"hopper": hopper_matmul, "native": native_matmul}
    return forms[form](x_MD, w_EDZ, sizes_E, transpose)


def grouped_outer(x_MD, y_MZ, sizes_E, form: str, dtype=jnp.float32) -> jax.Array:
    """[E, D, Z] in ``dtype``: x[rows of e].T @ y[rows of e], accumulated in float32."""
    if form == "auto":
        return jax.lax.platform_dependent(
            tpu=lambda: ragged_outer(x_MD, y_MZ, sizes_E, dtype),
            cpu=lambda: blocks_outer(x_MD, y_MZ, sizes_E, dtype),
            default=lambda: blocks_outer(x_MD, y_MZ, sizes_E, dtype, GPU_BLOCK_ROWS),
        )
    forms = {"blocks": blocks_outer, "ragged": ragged_outer, "kernel": kernel_outer}
    forms |= {"hopper": hopper.grouped_outer, "native": native.grouped_outer}
    return forms[form](x_MD, y_MZ, sizes_E, dtype)


def ragged_matmul(x_MD, w_EDZ, sizes_E, transpose: bool) -> jax.Array:
    if isinstance(w_EDZ, Quantized) and x_MD.shape[0] <= FEW_ROWS and not transpose:
        return few_rows_matmul(x_MD, w_EDZ, sizes_E)
    w_EDZ = _fused(w_EDZ, x_MD.dtype)
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose else 1,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(0,),
    )
    # Asked for in x's dtype: accelerators accumulate in float32 all the same, and a float32 result would be an array.
    with one_pass(x_MD.dtype):
        return jax.lax.ragged_dot_general(x_MD, w_EDZ, sizes_E, dims, preferred_element_type=x_MD.dtype)


def ragged_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
    )
    with one_pass(x_MD.dtype):
        return jax.lax.ragged_dot_general(x_MD, y_MZ, sizes_E, dims, preferred_element_type=dtype)


def kernel_matmul(x_MD, w_EDZ, sizes_E, transpose: bool) -> jax.Array:
    run = lambda interpret: partial(megablox.grouped_matmul, transpose=transpose, interpret=interpret)  # noqa: E731
    return on_platform(run)(x_MD, _fused(w_EDZ, x_MD.dtype), sizes_E)


def kernel_outer(x_MD, y_MZ, sizes_E, dtype) -> jax.Array:
    run = lambda interpret: partial(megablox.grouped_outer, dtype=dtype, interpret=interpret)  # noqa: E731
    return on_platform(run)(x_MD, y_MZ, sizes_E)


def hopper_matmul(x_MD, w_EDZ, sizes_E, transpose: bool) -> jax.Array:
    return hopper.grouped_matmul(x_MD, _fused(w_EDZ, x_MD.dtype), sizes_E, transpose)


def native_matmul(x_MD, w_EDZ, sizes_E, transpose: bool) -> jax.Array:
    return native.grouped_matmul(x_MD, _as_it_lies(w_EDZ, x_MD.dtype), sizes_E, transpose)


def native_routed(x_ND, index_NK, weight_NK, gate_up, down, limit: float | None) -> jax.Array:
    """`native.experts.routed` of experts' weights as `grouped_matmul` takes them, both held alike."""
    gate_up, down = (_as_it_lies(w, x_ND.dtype) for w in (gate_up, down))
    return native_experts.routed(x_ND, index_NK, weight_NK, gate_up, down, limit)


def _as_it_lies(w_EDZ, dtype) -> jax.Array | Bits:
    """`_fused`, but for bfloat16 and its bits, which compiled code reads: it widens numbers in registers."""
    if isinstance(w_EDZ, Quantized):
        raise ValueError(
            f"{native.EXPERTS}: the experts are stored quantised; load the model in float32 or bfloat16 (--dtype), or "
            'choose "auto".'
        )
    if isinstance(w_EDZ, Bits):
        return Bits(w_EDZ.values.reshape(*w_EDZ.shape[:2], -1))
    return _fused(w_EDZ, jnp.bfloat16 if w_EDZ.dtype == jnp.bfloat16 else dtype)


def block_rows(rows: int, groups: int, limits: tuple[int, int] = CPU_BLOCK_ROWS) -> int:
    """Rows a block: a power of two near the mean group, within ``limits``, of which decoding takes the first."""
    mean, (fewest, most) = max(rows // groups, 1), limits
    return min(max(1 << (mean.bit_length() - 1), fewest), most)


def _blocks(sizes_E: jax.Array, rows: int, size: int):
    """Group, first row and number of real rows of every block of ``size`` rows, and the number of blocks."""
    blocks_E = -(-sizes_E // size)
    last_E, end_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E)
    block = jnp.arange(-(-rows // size) + sizes_E.size)
    group = jnp.minimum(jnp.searchsorted(last_E, block, side="right"), sizes_E.size - 1)
    first = end_E[group] - sizes_E[group] + (block - (last_E[group] - blocks_E[group])) * size
    return group, first, jnp.clip(end_E[group] - first, 0, size), last_E[-1]


def _pick(w, e: jax.Array, dtype) -> jax.Array:
    """Expert e of a stack, as a matrix [D, Z]; of a quantised stack only this expert is dequantised."""
    one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, e, 0, keepdims=False), w)
    if isinstance(w, Quantized):
        one = Quantized(one.values, one.scale, w.block[1:], w.dims[1:])
    return dense(one, dtype).reshape(w.shape[1], -1)


def blocks_matmul(x_MD, w_EDZ, sizes_E, transpose: bool, limits=CPU_BLOCK_ROWS) -> jax.Array:
    """Rows of a group are contiguous, so blocks run in order without padding copies: what one writes beyond
    its group, the next group's first block overwrites. The trip count is the number of real blocks."""
    M = x_MD.shape[0]
    size = block_rows(M, sizes_E.size, limits)
    group, first, _, count = _blocks(sizes_E, M, size)
    x_pad = jnp.pad(x_MD, ((0, size), (0, 0)))
    width = w_EDZ.shape[1] if transpose else math.prod(w_EDZ.shape[2:])

    def body(i, y):
        x = jax.lax.dynamic_slice(x_pad, (first[i], 0), (size, x_pad.shape[1]))
        w = _pick(w_EDZ, group[i], x.dtype)
        dims = (((1,), (1 if transpose else 0,)), ((), ()))
        out = jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice(y, out.astype(x.dtype), (first[i], 0))

    return jax.lax.fori_loop(0, count, body, jnp.zeros((M + size, width), x_MD.dtype))[:M]


def few_rows_matmul(x_MD, w: Quantized, sizes_E) -> jax.Array:
    """Every expert's matrix meets all rows, a slab of it after the other, whose blocks are rebuilt in the product: read
    once, as it is stored. Rows of other groups are left out of the sums."""
    D, block, between = w.shape[1], w.block[1], w.values.shape[2:-1]
    slab = max((n for n in range(block, max(SLAB, block) + 1, block) if D % n == 0), default=D)
    end_E, row_M1 = jnp.cumsum(sizes_E), jnp.arange(x_MD.shape[0])[:, None]

    def expert(e, y_MZ):
        def add(i, sums):
            x = jax.lax.dynamic_slice_in_dim(x_MD, i * slab, slab, axis=1)
            # Gate and up each by itself: next to the last, an axis of two has a layout that a product would convert.
            for z, sum_MF in zip(np.ndindex(between), sums, strict=True):
                values = _cut(w.values, (e, i * slab, *z), slab)
                scale = _cut(w.scale, (e, i * slab // block, *z), -(-slab // block))
                own = Quantized(values, scale, (block, w.block[-1]), values.shape).dequantize(x.dtype)
                yield sum_MF + jnp.dot(x, own, preferred_element_type=jnp.float32)

        empty = [jnp.zeros((x_MD.shape[0], w.values.shape[-1]), jnp.float32) for _ in np.ndindex(between)]
        sums = jax.lax.fori_loop(0, D // slab, lambda i, sums: list(add(i, sums)), empty)
        mine = (row_M1 >= end_E[e] - sizes_E[e]) & (row_M1 < end_E[e])
        return jnp.where(mine, jnp.concatenate(sums, axis=1).astype(y_MZ.dtype), y_MZ)

    empty = jnp.zeros((x_MD.shape[0], math.prod(w.shape[2:])), x_MD.dtype)
    return jax.lax.fori_loop(0, sizes_E.size, expert, empty)


def _cut(a_EDX, first: tuple, rows: int) -> jax.Array:
    """[rows, F]: of one matrix of a stack [E, D, F] or [E, D, 2, F], from ``first`` on."""
    sizes = (1, rows, *(1 for _ in a_EDX.shape[2:-1]), a_EDX.shape[-1])
    return jax.lax.dynamic_slice(a_EDX, (*first, 0), sizes).reshape(rows, -1)


def blocks_outer(x_MD, y_MZ, sizes_E, dtype, limits=CPU_BLOCK_ROWS) -> jax.Array:
    size = block_rows(x_MD.shape[0], sizes_E.size, limits)
    group, first, real, count = _blocks(sizes_E, x_MD.shape[0], size)
    x_pad, y_pad = (jnp.pad(a, ((0, size), (0, 0))) for a in (x_MD, y_MZ))

    def body(i, out):
        x = jax.lax.dynamic_slice(x_pad, (first[i], 0), (size, x_pad.shape[1]))
        y = jax.lax.dynamic_slice(y_pad, (first[i], 0), (size, y_pad.shape[1]))
        y = jnp.where(jnp.arange(size)[:, None] < real[i], y, 0)
        outer = jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        sum_ = jax.lax.dynamic_index_in_dim(out, group[i], 0, keepdims=False) + outer
        return jax.lax.dynamic_update_index_in_dim(out, sum_, group[i], 0)

    shape = (sizes_E.size, x_MD.shape[1], y_MZ.shape[1])
    return jax.lax.fori_loop(0, count, body, jnp.zeros(shape, jnp.float32)).astype(dtype)


def _fused(w_EDZ, dtype) -> jax.Array:
    """[E, D, Z] of ``dtype``, with the axes behind D as one."""
    w_EDZ = dense(w_EDZ, dtype)
    return w_EDZ.reshape(*w_EDZ.shape[:2], -1)
