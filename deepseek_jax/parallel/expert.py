"""Routed experts on a mesh: tokens go to the devices that hold their experts, and come back.

Each device sorts its assignments by expert. A receiving device sees all that is meant for it as one array, sorted by
its experts and within an expert by sender; a round moves one window of ``rows`` of that array. Windows are as long as
the buffer, and there are as many rounds as the fullest device of an expert group needs: none of the assignments is
dropped, whatever the routing. With ``ctx.drop`` there is one round, and what lies beyond its window is dropped and
counted. A device's tokens may go in several chunks (``ctx.expert_chunks``), one after the other in the program, so
that the compiler can send one while it computes another. Each chunk's first round stands in straight line; what is
left over, which is nothing when the load is near its mean, follows in one loop behind all chunks.

The backward pass repeats the rounds: it sends tokens and their gradients and computes the experts' inner activations
again, so that nothing of the size of the buffer is kept, and the experts' outputs are not sent a second time.

Suffixes: B rows, T tokens, N tokens of a chunk, K chosen experts, M = N x K assignments, E experts, L experts of this
device, P devices of the expert axis, R rows of the buffer, C chunks, D width, F expert width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core.axes import (
    BATCH,
    SEQUENCE,
    LayoutError,
    gathered,
    parameter_sharding,
    parts,
    spec,
    to_rest,
)
from deepseek_jax.core.context import Context
from deepseek_jax.parallel.exchange import Plan, exchange

AXIS = "expert"
WEIGHTS = (("expert", "embed", None, "expert_ffn"), ("expert", "expert_ffn", "embed"))
TOKEN = (BATCH, SEQUENCE, None)


def dispatch(
    experts, x_BTD: jax.Array, index_BTK: jax.Array, weight_BTK: jax.Array, gate_up: jax.Array, down: jax.Array, ctx
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of each token's experts [B, T, D], and int32 assignments dropped on all devices.

    ``experts``: the computation on one device, `model.experts.Experts`; an index of -1 is nobody's. ``gate_up``:
    [E, D, 2, F], ``down``: [E, F, D], laid out as at rest; they are gathered here, in x's dtype.

    Raises LayoutError when batch, sequence or experts do not divide over the mesh, or a device's tokens into chunks.
    """
    for w, axes in zip((gate_up, down), WEIGHTS, strict=True):
        spec(axes, w.shape, ctx.layout.use, ctx.mesh, "the experts' weights")
    return _dispatch(x_BTD, index_BTK, weight_BTK, gate_up, down, experts, ctx)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _dispatch(x_BTD, index_BTK, weight_BTK, gate_up, down, experts, ctx: Context):
    return _forward(x_BTD, index_BTK, weight_BTK, gate_up, down, experts, ctx)[0]


def _specs(x, index, gate_up, down, ctx: Context):
    """Of tokens, of their choices, and of both weights at rest and in use."""
    token, choice = (spec(TOKEN, a.shape, ctx.layout.use, ctx.mesh, "an activation") for a in (x, index))
    rest, use = (
        [parameter_sharding(axes, w.shape, ctx, used).spec for axes, w in zip(WEIGHTS, (gate_up, down), strict=True)]
        for used in (False, True)
    )
    return token, choice, rest, use


def _forward(x, index, weight, gate_up, down, experts, ctx: Context):
    token, choice, rest, use = _specs(x, index, gate_up, down, ctx)
    out = jax.shard_map(
        partial(_forward_here, experts=experts, ctx=ctx, over=_axes(token), rest=rest, use=use),
        mesh=ctx.mesh,
        in_specs=(token, choice, choice, *rest),
        out_specs=(token, PartitionSpec()),
        check_vma=False,
    )(x, index, weight, gate_up, down)
    return out, (x, index, weight, gate_up, down)


def _backward(experts, ctx: Context, residuals, cotangents):
    x, index, weight, gate_up, down = residuals
    token, choice, rest, use = _specs(x, index, gate_up, down, ctx)
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


def _forward_here(x_BTD, index_BTK, weight_BTK, gate_up, down, *, experts, ctx: Context, over, rest, use):
    gate_up, down = _in_use((gate_up, down), x_BTD.dtype, rest, use)
    chunks = [_chunked(a, ctx) for a in (x_BTD, index_BTK, weight_BTK)]
    if _parts(ctx) == 1:
        y_CND = jnp.stack([experts.routed(*chunk, gate_up, down, ctx) for chunk in zip(*chunks, strict=True)])
        return jax.lax.psum(y_CND, _tensor(ctx)).reshape(x_BTD.shape), jnp.zeros((), jnp.int32)

    def send(trip, held, x_ND, weight_NK):
        held |= {"x": trip.there(x_ND), "weight": trip.weights(weight_NK)}

    def product_up(trip, held):
        held["h"] = experts.up(held.pop("x"), gate_up, trip.sizes_L, ctx.experts)

    def product_down(trip, held):
        held["y"] = experts.down(held.pop("h"), held.pop("weight"), down, trip.sizes_L, ctx.experts)

    def back(trip, held):
        held["result"] = trip.back(held.pop("y"))

    x_CND, index_CNK, weight_CNK = chunks
    stages = [Stage(product_up, send), Stage(product_down, behind=back)]
    make = partial(Trip, experts_here=gate_up.shape[0], experts=experts, ctx=ctx)
    y_CND, _, beyond = _each_round(stages, make, index_CNK, [x_CND, weight_CNK])
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
        held["h"] = experts.up(held["x"], w_up, trip.sizes_L, ctx.experts)

    def product_down(trip, held):
        rows = (held.pop(name) for name in ("h", "weight", "dy"))
        held["dh"], held["dweight"], d_down = experts.down_backward(*rows, w_down, trip.sizes_L, ctx.experts)
        held["sums"] = {"down": d_down}

    def last_products(trip, held):
        rows = (held.pop(name) for name in ("x", "dh"))
        held["dx"], held["sums"]["up"] = experts.up_backward(*rows, w_up, trip.sizes_L, ctx.experts)

    def back(trip, held):
        held["result"] = trip.back(held.pop("dx")), trip.weights_back(held.pop("dweight"))

    if _parts(ctx) == 1:

        def gradients(x_ND, index_NK, weight_NK, dy_ND):
            _, vjp = jax.vjp(
                lambda x, w, *both: experts.routed(x, index_NK, w, *both, ctx), x_ND, weight_NK, w_up, w_down
            )
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
        tokens, sums, _ = _each_round(stages, make, index_CNK, [x_CND, weight_CNK, dy_CND])
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


def _parts(ctx: Context) -> int:
    return ctx.mesh.shape[AXIS] if AXIS in dict(ctx.layout.use).get("expert", ()) else 1


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


# --- The rounds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A step of a chunk's computation, and what travels meanwhile: of the next chunk (``ahead``, which is given its
    tokens), or of the one before (``behind``). Each changes what is held of its chunk, a dict."""

    compute: Callable
    ahead: Callable | None = None
    behind: Callable | None = None


def _each_round(stages: list[Stage], make, index_CNK: jax.Array, tokens_CN: list[jax.Array]):
    """All rounds of all chunks; ``make(index_NK, number)`` makes a `Trip`.

    Returns every chunk's "result" [C, N, ...] and the total of its "sums", both added up over the rounds, and the
    assignments beyond the first round.
    """
    chunks = len(index_CNK)
    trips = [make(index_CNK[c], 0) for c in range(chunks)]
    held: list[dict] = [{} for _ in trips]

    def run(action, chunk):
        if action is not None and 0 <= chunk < chunks:
            action(trips[chunk], held[chunk], *([a[chunk] for a in tokens_CN] if action in ahead else ()))

    ahead = [stage.ahead for stage in stages]
    for stage in stages:
        run(stage.ahead, 0)
    for chunk in range(chunks):
        for stage in stages:
            # Left alone, the compiler's scheduler sends all chunks first and brings all back at the end. Between two
            # barriers it has one computation and one exchange, and runs them side by side.
            held, tokens_CN = jax.lax.optimization_barrier((held, tokens_CN))
            run(stage.compute, chunk)
            run(stage.ahead, chunk + 1)
            run(stage.behind, chunk - 1)
        if chunk and "sums" in held[chunk]:
            held[chunk]["sums"] = jax.tree.map(jnp.add, held[chunk - 1].pop("sums"), held[chunk]["sums"])
    for stage in stages:
        run(stage.behind, chunks - 1)
    results = jax.tree.map(lambda *a: jnp.stack(a), *(h["result"] for h in held))
    sums = held[-1].get("sums", {})
    rounds = [trip.rounds for trip in trips]
    beyond = reduce(jnp.add, (r.beyond for r in rounds))
    if rounds[0].single:
        return results, sums, beyond
    extra_C = jnp.stack([r.extra for r in rounds])
    ends_C = jnp.cumsum(extra_C)

    def left_over(i, totals):
        chunk = (ends_C <= i).sum()
        index_NK, *tokens = (jax.lax.dynamic_index_in_dim(a, chunk, keepdims=False) for a in (index_CNK, *tokens_CN))
        trip, own = make(index_NK, 1 + i - (ends_C[chunk] - extra_C[chunk])), {}
        for stage in stages:
            if stage.ahead is not None:
                stage.ahead(trip, own, *tokens)
        for stage in stages:
            stage.compute(trip, own)
        for stage in stages:
            if stage.behind is not None:
                stage.behind(trip, own)
        results, sums = totals
        results = jax.tree.map(lambda a, b: a.at[chunk].add(b), results, own["result"])
        return results, jax.tree.map(jnp.add, sums, own.get("sums", {}))

    return *jax.lax.fori_loop(0, ends_C[-1], left_over, (results, sums)), beyond


class Trip:
    """A round of one chunk: its rows to their experts' devices, and what is computed there back to the tokens."""

    def __init__(self, index_NK: jax.Array, number, *, experts_here: int, experts, ctx: Context):
        (N, self.K), devices = index_NK.shape, _parts(ctx)
        self.order_M, self.inverse_M, sizes_E = experts.sort(index_NK, experts_here * devices)
        # A token chooses different experts, so that no device ever gets more than this from another.
        worst = devices * N * min(self.K, experts_here)
        rows = min(math.ceil(ctx.expert_buffer * index_NK.size), worst)
        self.rounds = Rounds(sizes_E, rows, rows == worst or ctx.drop)
        self.plan, self.sizes_L = self.rounds.window(number)
        self.platform = ctx.platform

    def _send(self, a_MX: jax.Array) -> jax.Array:
        return exchange(a_MX, self.plan, self.rounds.rows, AXIS, self.platform)

    def _return(self, a_RX: jax.Array) -> jax.Array:
        """[N, K, ...]: rows of this round at their tokens, zeros where an assignment was not in it."""
        a_MX = exchange(a_RX, self.plan.reversed(), self.order_M.size, AXIS, self.platform)
        return a_MX[self.inverse_M].reshape(-1, self.K, *a_RX.shape[1:])

    def there(self, x_ND: jax.Array) -> jax.Array:
        """[R, D]: each token at every expert that it chose."""
        return self._send(x_ND[self.order_M // self.K])

    def weights(self, weight_NK: jax.Array) -> jax.Array:
        """[R, 1]"""
        return self._send(weight_NK.reshape(-1)[self.order_M])[:, None]

    def back(self, y_RD: jax.Array) -> jax.Array:
        """[N, D]: the sum of what comes back to each token."""
        return self._return(y_RD).astype(jnp.float32).sum(1).astype(y_RD.dtype)

    def weights_back(self, dweight_R1: jax.Array) -> jax.Array:
        """[N, K]"""
        return self._return(dweight_R1[:, 0])


class Rounds:
    """Windows of ``rows`` over what every device of the axis receives. Made on each device from its own counts."""

    def __init__(self, sizes_E: jax.Array, rows: int, single: bool):
        self.rows, self.single = rows, single
        devices, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
        self.local = sizes_E.size // devices
        size_PE = jax.lax.all_gather(sizes_E, AXIS)
        start_PE = jnp.cumsum(size_PE, axis=1) - size_PE
        # Where a slice begins in its receiver's array: after the experts before, and the senders before.
        by_receiver = size_PE.reshape(devices, devices, self.local).transpose(1, 2, 0).reshape(devices, -1)
        ends = jnp.cumsum(by_receiver, axis=1)
        place = (ends - by_receiver).reshape(devices, self.local, devices).transpose(2, 0, 1)
        self.size_PE, self.start_PE, self.place_PE = size_PE, start_PE, place.reshape(devices, -1)
        self.me = me
        # As many as the fullest device of the group needs, the first apart.
        self.extra = jnp.maximum(-(-ends[:, -1].max() // rows) - 1, 0)
        # Of what this device sends.
        beyond_E = jnp.clip(self.place_PE[me] + size_PE[me] - rows, 0, size_PE[me])
        self.beyond = beyond_E.sum()

    def window(self, number) -> tuple[Plan, jax.Array]:
        """The plan of a round, and int32 [L], the rows that it brings to each expert of this device."""
        first = number * self.rows
        begin = jnp.clip(self.place_PE, first, first + self.rows)
        end = jnp.clip(self.place_PE + self.size_PE, first, first + self.rows)
        size, there = end - begin, begin - first
        start = self.start_PE + jnp.where(size > 0, begin - self.place_PE, 0)

        def arriving(a_PE):
            return jax.lax.dynamic_slice_in_dim(a_PE, self.me * self.local, self.local, axis=1)

        def leaving(a_PE):
            return a_PE[self.me].astype(jnp.int32)

        arrived = tuple(arriving(a).reshape(-1).astype(jnp.int32) for a in (there, size, start))
        plan = Plan(leaving(start), leaving(size), leaving(there), *arrived)
        return plan, arriving(size).sum(0).astype(jnp.int32)
