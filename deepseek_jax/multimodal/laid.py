"""Where arrays of rows lie on a mesh, for what is drawn, shown and trained."""

from functools import lru_cache

import jax
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.parallel.placement import place_batch
from deepseek_jax.parallel.shardings import activation_sharding


def rows_at(shape: tuple[int, ...], ctx: Context):
    """The sharding of an array whose first axis is rows."""
    return activation_sharding((BATCH, *(None,) * (len(shape) - 1)), shape, ctx)


def compiled(function, donated: str, places=None):
    """``function`` under jit with a static ``ctx``; ``places``: the shardings of what it returns, None on one device.

    What is given away and comes back lies where it lay, so that a second call finds the program of the first.
    """
    if places is None:
        return _compiled(function, donated)
    leaves, structure = jax.tree.flatten(places)
    return _compiled(function, donated, structure, tuple(leaves))


@lru_cache
def _compiled(function, donated: str, structure=None, leaves: tuple = ()):
    out = {} if structure is None else {"out_shardings": jax.tree.unflatten(structure, leaves)}
    return jax.jit(function, static_argnames=("ctx",), donate_argnames=(donated,), **out)


def place_rows(rows, ctx: Context):
    """An `objective.Text` or `objective.Pictures` with its rows, and as many pictures for each, on the devices that
    compute them; unchanged without a mesh. Raises LayoutError where they do not divide over the devices."""
    if ctx.mesh is None:
        return rows
    arrays = {name: np.asarray(a) for name, a in vars(rows).items() if a is not None}
    return type(rows)(**place_batch(arrays, ctx))
