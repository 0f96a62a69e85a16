"""Attention where the tokens of a row lie on different devices (context parallelism), and the order they stand in.

Each device's part of the rows stands as rows of its own, P for each, whose keys are those of whole rows.

Suffixes: B rows, T queries, S keys, P devices that share a row.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE, LayoutError
from deepseek_jax.parallel.shardings import activation_sharding


def sequence_parts(ctx: Context) -> int:
    """The number of parts in which a row's tokens lie on different devices."""
    axes = () if ctx.mesh is None else dict(ctx.layout.use).get(SEQUENCE, ())
    return math.prod(ctx.mesh.shape[a] for a in axes)


def whole_rows(ctx: Context) -> Context:
    """The same, but with every row on one device."""
    if sequence_parts(ctx) == 1:
        return ctx
    use = tuple((name, axes) for name, axes in ctx.layout.use if name != SEQUENCE)
    return replace(ctx, layout=replace(ctx.layout, use=use), balanced=False)


def folded(ctx: Context) -> Context:
    """The same for rows of which each device's part stands as a row of its own (`fold_rows`)."""
    use, parts = dict(ctx.layout.use), sequence_parts(ctx)
    use[BATCH] = use.pop(SEQUENCE) + use.get(BATCH, ())
    return replace(ctx, layout=replace(ctx.layout, use=tuple(use.items())), folded=parts)


def constrain(x: jax.Array, axes, ctx: Context) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, activation_sharding(axes, x.shape, ctx))


def attend_rows(attend: Callable, queries, keys, tokens, ctx: Context) -> jax.Array:
    """`Operations.rows`: of tokens on other devices only ``keys`` are gathered, such as MLA's latents: all heads' keys
    and values follow from them."""
    heads = ("heads", None)
    axes = lambda a: heads if a.ndim == 4 else (None,)  # noqa: E731
    queries = jax.tree.map(lambda q: fold_rows(q, ctx, *axes(q)), queries)
    keys = jax.tree.map(lambda k: copy_rows(k, ctx, *axes(k)), keys)
    found = attend(*queries, *keys, fold_tokens(tokens, ctx), folded(ctx))
    return jax.tree.map(lambda a: unfold_rows(a, ctx), found)


def attend_halves(attend: Callable, q_BT, k_BS, v_BS, tokens, parts: int) -> jax.Array:
    """Attention of `fold_rows`'s queries in `balanced_order` to `copy_rows`'s keys, each of ``parts`` runs of them.

    Queries of a row's first half need the first half's keys only, on every device alike.
    """

    def early(a_BS):
        runs = rearrange(a_BS, "B (P H S) ... -> B P H S ...", P=parts, H=2)
        return rearrange(runs[:, :, 0], "B P S ... -> B (P S) ...")

    half, outputs = tokens.position.shape[1] // 2, []
    for queries, seen in ((slice(0, half), early), (slice(half, None), lambda a: a)):
        part = replace(
            tokens,
            position=tokens.position[:, queries],
            segment=tokens.segment[:, queries],
            key_position=seen(tokens.key_position),
            key_segment=seen(tokens.key_segment),
        )
        rows = jax.tree.map(lambda a, queries=queries: a[:, queries], q_BT)
        outputs.append(attend(rows, jax.tree.map(seen, k_BS), seen(v_BS), part))
    return jnp.concatenate(outputs, axis=1)


def fold_rows(a_BT: jax.Array, ctx: Context, *axes: str | None) -> jax.Array:
    """[P x B, T / P, ...]: the parts of each row that lie on different devices, as rows. ``axes``: the other axes."""
    parts = rearrange(a_BT, "B (P T) ... -> P B T ...", P=sequence_parts(ctx))
    parts = constrain(parts, (SEQUENCE, BATCH, None, *axes), ctx)
    return constrain(rearrange(parts, "P B ... -> (P B) ..."), ((SEQUENCE, BATCH), None, *axes), ctx)


def unfold_rows(a_BT: jax.Array, ctx: Context) -> jax.Array:
    """[B, T, ...] of `fold_rows`'s rows."""
    parts = rearrange(a_BT, "(P B) ... -> P B ...", P=sequence_parts(ctx))
    parts = constrain(parts, (SEQUENCE, BATCH, *(None,) * (a_BT.ndim - 1)), ctx)
    return rearrange(parts, "P B T ... -> B (P T) ...")


def copy_rows(a_BS: jax.Array, ctx: Context, *axes: str | None) -> jax.Array:
    """[P x B, S, ...]: whole rows for each of the P parts, gathered from the devices that hold them. ``axes``: the
    other axes.

    The copies' gradients are summed after whatever is computed from a copy, at the width of this array.
    """
    whole = constrain(a_BS, (BATCH, None, *axes), ctx)
    copies = jnp.broadcast_to(whole, (sequence_parts(ctx), *a_BS.shape))
    copies = constrain(copies, (SEQUENCE, BATCH, None, *axes), ctx)
    return constrain(rearrange(copies, "P B ... -> (P B) ..."), ((SEQUENCE, BATCH), None, *axes), ctx)


def fold_tokens(tokens, ctx: Context):
    """The tokens of `fold_rows`'s queries among `copy_rows`'s keys."""
    return replace(
        tokens,
        id=None,  # attention asks for none
        position=fold_rows(tokens.position, ctx),
        segment=fold_rows(tokens.segment, ctx),
        key_position=copy_rows(tokens.key_position, ctx),
        key_segment=copy_rows(tokens.key_segment, ctx),
        causal=False,
        uniform=False,
    )


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
