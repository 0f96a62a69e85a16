"""Published tensors out of a model's leaves: their values, one at a time, and how they were stored."""

from functools import lru_cache

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.convert.formats import STORED, Stored, shared
from deepseek_jax.convert.names import Leaf, Path, Tensor
from deepseek_jax.core.params import RouterState
from deepseek_jax.core.quant import BLOCK, FP4, FP8, Quantized

# An array, or FP8 or FP4 values, scales and their block.
Held = np.ndarray | tuple[np.ndarray, np.ndarray, tuple[int, int]]


def held_as(value) -> Stored:
    """The dtypes of a leaf's value; those of a hash router's table, int32 here, in files."""
    if value.dtype == np.int32:
        return Stored(np.dtype(np.int64))
    if isinstance(value, Quantized):
        return Stored(np.dtype(value.values.dtype), np.dtype(value.scale.dtype))
    return Stored(np.dtype(value.dtype))


def model_block(values: dict[Path, nnx.Variable], leaves: dict[Path, Leaf]) -> tuple[int, int]:
    """The block of the model's leaves in FP8, as rows and columns of the published matrix."""
    held = {path: v.get_value() for path, v in values.items()}
    held = {path: q for path, q in held.items() if isinstance(q, Quantized) and q.dtype != FP4}
    blocks = {leaves[path].published_block(q.block) for path, q in held.items()}
    if len(blocks) > 1:
        raise ValueError(f"the model's quantised leaves have blocks of different sizes: {sorted(blocks)}.")
    return blocks.pop() if blocks else BLOCK


def forms_of(values: dict[tuple, nnx.Variable], tensors) -> dict[str, Stored]:
    """How the tensors of leaves of several forms were stored, as long as these leaves are held as they were loaded."""
    found: dict[str, Stored] = {}
    for path, variable in values.items():
        forms, value = variable.get_metadata().get(STORED), variable.get_value()
        if forms is None:
            continue
        if held_as(value) == shared(forms) or isinstance(variable, RouterState):
            own = [tensor.name for tensor in tensors if tensor.path == path and not tensor.copy]
            found |= zip(own, forms, strict=True)
    return found


def tensor_of(value, leaf: Leaf, tensor: Tensor, form: Stored | None) -> Held:
    """A published tensor as the model holds it."""

    def part(array, shape):
        if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
            array = _gathered(array, shape, tensor.index)
        else:
            array = np.asarray(array).reshape(shape)[tensor.index]
        return array.T if tensor.transposed else array

    if not isinstance(value, Quantized):
        return part(value, leaf.matrix)
    values = part(value.values, leaf.matrix)
    if form is not None and form.scale is None:
        return values.astype(form.dtype)  # its scales are 1
    scale = part(value.scale, value.scale.shape)
    if form is not None:
        values, scale = values.astype(FP8), scale.astype(form.scale)
    return values, scale, leaf.published_block(value.block)


def _gathered(array: jax.Array, shape: tuple[int, ...], index: tuple[int | slice, ...]) -> np.ndarray:
    """``array.reshape(shape)[index]`` of an array on a mesh; only that is ever whole on a device."""
    lead = next((i for i, part in enumerate(index) if not isinstance(part, int)), len(index))
    rest = tuple(part if isinstance(part, int) else None for part in index[lead:])
    piece = _piece(array.sharding.mesh, shape[lead:], rest)
    return np.asarray(piece(array, np.asarray(index[:lead], np.int32)))


@lru_cache
def _piece(mesh, shape: tuple[int, ...], rest: tuple[int | None, ...]):
    """Takes an array's part at the first axes' places, a program for all of these; ``rest``: None for a whole axis."""
    whole = NamedSharding(mesh, PartitionSpec())

    def take(array, places):
        for place in places:
            array = jax.lax.dynamic_index_in_dim(array, place, keepdims=False)
        return array.reshape(shape)[tuple(slice(None) if part is None else part for part in rest)]

    return jax.jit(take, out_shardings=whole)
