"""Reads a leaf of the model straight into its shards: of every tensor only the part that this process's devices hold.

A shard's place in the leaf becomes rows and columns of the published matrices; of quantised matrices the scales of the
blocks that it touches are read besides. What lies on several devices of the process is read once.
"""

import os
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.convert.formats import Stored, block_of, cast, check_finite, is_quantized
from deepseek_jax.convert.layers import LayerEntry
from deepseek_jax.convert.names import Leaf, Tensor
from deepseek_jax.convert.safetensors import CheckpointError, Entry
from deepseek_jax.core.quant import PACKED, Quantized, unpack

Part = tuple[slice, ...]
Read = Callable[[Tensor, Part], np.ndarray]


def load_leaf(
    entries: dict[str, Entry | LayerEntry],
    tensors: list[Tensor],
    leaf: Leaf,
    form: Stored,
    block: tuple[int, int],
    place: NamedSharding | Quantized,
) -> jax.Array | Quantized:
    """An array of ``form``'s dtype laid out as ``place`` says, or with scales, and a `Quantized` of shardings, such a
    leaf. ``block``: of FP8.

    Raises CheckpointError for values that are not finite and for a file that ends too soon.
    """

    def assemble(shape: tuple[int, ...], to: np.dtype, sharding: NamedSharding, read: Read) -> jax.Array:
        held: dict[str, np.ndarray] = {}

        def shard(index: Part) -> np.ndarray:
            part = tuple(slice(*i.indices(n)) for i, n in zip(index, shape, strict=True))
            if str(part) not in held:
                fused = _fused(part, leaf) if shape == leaf.shape else part
                out = np.empty([s.stop - s.start for s in fused], to)
                _fill_shard(out, tensors, fused, read)
                held[str(part)] = out.reshape([s.stop - s.start for s in part])
            return held[str(part)]

        return jax.make_array_from_callback(shape, sharding, shard)

    def values(tensor: Tensor, part: Part) -> np.ndarray:
        entry = entries[tensor.name]
        array = read_values(entry, part)
        check_finite(entry, array)
        if is_quantized(array.dtype) and form.scale is None:
            return _dequantized(array, part, block_of(array.dtype, block), partial(stored_scales, tensor))
        return cast(entry, array, form.dtype)

    def scales(tensor: Tensor, part: Part) -> np.ndarray:
        if not is_quantized(entries[tensor.name].dtype):
            return np.ones([s.stop - s.start for s in part], form.scale)
        return stored_scales(tensor, part)

    def stored_scales(tensor: Tensor, part: Part) -> np.ndarray:
        entry = entries[tensor.scale]
        array = read_part(entry, part)
        check_finite(entry, array, scale=True)
        return array

    if form.scale is None:
        return assemble(leaf.shape, form.dtype, place, values)
    own = form.block(block)
    return Quantized(
        assemble(leaf.matrix, form.dtype, place.values, values),
        assemble(leaf.scale(own), form.scale, place.scale, scales),
        leaf.block(own),
        leaf.dims,
    )


def _fill_shard(out: np.ndarray, tensors: list[Tensor], fused: Part, read: Read) -> None:
    """Fills the part ``fused`` of a leaf's matrix form, or of its scales, with what ``read`` gives of each tensor."""
    for tensor in tensors:
        where, wanted = [], []
        for at, mine in zip(tensor.index, fused, strict=True):
            if isinstance(at, slice):
                wanted.append(mine)
                where.append(slice(None))
            else:
                where.append(at - mine.start if mine.start <= at < mine.stop else None)
        if None in where:
            continue
        array = read(tensor, tuple(reversed(wanted)) if tensor.transposed else tuple(wanted))
        out[tuple(where)] = array.T if tensor.transposed else array


def _fused(part: Part, leaf: Leaf) -> Part:
    """A part of the leaf's shape as a part of its matrix, in which neighbouring axes are one.

    Of fused axes only the first is ever split.
    """
    found, axes, sizes = list(part[: leaf.stacked]), iter(part[leaf.stacked :]), iter(leaf.dims)
    for size in leaf.matrix[leaf.stacked :]:
        first, done, inner = next(axes), next(sizes), 1
        while done * inner < size:
            next(axes)
            inner *= next(sizes)
        found.append(slice(first.start * inner, first.stop * inner))
    return tuple(found)


def _dequantized(
    array: np.ndarray, part: Part, block: tuple[int, int], scales: Callable[[Part], np.ndarray]
) -> np.ndarray:
    """float32: quantised values that are ``part`` of a matrix, times the scales of their blocks, of which ``scales``
    gives a part."""
    blocks = tuple(slice(s.start // b, -(-s.stop // b)) for s, b in zip(part, block, strict=True))
    grid = scales(blocks)
    of_row, of_column = (np.arange(s.start, s.stop) // b - s.start // b for s, b in zip(part, block, strict=True))
    return array.astype(np.float32) * grid.astype(np.float32)[of_row[:, None], of_column[None, :]]


def read_values(entry: Entry | LayerEntry, part: Part) -> np.ndarray:
    """`read_part` of a tensor's values, FP4 unpacked: of its bytes those that hold the part's columns."""
    if entry.dtype != PACKED:
        return read_part(entry, part)
    rows, columns = part
    bytes_ = slice(columns.start // 2, -(-columns.stop // 2))
    first = columns.start - 2 * bytes_.start
    return unpack(read_part(entry, (rows, bytes_)))[:, first : first + columns.stop - columns.start]


def read_part(entry: Entry | LayerEntry, part: Part) -> np.ndarray:
    """The part of a stored vector or matrix; no other bytes of its file are read.

    (Of a converted folder whole chunks are, as Orbax stores them.)
    """
    if isinstance(entry, LayerEntry):
        whole = tuple(slice(i, i + 1) for i in entry.index)
        return entry.array.read((*whole, *part)).reshape([s.stop - s.start for s in part])
    out = np.empty([s.stop - s.start for s in part], entry.dtype)
    if len(part) == 1 or part[1] == slice(0, entry.shape[1]):
        row = entry.dtype.itemsize * (entry.shape[1] if len(part) == 2 else 1)
        runs = [(part[0].start * row, out.reshape(-1))]
    else:
        row, first = entry.dtype.itemsize * entry.shape[1], part[1].start * entry.dtype.itemsize
        runs = [(r * row + first, out[r - part[0].start]) for r in range(part[0].start, part[0].stop)]
    file = os.open(entry.file, os.O_RDONLY)
    try:
        for offset, into in runs:
            _fill(file, entry, entry.start + offset, memoryview(into.view(np.uint8)))
    finally:
        os.close(file)
    return out


def _fill(file: int, entry: Entry, start: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            raise CheckpointError(f"{entry.file}: truncated within {entry.name}, at byte {start + done}.")
        done += count
