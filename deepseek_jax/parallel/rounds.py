"""Chunks of a device's tokens on their way to the experts' devices and back, in rounds of a bounded buffer.

A receiving device sees all that is meant for it as one array, sorted by its experts and within an expert by sender; a
round moves one window of ``rows`` of that array. Each chunk's first round stands in straight line; what is left over,
which is nothing when the load is near its mean, follows in one loop behind all chunks.

Suffixes: N tokens of a chunk, K chosen experts, M = N x K assignments, E experts, L experts of this device, P devices
of the expert axis, R rows of the buffer, C chunks, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp

from deepseek_jax.core.context import Context
from deepseek_jax.parallel.exchange import Plan, exchange

AXIS = "expert"


def expert_parts(ctx: Context) -> int:
    """The number of devices over which experts are split."""
    return ctx.mesh.shape[AXIS] if AXIS in dict(ctx.layout.use).get("expert", ()) else 1


@dataclass(frozen=True)
class Stage:
    """A step of a chunk's computation, and what travels meanwhile: of the next chunk (``ahead``, which is given its
    tokens), or of the one before (``behind``). Each changes what is held of its chunk, a dict."""

    compute: Callable
    ahead: Callable | None = None
    behind: Callable | None = None


def each_round(stages: list[Stage], make, index_CNK: jax.Array, tokens_CN: list[jax.Array]):
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
        (N, self.K), devices = index_NK.shape, expert_parts(ctx)
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
