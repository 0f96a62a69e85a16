"""Where a context's layout puts activations, parameters and trees of them. `core.layout` has the tables."""

import math
from typing import TypeVar

from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import Axes, LayoutError, parts, spec
from deepseek_jax.core.params import map_variables
from deepseek_jax.core.quant import Quantized

Tree = TypeVar("Tree")


def activation_sharding(axes: Axes, shape: tuple[int, ...], ctx: Context) -> NamedSharding:
    """Where an activation with named axes lies. Raises LayoutError where a size does not divide."""
    return NamedSharding(ctx.mesh, spec(axes, shape, ctx.layout.use, ctx.mesh, "an activation"))


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
            sharding = quantized_shardings(value, sharding, what)
        return variable.replace(sharding)

    return map_variables(place, tree)


def quantized_shardings(value: Quantized, sharding: NamedSharding, what: str) -> Quantized:
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
    # Scales lie with their blocks, where no block is cut.
    scale, first = [], len(lead)
    for place, (entry, n, size) in enumerate(zip(entries, value.scale.shape, value.values.shape, strict=True)):
        apart = math.prod(mesh.shape[a] for a in entry or ())
        block = value.block[place - first] if place >= first else 1
        scale.append(entry if n % apart == 0 and size // apart % block == 0 else None)
    return Quantized(
        NamedSharding(mesh, PartitionSpec(*entries)),
        NamedSharding(mesh, PartitionSpec(*scale)),
        value.block,
        value.dims,
    )
