"""The layers one after the other: a scan over each run of a pattern, and what the backward pass keeps of a layer.

Suffixes: B batch, T tokens, D width, H streams.
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
    x: jax.Array,
    tokens: Tokens,
    ctx: Context,
    held: Sequence[Any] | None = None,
    routing: jax.Array | KnockOut | None = None,
    capture: tuple[str, ...] = (),
) -> tuple[jax.Array, tuple[Any, ...] | None, Aux | None, dict[str, jax.Array]]:
    """The stream [B, T, D] or streams [B, T, H, D] after all layers, what each stack's attention holds, router
    statistics and activations, a row a layer that has them.

    ``stacks``: blocks whose leaves have a leading layer axis; ``segments``: which layers they are. ``held``: a cache's.
    ``routing``: int32 [L_moe, B, T, K], experts to use instead of choosing, or those to choose without. ``capture``:
    names of activations (`block.CAPTURABLE`).
    """
    stacks, held = iter(stacks), None if held is None else iter(held)
    first_moe, statistics, kept, seen = 0, [], [], {name: [] for name in capture}
    for kinds in segments:
        size, moe = len(kinds[0].numbers), [kind.layer.is_moe for kind in kinds]
        # The rows of ``routing`` of each stack with experts: every so many-th.
        last_moe, firsts = first_moe + size * sum(moe), iter(range(first_moe, first_moe + sum(moe)))
        rows = [slice(next(firsts), last_moe, sum(moe)) if has else None for has in moe]
        given = [None if mine is None else jax.tree.map(lambda a, mine=mine: a[mine], routing) for mine in rows]
        blocks = [next(stacks) for _ in kinds]
        carry = (x, None if held is None else [next(held) for _ in kinds])
        if size == 1:
            # A scan of one layer would copy its weights. Generation has every layer here: of those that are of one
            # kind one is traced.
            layers = _layers if held is None else _traced_once
            inputs = ([unstack(block, 0) for block in blocks], 0, jax.tree.map(lambda a: a[0], given))
            carry, outputs = layers(carry, inputs, tokens, ctx, capture)
            outputs = jax.tree.map(lambda a: a[None], outputs)
        else:
            layers = partial(_layers, tokens=tokens, ctx=ctx, capture=capture)
            carry, outputs = jax.lax.scan(layers, carry, (blocks, jnp.arange(size), given), unroll=ctx.unrolled)
        x, mine = carry
        kept += mine or []
        if any(moe):
            statistics.append(_in_layer_order([aux for aux, _ in outputs if aux is not None]))
        for name in capture:
            if values := [activations[name] for _, activations in outputs if name in activations]:
                seen[name].append(_in_layer_order(values))
        first_moe = last_moe
    aux = jax.tree.map(lambda *a: jnp.concatenate(a), *statistics) if statistics else None
    return (
        x,
        None if held is None else tuple(kept),
        aux,
        {name: jnp.concatenate(values) for name, values in seen.items() if values},
    )


def _in_layer_order(of_stacks: list) -> Any:
    """Rows of a segment's layers, of which every stack has every so many-th."""
    if len(of_stacks) == 1:
        return of_stacks[0]
    return jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *of_stacks)


def _layers(carry, inputs, tokens: Tokens, ctx: Context, capture: tuple[str, ...]):
    """A scan's step, one layer of each stack of a segment: carry (stream, held of each), inputs (blocks, their number
    in their stacks, given of each), outputs (statistics, activations) of each."""
    (x, held), (blocks, i, given), outputs, kept = carry, inputs, [], []

    def run(carry, inputs):
        (x, held), (block, i, given) = carry, inputs
        x, held, aux, activations = block(x, tokens, ctx, held, i, given, capture)
        return (x, held), (aux, {name: activations[name] for name in capture if name in activations})

    for j, block in enumerate(blocks):
        carry = (x, None if held is None else held[j])
        (x, mine), output = remat(run, ctx)(carry, (block, i, given[j]))
        kept.append(mine)
        outputs.append(output)
    return (x, None if held is None else kept), outputs


_traced_once = jax.jit(_layers, static_argnames=("ctx", "capture"), inline=True)


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
