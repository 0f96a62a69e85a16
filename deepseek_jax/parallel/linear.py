"""A linear map of a parameter that lies at rest: the parameter is gathered for this one product, and once more in the
backward pass; or, where x has so few tokens that this moves less, x is brought to the parts of the parameter.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE, parts, spec
from deepseek_jax.core.product import cotangents
from deepseek_jax.parallel.collectives import gathered, rows_gathered, rows_scattered, to_rest
from deepseek_jax.parallel.shardings import parameter_sharding


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def product_at_rest(x, w, equation: str, axes, ctx: Context, precision) -> jax.Array:
    """float32 `product` of x and a parameter that lies at rest.

    Written out with its collectives: left to the compiler, a weight's gradient is summed whole on every device.
    """
    return _forward(x, w, equation, axes, ctx, precision)[0]


class Split:
    """How the three terms of an equation are split over the mesh."""

    def __init__(self, equation: str, x, w, axes, ctx: Context):
        self.of_x, self.of_w, self.of_y = equation.replace("->", ",").split(",")
        self.rest, self.use = (parameter_sharding(axes, w.shape, ctx, in_use).spec for in_use in (False, True))
        # What is the weight's in none of its axes, and neither rows nor tokens, is not split: streams.
        over = dict.fromkeys(self.of_x, ()) | dict(zip(self.of_w, parts(self.use), strict=True))
        rows = spec((BATCH, SEQUENCE), x.shape[:2], ctx.layout.use, ctx.mesh, "an activation")
        over |= dict(zip(self.of_x[:2], parts(rows), strict=True))
        self.over, self.mesh = over, ctx.mesh
        self.x, self.y = (PartitionSpec(*(over[a] or None for a in term)) for term in (self.of_x, self.of_y))

    def brought(self, x, w) -> tuple[str, tuple[str, ...]] | None:
        """The letter and the mesh axes over which the weight lies apart, if bringing x there moves less than gathering
        the weight; for a weight that differs from its use in one such letter, split further, as the rows of x are."""
        pairs = zip(self.of_w, parts(self.rest), parts(self.use), strict=True)
        changed = [(letter, rest, use) for letter, rest, use in pairs if rest != use]
        if len(changed) != 1:
            return None
        letter, rest, use = changed[0]
        apart, rows = rest[len(use) :], self.over[self.of_x[0]]
        if rest[: len(use)] != use or not apart or rows[len(rows) - len(apart) :] != apart:
            return None
        sizes = dict(zip(self.of_x + self.of_w, x.shape + w.shape, strict=True))
        parted = {a: sizes[a] // math.prod(self.mesh.shape[m] for m in self.over[a]) for a in sizes}
        given, made, weight = (math.prod(parted[a] for a in term) for term in (self.of_x, self.of_y, self.of_w))
        devices = math.prod(self.mesh.shape[m] for m in apart)
        # Rows of x go whole to every part, or each part's share of them; what is made are sums, or the part's share.
        # What is made travels in float32.
        moved = given * (1 if letter in self.of_x else devices) + 2 * made * (1 if letter in self.of_y else devices)
        return (letter, apart) if moved < weight else None

    def without(self, term: str) -> tuple[str, ...]:
        """The mesh axes over which a product that gives ``term`` is a sum."""
        return tuple(a for letter, axes in self.over.items() if letter not in term for a in axes)


def _forward(x, w, equation, axes, ctx, precision):
    split = Split(equation, x, w, axes, ctx)
    product = partial(jnp.einsum, equation, precision=precision, preferred_element_type=jnp.float32)

    def local(x, w):
        y = product(x, gathered(w, split.rest, split.use, x.dtype))
        return jax.lax.psum(y, split.without(split.of_y))

    if brought := split.brought(x, w):
        multiply = lambda x, w: product(x, w.astype(x.dtype))  # noqa: E731
        local = partial(bring, product=multiply, split=split, letter=brought[0], over=brought[1])
    run = jax.shard_map(local, mesh=ctx.mesh, in_specs=(split.x, split.rest), out_specs=split.y, check_vma=False)
    return run(x, w), (x, w)


def bring(x, w, *, product, split: Split, letter: str, over: tuple[str, ...]):
    """The product of all rows of the devices ``over`` with this device's part of the weight, and each row's back."""
    if letter in split.of_x:
        x = jax.lax.all_to_all(x, over, split_axis=split.of_x.index(letter), concat_axis=0, tiled=True)
    else:
        x = rows_gathered(x, over)
    y = product(x, w)
    if letter in split.of_y:
        y = jax.lax.all_to_all(y, over, split_axis=0, concat_axis=split.of_y.index(letter), tiled=True)
    else:
        y = rows_scattered(y, over)
    return jax.lax.psum(y, split.without(split.of_y))


def _backward(equation, axes, ctx, precision, operands, dy):
    x, w = operands
    split = Split(equation, x, w, axes, ctx)

    def local(x, w, dy):
        whole = gathered(w, split.rest, split.use, x.dtype)
        dx, dw = cotangents(equation, x, whole, dy.astype(x.dtype), precision)
        dx = jax.lax.psum(dx, split.without(split.of_x))
        return dx, to_rest(dw, split.use, split.rest, split.without(split.of_w)).astype(w.dtype)

    specs = (split.x, split.rest, split.y)
    run = jax.shard_map(local, mesh=ctx.mesh, in_specs=specs, out_specs=specs[:2], check_vma=False)
    return run(x, w, dy)


product_at_rest.defvjp(_forward, _backward)
