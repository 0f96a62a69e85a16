"""Embedding rows by token from a table that lies apart on a mesh.

Suffixes: B rows, T tokens, V vocabulary, D width, G devices over which the table's width is split.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE, parts, spec
from deepseek_jax.core.ops import stored
from deepseek_jax.core.params import is_variable
from deepseek_jax.parallel.shardings import parameter_sharding

AXES = ("vocab", "embedding")


def lookup(table_VD, tokens_BT: jax.Array, dtype, ctx: Context) -> jax.Array:
    """`Operations.lookup` on a mesh.

    A parameter's axes are its own; of another table they are an embedding's. It is gathered over ``fsdp`` only. Over
    the other axes its width stays split: each device looks its part up for all tokens of the devices that share the
    table, and they exchange these. So neither a whole table nor all devices' tokens are in memory; the gradient takes
    the same way back.

    Raises LayoutError where the batch does not divide over the mesh.
    """
    table = stored(table_VD, dtype)
    axes = table_VD.get_metadata()["axes"] if is_variable(table_VD) else AXES
    rest = parameter_sharding(axes, table.shape, ctx).spec
    (vocabulary, width), size = parts(rest), table.shape[0]
    shape = (*tokens_BT.shape, table.shape[1])
    token, out = (
        spec(axes, shape[: len(axes)], ctx.layout.use, ctx.mesh, "a batch of tokens")
        for axes in ((BATCH, SEQUENCE), (BATCH, SEQUENCE, None))
    )

    whole = next((i for i, axis in enumerate(width) if axis == "fsdp"), len(width))
    width, gathered = width[:whole], width[whole:]

    def local(table, tokens):
        inside = ((tokens >= 0) & (tokens < size))[..., None]
        for axis in reversed(gathered):
            table = jax.lax.all_gather(table, axis, axis=1, tiled=True)
        tokens = jax.lax.all_gather(tokens, width) if width else tokens[None]
        row = tokens - jax.lax.axis_index(vocabulary) * table.shape[0] if vocabulary else tokens
        x_GBTD = table[jnp.clip(row, 0, table.shape[0] - 1)].astype(dtype)
        if vocabulary:
            x_GBTD = jnp.where(((row >= 0) & (row < table.shape[0]))[..., None], x_GBTD, 0)
        if width:
            x_GBTD = jax.lax.all_to_all(x_GBTD, width, split_axis=0, concat_axis=3, tiled=True)
        return jnp.where(inside, jax.lax.psum(x_GBTD[0], vocabulary), jnp.nan)

    return jax.shard_map(local, mesh=ctx.mesh, in_specs=(rest, token), out_specs=out, check_vma=False)(table, tokens_BT)
