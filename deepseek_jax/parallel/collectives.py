"""Weights from where they rest to where they are used, and their gradients back: within `jax.shard_map`."""

import math
from itertools import takewhile

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.core.layout import parts

# Devices that gather at once: over more of them the TPU compiler makes an all-reduce of it, of twice the bytes; when it
# scatters the few rows of a decoding step, over more than the second.
AT_ONCE, FEW_AT_ONCE = 64, 8


def gathered(w: jax.Array, rest: PartitionSpec, use: PartitionSpec, dtype) -> jax.Array:
    """Within `jax.shard_map`: this device's part at rest becomes its part in use, as ``dtype``. One mesh axis after the
    other, the minor one first: a gather over many devices at once is made an all-reduce by the TPU compiler."""
    if w.dtype != dtype:
        # Or the compiler may convert the weights of all layers ahead of the loop over them, and hold both.
        w = jax.lax.optimization_barrier(w).astype(dtype)
    for dimension, (resting, used) in enumerate(zip(parts(rest), parts(use), strict=True)):
        shared = _shared(resting, used)
        for axis in reversed(resting[shared:]):
            for groups in reversed(_stages(axis)):
                w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True, axis_index_groups=groups)
        for axis in used[shared:]:
            w = _own_part(w, axis, dimension)
    return w


def to_rest(dw: jax.Array, use: PartitionSpec, rest: PartitionSpec, over: tuple[str, ...]) -> jax.Array:
    """Within `jax.shard_map`: a gradient laid out as in use, summed over the mesh axes ``over``, each device keeping
    its part at rest. Devices that are apart in use have no part in each other's sums."""
    waiting = [axis for axis in over if not any(axis in used for used in parts(use))]
    for dimension, (resting, used) in enumerate(zip(parts(rest), parts(use), strict=True)):
        shared = _shared(resting, used)
        for axis in reversed(used[shared:]):
            dw = jax.lax.all_gather(dw, axis, axis=dimension, tiled=True)
        for axis in resting[shared:]:
            if axis in waiting:
                for groups in _stages(axis):
                    dw = jax.lax.psum_scatter(
                        dw, axis, scatter_dimension=dimension, tiled=True, axis_index_groups=groups
                    )
                waiting.remove(axis)
            else:
                dw = _own_part(dw, axis, dimension)
    return jax.lax.psum(dw, tuple(waiting))


def rows_gathered(x_BX: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """Within `jax.shard_map`: the rows of all devices of these mesh axes."""
    # As vectors: of most other shapes the TPU compiler makes an all-reduce.
    rows = x_BX.reshape(x_BX.shape[0], 1, -1)
    for axis in reversed(over):
        rows = jax.lax.all_gather(rows, axis, axis=0, tiled=True)
    return rows.reshape(-1, *x_BX.shape[1:])


def rows_scattered(y_BX: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """Within `jax.shard_map`: of the sum over these mesh axes each device's own rows."""
    rows = y_BX.reshape(y_BX.shape[0], -1)
    for axis in over:
        for groups in _stages(axis, FEW_AT_ONCE):
            rows = jax.lax.psum_scatter(rows, axis, scatter_dimension=0, tiled=True, axis_index_groups=groups)
    return rows.reshape(-1, *y_BX.shape[1:])


def _stages(axis: str, at_once: int = AT_ONCE) -> list[list[list[int]] | None]:
    """The groups of a mesh axis's devices among which it is gathered, the major ones first; None for all at once."""
    size = jax.lax.axis_size(axis)
    minor = math.gcd(size, at_once)
    if size <= at_once or minor == 1:
        return [None]
    major = [list(range(first, size, minor)) for first in range(minor)]
    return [major, [list(range(first, first + minor)) for first in range(0, size, minor)]]


def _shared(resting: tuple[str, ...], used: tuple[str, ...]) -> int:
    """How many mesh axes, from the major one on, an axis is split over both at rest and in use."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(resting, used, strict=False))))


def _own_part(w: jax.Array, axis: str, dimension: int) -> jax.Array:
    size = w.shape[dimension] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(w, jax.lax.axis_index(axis) * size, size, dimension)
