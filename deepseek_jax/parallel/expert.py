"""Routed experts on a mesh: tokens go to the devices that hold their experts, and come back.

Each device sorts its assignments by expert and sends them in rounds (`parallel.rounds`), of which there are as many as
the fullest device of an expert group needs: none of the assignments is dropped, whatever the routing. With ``ctx.drop``
there is one round, and what lies beyond it is dropped and counted. A device's tokens may go in several chunks
(``ctx.expert_chunks``), so that one can travel while another is computed.

The backward pass repeats the rounds: it sends tokens and their gradients and computes the experts' inner activations
again, so that nothing of the size of the buffer is kept, and the experts' outputs are not sent a second time.

Suffixes: B rows, T tokens, N tokens of a chunk, K chosen experts, M = N x K assignments, E experts, L experts of this
device, P devices of the expert axis, R rows of the buffer, C chunks, D width, F expert width.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE, LayoutError, parts, spec
from deepseek_jax.core.quant import Quantized
from deepseek_jax.parallel.collectives import gathered, to_rest
from deepseek_jax.parallel.quantized import part, part_specs
from deepseek_jax.parallel.rounds import Stage, Trip, each_round, expert_parts
from deepseek_jax.parallel.shardings import parameter_sharding

WEIGHTS = (("expert", "embed", None, "expert_ffn"), ("expert", "expert_ffn", "embed"))
TOKEN = (BATCH, SEQUENCE, None)


def dispatch(
    experts, x_BTD: jax.Array, index_BTK: jax.Array, weight_BTK: jax.Array, gate_up: jax.Array, down: jax.Array, ctx
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of each token's experts [B, T, D], and int32 assignments dropped on all devices.

    ``experts``: the computation on one device, `model.experts.Experts`; an index of -1 is nobody's. ``gate_up``:
    [E, D, 2, F], ``down``: [E, F, D], laid out as at rest; they are gathered here, in x's dtype. `Quantized` ones, if
    `rests_in_use`, are not: they have no gradient.

    Raises LayoutError when batch, sequence or experts do not divide over the mesh, or a device's tokens into chunks.
    """
    for w, axes in zip((gate_up, down), WEIGHTS, strict=True):
        spec(axes, w.shape, ctx.layout.use, ctx.mesh, "the experts' weights")
    return _dispatch(x_BTD, index_BTK, weight_BTK, gate_up, down, experts, ctx)


def rests_in_use(w, ctx: Context) -> bool:
    """Whether a quantised weight of the experts lies in use where it rests, so that nothing of it is gathered."""
    if not isinstance(w, Quantized):
        return False
    axes = next(axes for axes in WEIGHTS if len(axes) == len(w.shape))
    rest, use = (parameter_sharding(axes, w.shape, ctx, used).spec for used in (False, True))
    return rest == use


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _dispatch(x_BTD, index_BTK, weight_BTK, gate_up, down, experts, ctx: Context):
    return _forward(x_BTD, index_BTK, weight_BTK, gate_up, down, experts, ctx)[0]


def _specs(x, index, gate_up, down, ctx: Context):
    """Of tokens, of their choices, of both weights at rest and in use, and of them as they are given."""
    token, choice = (spec(TOKEN, a.shape, ctx.layout.use, ctx.mesh, "an activation") for a in (x, index))
    rest, use = (
        [parameter_sharding(axes, w.shape, ctx, used).spec for axes, w in zip(WEIGHTS, (gate_up, down), strict=True)]
        for used in (False, True)
    )
    given = [
        part_specs(w, axes, ctx) if isinstance(w, Quantized) else split
        for w, axes, split in zip((gate_up, down), WEIGHTS, rest, strict=True)
    ]
    return token, choice, rest, use, given


def _forward(x, index, weight, gate_up, down, experts, ctx: Context):
    token, choice, rest, use, given = _specs(x, index, gate_up, down, ctx)
    out = jax.shard_map(
        partial(_forward_here, experts=experts, ctx=ctx, over=_axes(token), rest=rest, use=use, given=given),
        mesh=ctx.mesh,
        in_specs=(token, choice, choice, *given),
        out_specs=(token, PartitionSpec()),
        check_vma=False,
    )(x, index, weight, gate_up, down)
    return out, (x, index, weight, gate_up, down)


def _backward(experts, ctx: Context, residuals, cotangents):
    x, index, weight, gate_up, down = residuals
    if isinstance(gate_up, Quantized):
        raise ValueError("quantised experts on a mesh have no gradient; load the model with dtype=jnp.bfloat16.")
    token, choice, rest, use, _ = _specs(x, index, gate_up, down, ctx)
    dx, dweight, d_gate_up, d_down = jax.shard_map(
        partial(_backward_here, experts=experts, ctx=ctx, over=_axes(token), rest=rest, use=use),
        mesh=ctx.mesh,
        in_specs=(token, choice, choice, *rest, token),
        out_specs=(token, choice, *rest),
        check_vma=False,
    )(x, index, weight, gate_up, down, cotangents[0])
    return dx, None, dweight, d_gate_up, d_down


_dispatch.defvjp(_forward, _backward)


def _axes(split: PartitionSpec) -> tuple[str, ...]:
    return tuple(axis for mine in parts(split) for axis in mine)


# --- On one device --------------------------------------------------------------------------------------------


def _forward_here(x_BTD, index_BTK, weight_BTK, gate_up, down, *, experts, ctx: Context, over, rest, use, given):
    if isinstance(gate_up, Quantized):
        gate_up, down = (part(w, specs) for w, specs in zip((gate_up, down), given, strict=True))
    else:
        gate_up, down = _in_use((gate_up, down), x_BTD.dtype, rest, use)
    chunks = [_chunked(a, ctx) for a in (x_BTD, index_BTK, weight_BTK)]
    if expert_parts(ctx) == 1:
        y_CND = jnp.stack([experts.routed(*chunk, gate_up, down) for chunk in zip(*chunks, strict=True)])
        return jax.lax.psum(y_CND, _tensor(ctx)).reshape(x_BTD.shape), jnp.zeros((), jnp.int32)

    def send(trip, held, x_ND, weight_NK):
        held |= {"x": trip.there(x_ND), "weight": trip.weights(weight_NK)}

    def product_up(trip, held):
        held["h"] = experts.up(held.pop("x"), gate_up, trip.sizes_L)

    def product_down(trip, held):
        held["y"] = experts.down(held.pop("h"), held.pop("weight"), down, trip.sizes_L)

    def back(trip, held):
        held["result"] = trip.back(held.pop("y"))

    x_CND, index_CNK, weight_CNK = chunks
    stages = [Stage(product_up, send), Stage(product_down, behind=back)]
    make = partial(Trip, experts_here=gate_up.shape[0], experts=experts, ctx=ctx)
    y_CND, _, beyond = each_round(stages, make, index_CNK, [x_CND, weight_CNK])
    dropped = jax.lax.psum(beyond, over) if ctx.drop else jnp.zeros((), jnp.int32)
    return jax.lax.psum(y_CND, _tensor(ctx)).reshape(x_BTD.shape), dropped


def _backward_here(x_BTD, index_BTK, weight_BTK, gate_up, down, dy_BTD, *, experts, ctx: Context, over, rest, use):
    w_up, w_down = _in_use((gate_up, down), x_BTD.dtype, rest, use)
    x_CND, index_CNK, weight_CNK, dy_CND = (_chunked(a, ctx) for a in (x_BTD, index_BTK, weight_BTK, dy_BTD))

    def send_x(trip, held, x_ND, weight_NK, dy_ND):
        held |= {"x": trip.there(x_ND), "weight": trip.weights(weight_NK)}

    def send_dy(trip, held, x_ND, weight_NK, dy_ND):
        held["dy"] = trip.there(dy_ND)

    def product_up(trip, held):
        held["h"] = experts.up(held["x"], w_up, trip.sizes_L)

    def product_down(trip, held):
        rows = (held.pop(name) for name in ("h", "weight", "dy"))
        held["dh"], held["dweight"], d_down = experts.down_backward(*rows, w_down, trip.sizes_L)
        held["sums"] = {"down": d_down}

    def last_products(trip, held):
        rows = (held.pop(name) for name in ("x", "dh"))
        held["dx"], held["sums"]["up"] = experts.up_backward(*rows, w_up, trip.sizes_L)

    def back(trip, held):
        held["result"] = trip.back(held.pop("dx")), trip.weights_back(held.pop("dweight"))

    if expert_parts(ctx) == 1:

        def gradients(x_ND, index_NK, weight_NK, dy_ND):
            _, vjp = jax.vjp(lambda x, w, *both: experts.routed(x, index_NK, w, *both), x_ND, weight_NK, w_up, w_down)
            return vjp(dy_ND)

        every = [gradients(*chunk) for chunk in zip(x_CND, index_CNK, weight_CNK, dy_CND, strict=True)]
        tokens = jax.tree.map(lambda *a: jnp.stack(a), *(each[:2] for each in every))
        d_up, d_down = jax.tree.map(lambda *a: reduce(jnp.add, a), *(each[2:] for each in every))
    else:
        stages = [
            Stage(product_up, ahead=send_x),
            Stage(product_down, ahead=send_dy),
            Stage(last_products, behind=back),
        ]
        make = partial(Trip, experts_here=w_up.shape[0], experts=experts, ctx=ctx)
        tokens, sums, _ = each_round(stages, make, index_CNK, [x_CND, weight_CNK, dy_CND])
        d_up, d_down = sums["up"], sums["down"]
    dx_CND, dweight_CNK = jax.lax.psum(tokens, _tensor(ctx))
    pairs = zip((d_up, d_down), (gate_up, down), rest, use, strict=True)
    dw = (_at_rest(d, w, r, u, over) for d, w, r, u in pairs)
    return dx_CND.reshape(x_BTD.shape), dweight_CNK.reshape(weight_BTK.shape), *dw


def _in_use(weights, dtype, rest, use) -> list[jax.Array]:
    """Both weights in use, gate and up fused, [E, D, 2F] and [E, F, D]. Fused before it is gathered: an axis of two
    next to the last has a layout on TPU that every product would convert."""
    return [
        gathered(w.reshape(*w.shape[:2], -1), *_fused(r, u), dtype) for w, r, u in zip(weights, rest, use, strict=True)
    ]


def _at_rest(dw_EDZ, like, rest, use, over) -> jax.Array:
    """A gradient of `_in_use`'s, as its weight lies at rest."""
    return to_rest(dw_EDZ, *reversed(_fused(rest, use)), over).reshape(like.shape).astype(like.dtype)


def _fused(rest: PartitionSpec, use: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
    """Of an expert's width, each device has its part of the gate and of the up projection, side by side."""
    return tuple(PartitionSpec(*split[:2], split[-1]) for split in (rest, use))


def _tensor(ctx: Context) -> tuple[str, ...]:
    """The mesh axes over which an expert's width is split: each device has a part of every sum."""
    return tuple(a for a in dict(ctx.layout.use).get("expert_ffn", ()) if ctx.mesh.shape[a] > 1)


def _chunked(a_BTX: jax.Array, ctx: Context) -> jax.Array:
    """[C, N, ...]: the tokens of this device in chunks; decoding's few go in one."""
    tokens = math.prod(a_BTX.shape[:2])
    chunks = ctx.expert_chunks if a_BTX.shape[1] > 1 else 1
    if tokens % chunks:
        raise LayoutError(f"the {tokens} tokens of a device do not divide into expert_chunks={chunks}.")
    return a_BTX.reshape(chunks, tokens // chunks, *a_BTX.shape[2:])
