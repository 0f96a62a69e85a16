"""Arrays where a context's layout puts them: constraints, gathers, gradients scattered, sums over all devices.

`core.layout` has the tables. Without a mesh every function here returns its argument.
"""

import math
from itertools import takewhile
from typing import TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE, Axes, LayoutError, parts, spec
from deepseek_jax.core.params import is_variable, map_variables
from deepseek_jax.core.quant import Quantized

Tree = TypeVar("Tree")


def constrain(x: jax.Array, axes: Axes, ctx: Context) -> jax.Array:
    """``x``, an activation with named axes, laid out as the context says.

    Raises LayoutError where a size does not divide.
    """
    if ctx.mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_sharding(axes, x.shape, ctx))


def activation_sharding(axes: Axes, shape: tuple[int, ...], ctx: Context) -> NamedSharding:
    return NamedSharding(ctx.mesh, spec(axes, shape, ctx.layout.use, ctx.mesh, "an activation"))


def summed(f, x: jax.Array, ctx: Context) -> jax.Array:
    """``f(x)`` for an integer activation x [B, T, ...], where f sums over rows and tokens: each device sums its own.

    Left to the compiler, x would be gathered from all devices for it.
    """
    if ctx.mesh is None:
        return f(x)
    axes = (BATCH, SEQUENCE, *(None,) * (x.ndim - 2))
    split = spec(axes, x.shape, ctx.layout.use, ctx.mesh, "an activation")
    over = tuple(axis for mine in parts(split)[:2] for axis in mine)
    return jax.shard_map(
        lambda x: jax.lax.psum(f(x), over), mesh=ctx.mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False
    )(x)


def top_k(x: jax.Array, k: int, ctx: Context) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of an activation [B, T, ...] that is no longer differentiated; each device takes its own.

    Left to the compiler, x would be gathered from all devices for it.
    """
    if ctx.mesh is None:
        return jax.lax.top_k(x, k)
    axes = (BATCH, SEQUENCE, *(None,) * (x.ndim - 2))
    split = spec(axes, x.shape, ctx.layout.use, ctx.mesh, "an activation")
    take = jax.shard_map(
        lambda x: tuple(jax.lax.top_k(x, k)), mesh=ctx.mesh, in_specs=split, out_specs=(split, split), check_vma=False
    )
    return take(x)


def gathered(w: jax.Array, rest: PartitionSpec, use: PartitionSpec, dtype) -> jax.Array:
    """Within `jax.shard_map`: this device's part at rest becomes its part in use, as ``dtype``. One mesh axis after the
    other, the minor one first: a gather over many devices at once is made an all-reduce by the TPU compiler."""
    if w.dtype != dtype:
        # Or the compiler may convert the weights of all layers ahead of the loop over them, and hold both.
        w = jax.lax.optimization_barrier(w).astype(dtype)
    for dimension, (resting, used) in enumerate(zip(parts(rest), parts(use), strict=True)):
        shared = _shared(resting, used)
        for axis in reversed(resting[shared:]):
            w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True)
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
                dw = jax.lax.psum_scatter(dw, axis, scatter_dimension=dimension, tiled=True)
                waiting.remove(axis)
            else:
                dw = _own_part(dw, axis, dimension)
    return jax.lax.psum(dw, tuple(waiting))


def _shared(resting: tuple[str, ...], used: tuple[str, ...]) -> int:
    """How many mesh axes, from the major one on, an axis is split over both at rest and in use."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(resting, used, strict=False))))


def _own_part(w: jax.Array, axis: str, dimension: int) -> jax.Array:
    size = w.shape[dimension] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(w, jax.lax.axis_index(axis) * size, size, dimension)


def together(tree: Tree, ctx: Context) -> Tree:
    """``tree``, whose gradients are all computed before any is used.

    On a mesh, where memory is what limits. Else a compiler that looks for what may overlap keeps a large layer's
    activations for the gradients of its weights while it goes on with the backward pass of others.
    """
    return tree if ctx.mesh is None else jax.lax.optimization_barrier(tree)


def gather(tree: Tree, ctx: Context, dtype) -> Tree:
    """Parameters as in use, by constraints alone; matrices in ``dtype``.

    For weights that are not trained as they are: quantised ones, those with adapters, and decoding's.
    """
    if ctx.mesh is None:
        return tree

    def whole(path, variable):
        if not is_variable(variable):
            return variable
        value, axes = variable.get_value(), variable.get_metadata().get("axes")
        if axes is None or len(axes) < 2:
            return variable
        use = parameter_sharding(axes, value.shape, ctx, in_use=True)
        if isinstance(value, Quantized):
            use = _quantized_shardings(value, use, "a quantised parameter")
            return variable.replace(jax.tree.map(jax.lax.with_sharding_constraint, value, use))
        # Cast first: a gather moves the bytes of the compute dtype.
        return variable.replace(jax.lax.with_sharding_constraint(value.astype(dtype), use))

    return map_variables(whole, tree)


def parameter_sharding(
    axes: Axes,
    shape: tuple[int, ...],
    ctx: Context,
    in_use: bool = False,
    what: str = "a parameter",
) -> NamedSharding:
    """Where a parameter lies; ``axes`` are its own, ``shape`` may have stacked layers in front."""
    rules = ctx.layout.use if in_use else ctx.layout.rest
    return NamedSharding(ctx.mesh, spec(axes, shape, rules if len(axes) > 1 else (), ctx.mesh, what))


def shardings(tree: Tree, ctx: Context) -> Tree:
    """The tree of variables with each leaf's `NamedSharding` in its place; also for `jax.eval_shape`'s trees.

    Raises LayoutError that names the parameter, the axis and the dimension where the layout does not divide the
    model; nothing is compiled or allocated for that.
    """

    def place(path, variable):
        value, axes = variable.get_value(), variable.get_metadata().get("axes", ())
        what = f"layout {ctx.layout.name}: {'.'.join(map(str, path))}"
        sharding = parameter_sharding(axes, value.shape, ctx, what=what)
        if isinstance(value, Quantized):
            sharding = _quantized_shardings(value, sharding, what)
        return variable.replace(sharding)

    return map_variables(place, tree)


def _quantized_shardings(value: Quantized, sharding: NamedSharding, what: str) -> Quantized:
    """The shardings of values and scales, in whose matrices neighbouring axes of the weight are fused."""
    mesh, matrix = sharding.mesh, value.values.shape[len(value.shape) - len(value.dims) :]
    lead = [None] * (value.values.ndim - len(matrix))
    entries, axes, sizes = list(lead), iter(parts(sharding.spec)[len(lead) :]), iter(value.dims)
    for size in matrix:
        entry, done = next(axes), next(sizes)
        while done < size:
            inner, done = next(axes), done * next(sizes)
            if inner:
                raise LayoutError(f"{what}: {inner} would split heads within its quantised matrix.")
        entries.append(entry or None)
    scale = [
        None if entry is None or n % math.prod(mesh.shape[a] for a in entry) else entry
        for entry, n in zip(entries, value.scale.shape, strict=True)
    ]
    return Quantized(
        NamedSharding(mesh, PartitionSpec(*entries)),
        NamedSharding(mesh, PartitionSpec(*scale)),
        value.block,
        value.dims,
    )
