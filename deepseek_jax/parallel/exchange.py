"""Rows sent between the devices of a mesh axis in slices of any sizes, and back again.

Suffixes: P devices of the axis, S slices a device sends, P x S / P to each, X rows, R rows of the receiving buffer.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """What this device sends and receives; int32 [S], the first S / P entries for the axis's device 0 and so on.

    ``start``: first row of each slice here. ``size``: its rows. ``there``: first row in the receiver's buffer.
    ``from_start``, ``from_size``, ``from_there``: the same of the slices that arrive here: their first row in this
    device's buffer, rows, and first row where they came from.
    """

    start: jax.Array
    size: jax.Array
    there: jax.Array
    from_start: jax.Array
    from_size: jax.Array
    from_there: jax.Array

    def reversed(self) -> "Plan":
        """The plan that returns every row to its place."""
        return Plan(self.from_start, self.from_size, self.from_there, self.start, self.size, self.there)


def exchange(x_X: jax.Array, plan: Plan, rows: int, axis: str, platform: str | None) -> jax.Array:
    """[rows, ...]: what arrives here of all devices' x [X, ...]; rows to which nothing is sent are 0.

    `jax.lax.ragged_all_to_all` where the platform has it; the CPU backend does not, and gathers instead. ``platform``:
    `Context.platform`.
    """
    if platform is not None:
        return (by_gather if platform == "cpu" else ragged)(x_X, plan, rows, axis)
    return jax.lax.platform_dependent(
        cpu=lambda: by_gather(x_X, plan, rows, axis), default=lambda: ragged(x_X, plan, rows, axis)
    )


def ragged(x_X, plan: Plan, rows: int, axis: str) -> jax.Array:
    out = jnp.zeros((rows, *x_X.shape[1:]), x_X.dtype)
    return jax.lax.ragged_all_to_all(x_X, out, plan.start, plan.size, plan.there, plan.from_size, axis_name=axis)


def by_gather(x_X, plan: Plan, rows: int, axis: str) -> jax.Array:
    """The same rows from the same offsets, read out of all devices' arrays."""
    parts = jax.lax.axis_size(axis)
    me, slices = jax.lax.axis_index(axis), plan.start.size // parts
    x_PX = jax.lax.all_gather(x_X, axis)
    start, size, there = (
        jax.lax.dynamic_slice_in_dim(jax.lax.all_gather(a, axis), me * slices, slices, axis=1).reshape(-1)
        for a in (plan.start, plan.size, plan.there)
    )
    row = jnp.arange(rows)[:, None]
    inside = (row >= there) & (row < there + size)
    mine = jnp.argmax(inside, axis=1)
    source = jnp.clip(start[mine] + jnp.arange(rows) - there[mine], 0, x_X.shape[0] - 1)
    filled = inside.any(axis=1).reshape(-1, *(1,) * (x_X.ndim - 1))
    return jnp.where(filled, x_PX[mine // slices, source], 0)
