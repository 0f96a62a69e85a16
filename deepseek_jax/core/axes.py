"""Logical axes: how a parameter's or activation's named axes map to the axes of a device mesh.

A parameter names its axes where it is made (`core.params.param`), an activation where `constrain` is called. A
`Layout` has two tables from those names to mesh axes: ``rest``, where parameters, gradients and optimizer state lie,
and ``use``, how activations lie and what stays split of a parameter while it is multiplied. The difference between
the two is gathered when a layer is read (FSDP). Without a mesh every function here returns its argument.
"""

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.params import is_variable, map_variables
from deepseek_jax.core.quant import Quantized

if TYPE_CHECKING:
    from deepseek_jax.core.context import Context

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
# Of parameters.
PARAMETER_AXES = (
    "vocab",
    "embed",
    "embedding",
    "heads",
    "head_dim",
    "q_rank",
    "kv_rank",
    "ffn",
    "expert",
    "expert_ffn",
    "scores",
)
# Of activations.
BATCH, SEQUENCE = "batch", "sequence"

Rules = tuple[tuple[str, tuple[str, ...]], ...]
Axes = tuple[str | tuple[str, ...] | None, ...]
Tree = TypeVar("Tree")


class LayoutError(ValueError):
    """A layout that does not fit the mesh, the model or the batch."""


@dataclass(frozen=True)
class Layout:
    """Where arrays lie on a mesh; hashable.

    ``rest``, ``use``: pairs (logical axis, mesh axes), as the module says. A mesh axis that an earlier axis of the
    same array took is left out; a logical axis without an entry is not split. Parameters of one axis (norms, router
    biases) are whole on every device.

    Raises LayoutError for unknown names and for a mesh axis listed twice.
    """

    name: str
    rest: Rules
    use: Rules

    def __post_init__(self):
        for rules in (self.rest, self.use):
            for logical, axes in rules:
                if logical not in (*PARAMETER_AXES, BATCH, SEQUENCE):
                    raise LayoutError(f"layout {self.name}: {logical!r} is no logical axis.")
                if not set(axes) <= set(MESH_AXES) or len(set(axes)) != len(axes):
                    raise LayoutError(
                        f"layout {self.name}: {logical} is mapped to {axes}; choose among {', '.join(MESH_AXES)}."
                    )

        use = dict(self.use)
        if not set(use.get("expert", ())) <= {"expert"} or not set(use.get("expert", ())) <= set(use.get(BATCH, ())):
            raise LayoutError(
                f"layout {self.name}: experts are split over the mesh axis 'expert' or none, and the batch with them, "
                f"not over {use.get('expert')} with the batch over {use.get(BATCH, ())}."
            )

    @property
    def mesh_axes(self) -> set[str]:
        """The mesh axes that the layout splits anything over."""
        return {axis for rules in (self.rest, self.use) for _, axes in rules for axis in axes}


def spec(axes: Axes, shape: tuple[int, ...], rules: Rules, mesh: Mesh, what: str) -> PartitionSpec:
    """The mesh axes of each axis of an array; ``axes`` names its trailing ones, with a tuple where some are merged.

    Raises LayoutError, naming ``what``, the axis and the sizes, where a size does not divide.
    """
    table, taken, entries = dict(rules), set(), [None] * (len(shape) - len(axes))
    for name, size in zip(axes, shape[len(entries) :], strict=True):
        names = name if isinstance(name, tuple) else (name,)
        wanted = (a for n in names for a in table.get(n, ()))
        mine = tuple(a for a in wanted if mesh.shape[a] > 1 and a not in taken)
        taken |= set(mine)
        parts = math.prod(mesh.shape[a] for a in mine)
        if size % parts:
            raise LayoutError(
                f"{what}: its axis {name!r} of size {size} does not divide over the mesh axes "
                f"{' x '.join(f'{a}={mesh.shape[a]}' for a in mine)}."
            )
        entries.append(mine or None)
    return PartitionSpec(*entries)


def parts(split: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each axis, as tuples: a PartitionSpec holds a lone one as a string, and none as None."""
    return tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in split)


def constrain(x: jax.Array, axes: Axes, ctx: "Context") -> jax.Array:
    """``x``, an activation with named axes, laid out as the context says.

    Raises LayoutError where a size does not divide.
    """
    if ctx.mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_sharding(axes, x.shape, ctx))


def activation_sharding(axes: Axes, shape: tuple[int, ...], ctx: "Context") -> NamedSharding:
    return NamedSharding(ctx.mesh, spec(axes, shape, ctx.layout.use, ctx.mesh, "an activation"))


def balanced_order(length: int, devices: int) -> np.ndarray:
    """int [length]: the tokens of a row in the order in which ``devices`` share causal attention equally.

    Of 2 x devices runs, device i has the i-th from the start and the i-th from the end. Raises LayoutError where the
    length does not divide.
    """
    if length % (2 * devices):
        raise LayoutError(
            f"rows of {length} tokens do not divide into 2 x {devices} runs over the mesh axis 'context'."
        )
    run = np.arange(length).reshape(2 * devices, -1)
    return np.stack([run[:devices], run[::-1][:devices]], axis=1).reshape(-1)


def summed(f, x: jax.Array, ctx: "Context") -> jax.Array:
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


def top_k(x: jax.Array, k: int, ctx: "Context") -> tuple[jax.Array, jax.Array]:
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


def together(tree: Tree, ctx: "Context") -> Tree:
    """``tree``, whose gradients are all computed before any is used.

    On a mesh, where memory is what limits. Else a compiler that looks for what may overlap keeps a large layer's
    activations for the gradients of its weights while it goes on with the backward pass of others.
    """
    return tree if ctx.mesh is None else jax.lax.optimization_barrier(tree)


def gather(tree: Tree, ctx: "Context", dtype) -> Tree:
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
    ctx: "Context",
    in_use: bool = False,
    what: str = "a parameter",
) -> NamedSharding:
    """Where a parameter lies; ``axes`` are its own, ``shape`` may have stacked layers in front."""
    rules = ctx.layout.use if in_use else ctx.layout.rest
    return NamedSharding(ctx.mesh, spec(axes, shape, rules if len(axes) > 1 else (), ctx.mesh, what))


def shardings(tree: Tree, ctx: "Context") -> Tree:
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
