"""Products of quantised weights that lie apart, part by part: no matrix is gathered, and each device rebuilds the
blocks of its own part only.

Suffixes: see `linear`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import parts
from deepseek_jax.core.quant import Quantized
from deepseek_jax.parallel.linear import Split, bring
from deepseek_jax.parallel.shardings import parameter_sharding, quantized_shardings


def product_of_parts(
    x, w: Quantized, equation: str, axes, ctx: Context, precision=None, columns: tuple[int, int] | None = None
) -> jax.Array | None:
    """float32 ``einsum(equation, x, w)``, or with ``columns`` of that part of w's last axis, where x is brought to the
    parts of w; None where x has so many tokens that it moves less to gather the weight. Has no gradient.
    """
    first = len(w.shape) - len(axes)
    shape = jax.ShapeDtypeStruct(w.shape if columns is None else (*w.shape[:-1], columns[1] - columns[0]), x.dtype)
    split = Split(equation, x, shape, axes, ctx)
    found = split.brought(x, shape)
    if found is None or first:
        return None
    specs = part_specs(w, axes, ctx)

    def multiply(x, w: Quantized):
        own = part(w, specs).dequantize(x.dtype)
        own = own if columns is None else own[..., columns[0] : columns[1]]
        return jnp.einsum(equation, x, own, precision=precision, preferred_element_type=jnp.float32)

    local = partial(bring, product=multiply, split=split, letter=found[0], over=found[1])
    run = jax.shard_map(local, mesh=ctx.mesh, in_specs=(split.x, specs), out_specs=split.y, check_vma=False)
    return run(x, w)


def part_specs(w: Quantized, axes, ctx: Context) -> Quantized:
    """The mesh axes over which a weight's values and scales lie apart at rest, as `jax.shard_map` takes them."""
    placed = quantized_shardings(w, parameter_sharding(axes, w.shape, ctx), "a quantised parameter")
    return jax.tree.map(lambda sharding: sharding.spec, placed)


def part(w: Quantized, specs: Quantized) -> Quantized:
    """Within `jax.shard_map`: this device's part as a weight of its own. Where the part does not begin with a block,
    all scales are here, and each row or column gets its own."""
    values, scale, block = w.values, w.scale, list(w.block)
    first = values.ndim - len(block)
    for axis, (over, apart) in enumerate(zip(parts(specs.values), parts(specs.scale), strict=True)):
        if over and not apart:
            size = values.shape[axis]
            index = (jax.lax.axis_index(over) * size + jnp.arange(size)) // block[axis - first]
            scale, block[axis - first] = jnp.take(scale, index, axis=axis), 1
    return Quantized(values, scale, tuple(block), _dims(w, specs.values))


def _dims(w: Quantized, specs: PartitionSpec) -> tuple[int, ...]:
    """The logical shape of a part: of the axes that a matrix has as one, the first is split."""
    dims, left = [], list(w.dims)
    for size, over in list(zip(w.values.shape, parts(specs), strict=True))[w.values.ndim - len(w.block) :]:
        apart = math.prod(jax.lax.axis_size(axis) for axis in over)
        fused, left = left[:1], left[1:]
        while math.prod(fused) < size * apart:
            fused.append(left.pop(0))
        dims += [fused[0] // apart, *fused[1:]]
    return tuple(dims)
