"""Puts models and batches where a context's layout wants them."""

from collections.abc import Mapping
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, LayoutError, parts, spec
from deepseek_jax.parallel.shardings import shardings

Tree = TypeVar("Tree")


def place(model: Tree, ctx: Context) -> Tree:
    """A model, or any tree of variables, in its shards; unchanged without a mesh.

    Raises LayoutError where the layout does not divide the model.
    """
    return model if ctx.mesh is None else jax.device_put(model, shardings(model, ctx))


def place_batch(batch: Mapping[str, np.ndarray], ctx: Context) -> dict[str, jax.Array]:
    """A batch's arrays with their rows on the devices that compute them.

    "tokens" are [..., B, T]; other entries have the same axes, or more behind them. B: the rows of this process, which
    are its `row_share` of the global batch, in their order there.

    Raises LayoutError where the rows do not divide over the devices.
    """
    if ctx.mesh is None:
        return dict(batch)
    groups, count = row_share(ctx)
    axis = batch["tokens"].ndim - 2
    return {name: _place_rows(np.asarray(array), axis, groups, count, ctx) for name, array in batch.items()}


def _place_rows(array: np.ndarray, axis: int, groups: tuple[int, ...], count: int, ctx: Context) -> jax.Array:
    size, rest = divmod(array.shape[axis], len(groups))
    if rest:
        raise LayoutError(
            f"a batch: this process's {array.shape[axis]} rows do not divide into the {len(groups)} of {count} groups "
            "of rows that its devices compute."
        )
    shape = (*array.shape[:axis], size * count, *array.shape[axis + 1 :])
    split = spec((BATCH, *(None,) * (array.ndim - axis - 1)), shape, ctx.layout.use, ctx.mesh, "a batch")
    here = {group: place for place, group in enumerate(groups)}

    def part(index):
        first = here[(index[axis].start or 0) // size] * size
        return array[(*(slice(None),) * axis, slice(first, first + size))]

    return jax.make_array_from_callback(shape, NamedSharding(ctx.mesh, split), part)


def row_groups(ctx: Context) -> int:
    """The number of parts into which a batch's rows are split."""
    split = spec((BATCH,), (0,), ctx.layout.use, ctx.mesh, "a batch")
    return int(np.prod([ctx.mesh.shape[axis] for axis in parts(split)[0]], dtype=int))


def row_share(ctx: Context) -> tuple[tuple[int, ...], int]:
    """Which of the groups of a batch's rows this process's devices compute, ascending, and how many there are.

    Processes whose devices share rows (their tokens, heads or widths apart) have the same groups.
    """
    if ctx.mesh is None:
        return (0,), 1
    count = row_groups(ctx)
    split = spec((BATCH,), (count,), ctx.layout.use, ctx.mesh, "a batch")
    held = NamedSharding(ctx.mesh, split).addressable_devices_indices_map((count,))
    return tuple(sorted({index[0].start or 0 for index in held.values()})), count


def everywhere(tree: Tree, ctx: Context) -> Tree:
    """Under jit: a tree's arrays whole on every device, so that every process can read them."""
    if ctx.mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(ctx.mesh, PartitionSpec()))


def fetch(tree: Tree, ctx: Context) -> Tree:
    """NumPy arrays of a tree's arrays, whole in every process. Copies: on a CPU others are views of buffers that a
    later call may be given to reuse."""
    return jax.tree.map(np.array, jax.device_get(tree if ctx.mesh is None else _everywhere(tree, ctx)))


@partial(jax.jit, static_argnames="ctx")
def _everywhere(tree, ctx: Context):
    return everywhere(tree, ctx)


def settle(tree: Tree, ctx: Context) -> Tree:
    """A training state whose parameters were placed: its other arrays (counters) go to every device, whole.

    An optimizer's moments are made where their parameters lie. Without this the first step's result would lie
    elsewhere than its argument, and the second step would be compiled anew.
    """
    if ctx.mesh is None:
        return tree
    whole = NamedSharding(ctx.mesh, PartitionSpec())

    def one(a):
        placed = isinstance(a.sharding, NamedSharding) and a.sharding.mesh == ctx.mesh
        return a if placed else jax.device_put(a, whole)

    return jax.tree.map(one, tree)
