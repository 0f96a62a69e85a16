"""The layers one after the other: a scan over each stack of equal ones, and what the backward pass keeps of a layer.

Suffixes: B batch, T tokens, D width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.configs.layers import Stack
from deepseek_jax.core.context import REMAT, Context
from deepseek_jax.core.params import unstack
from deepseek_jax.model.block import Block
from deepseek_jax.model.outputs import Aux
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.tokens import Tokens


def run_stacks(
    stacks: Sequence[Block],
    segments: tuple[tuple[Stack, ...], ...],
    x_BTD: jax.Array,
    tokens: Tokens,
    ctx: Context,
    held: Sequence[Any] | None = None,
    routing: jax.Array | KnockOut | None = None,
    capture: tuple[str, ...] = (),
) -> tuple[jax.Array, tuple[Any, ...] | None, Aux | None, dict[str, jax.Array]]:
    """The stream after all layers, what each stack's attention holds, router statistics and activations, a row a layer
    that has them.

    ``stacks``: blocks whose leaves have a leading layer axis; ``segments``: which layers they are. ``held``: a cache's.
    ``routing``: int32 [L_moe, B, T, K], experts to use instead of choosing, or those to choose without. ``capture``:
    names of activations (`block.CAPTURABLE`).
    """
    first_moe, statistics, kept, seen = 0, [], [], {name: [] for name in capture}
    # One stack a segment: no config here repeats a longer pattern.
    for number, (stack, (kind,)) in enumerate(zip(stacks, segments, strict=True)):
        size, moe = len(kind.numbers), kind.layer.is_moe
        rows = slice(first_moe, first_moe + size)
        given = jax.tree.map(lambda a, rows=rows: a[rows], routing) if moe else None
        carry = (x_BTD, None if held is None else held[number])
        if size == 1:
            # A scan of one layer would copy its weights. Generation has every layer here: of those that are of one
            # kind one is traced.
            layer = _layer if held is None else _traced_once
            inputs = (unstack(stack, 0), 0, jax.tree.map(lambda a: a[0], given))
            carry, outputs = layer(carry, inputs, tokens, ctx, capture)
            outputs = jax.tree.map(lambda a: a[None], outputs)
        else:
            layer = partial(_layer, tokens=tokens, ctx=ctx, capture=capture)
            carry, outputs = jax.lax.scan(layer, carry, (stack, jnp.arange(size), given))
        (x_BTD, mine), (aux, activations) = carry, outputs
        kept.append(mine)
        if aux is not None:
            statistics.append(aux)
        for name, value in activations.items():
            seen[name].append(value)
        first_moe += size if moe else 0
    aux = jax.tree.map(lambda *a: jnp.concatenate(a), *statistics) if statistics else None
    return (
        x_BTD,
        None if held is None else tuple(kept),
        aux,
        {name: jnp.concatenate(values) for name, values in seen.items()},
    )


def _layer(carry, inputs, tokens: Tokens, ctx: Context, capture: tuple[str, ...]):
    """A scan's step: carry (stream, held), inputs (block, its number in the stack, given), outputs (statistics,
    activations)."""

    def run(carry, inputs):
        (x_BTD, held), (block, i, given) = carry, inputs
        x_BTD, held, aux, activations = block(x_BTD, tokens, ctx, held, i, given, capture)
        return (x_BTD, held), (aux, {name: activations[name] for name in capture if name in activations})

    return remat(run, ctx)(carry, inputs)


_traced_once = jax.jit(_layer, static_argnames=("ctx", "capture"), inline=True)


def remat(f, ctx: Context):
    """``f``, of whose activations the backward pass keeps what ``ctx.remat`` names."""
    if REMAT[ctx.remat] is None:
        return f
    saved, offloaded = REMAT[ctx.remat]
    if not offloaded:
        return jax.checkpoint(f, policy=jax.checkpoint_policies.save_only_these_names(*saved))
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(saved),
        names_which_can_be_offloaded=list(offloaded),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(f, policy=policy)
