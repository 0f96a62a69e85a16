"""Rows of one cache that come and go: a prompt enters one slot, while the others decode.

Each function runs on the device, is compiled once for a batcher's shapes, and takes its state over. What a slot gives
depends on its own tokens, seed and settings only: not on which slot it is, and not on what the others do.

Suffixes: B slots, S tokens of room in each, N stop ids, V vocabulary, W tokens that one call may add to a slot.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation import loop
from deepseek_jax.generation.loop import TOP, State
from deepseek_jax.generation.running import empty_record, idle
from deepseek_jax.generation.sampling import Sampling, make_sampling, unpacked
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import Transformer

STOPS = 16  # stop ids that a slot may have


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """``state``: with a bias, and records of the likeliest tokens, of which no more are kept than a call can add."""

    state: State
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Row:
    """What a slot is to continue, and how: ``tokens``: int32 [S], ``known`` of them a prompt's. ``limit``, ``drafts``:
    int32. ``stop``: int32 [N]. ``bias``: float32 [V]. ``sampling``: numbers."""

    tokens: jax.Array
    known: jax.Array
    limit: jax.Array
    drafts: jax.Array
    stop: jax.Array
    bias: jax.Array
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class News:
    """What a call to `decode` added: ``count``: int32 [B], tokens of each slot, which are the first of ``tokens``,
    int32 [B, W], with ``logprob`` and ``behaviour``, float32; ``top``: [B, W, ...], where asked for. ``done``: bool
    [B]. ``draft``: int32 [B, W], which of its step's drafts each token is, from 1, or 0. ``drafted``, ``accepted``:
    int32 [B], of the whole row."""

    count: jax.Array
    tokens: jax.Array
    logprob: jax.Array
    behaviour: jax.Array
    top: dict[str, jax.Array]
    done: jax.Array
    draft: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def make_slots(model: Transformer, slots: int, length: int, depth: int, top: int, routing: bool, ctx: Context) -> Slots:
    """Empty slots, each with room for ``length`` tokens and the last step's drafts. ``depth``: MTP modules in use, 0 or
    all. ``top``: alternatives that can be asked for. ``routing``: experts are recorded."""
    cfg, capacity = model.cfg, length + depth
    records = {
        "top_id": np.zeros((slots, capacity, top), np.int32),
        "top_logprob": np.zeros((slots, capacity, top), np.float32),
        "draft": np.zeros((slots, capacity), np.int32),
    }
    if routing:
        records["routing"] = empty_record("routing", slots, capacity, cfg)
    rewind = capacity - 1 if truncates(model, capacity, ctx) else depth
    cache = model.init_cache(slots, capacity, rewind=rewind, ctx=ctx)
    state = replace(idle(model, cache, STOPS, depth, ctx, records), bias=np.zeros((slots, cfg.vocab_size), np.float32))
    made = Slots(state, make_sampling(slots, 0.0, 0, 1.0, 0.0, 0))
    # Placed at once: arrays that are bound to a device in one call and not in the next compile twice.
    return jax.device_put(made, next(iter(jax.tree.leaves(model)[0].devices())))


def truncates(model: Transformer, length: int, ctx: Context) -> bool:
    """Whether a row of the model's cache can be taken back to any of its lengths: it can where that costs nothing, so
    where what is held does not grow with what may be taken back. Windows and compressors hold last tokens only."""

    def shapes(rewind: int):
        return jax.tree.map(lambda a: a.shape, jax.eval_shape(lambda: model.init_cache(1, length, rewind, ctx).held))

    return shapes(1) == shapes(length - 1)


@partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, slot: jax.Array, row: Row, kept: jax.Array) -> Slots:
    """A new row in a slot, of whose former tokens the first ``kept`` stay. It has drafted nothing."""
    state, here = slots.state, jnp.arange(slots.state.known.shape[0]) == slot
    fresh = {name: getattr(row, name) for name in ("tokens", "known", "limit", "drafts", "stop", "bias")}
    fresh |= {"done": False, "offered": 0, "drafted": 0, "accepted": 0}
    state = replace(
        state,
        cache=state.cache.up_to(jnp.where(here, kept, state.cache.capacity)),
        **{name: getattr(state, name).at[slot].set(value) for name, value in fresh.items()},
    )
    return Slots(state, jax.tree.map(lambda held, new: held.at[slot].set(new), slots.sampling, row.sampling))


@partial(jax.jit, donate_argnames="slots", static_argnames=("chunk", "depth", "ctx"))
def prefill(
    model: Transformer,
    slots: Slots,
    slot: jax.Array,
    start: jax.Array,
    scored: jax.Array,
    given: tuple[jax.Array, jax.Array] | None = None,
    *,
    chunk: int,
    depth: int,
    ctx: Context,
) -> Slots:
    """`loop.prefill` of one slot: no other row is computed."""
    row = loop.prefill(model, _row(slots, slot).state, start, scored, given, chunk=chunk, depth=depth, ctx=ctx)
    return replace(slots, state=_put(slots, slot, replace(_row(slots, slot), state=row)).state)


@partial(jax.jit, donate_argnames="slots")
def fork(slots: Slots, source: jax.Array, target: jax.Array, seed: jax.Array) -> Slots:
    """The row of ``source`` in slot ``target`` too, with random numbers of its own."""
    row = _row(slots, source)
    return _put(slots, target, replace(row, sampling=replace(row.sampling, seed=seed[None])))


@partial(jax.jit, donate_argnames="slots", static_argnames=("room", "top", "depth", "ctx"))
def decode(
    model: Transformer,
    slots: Slots,
    running_B: jax.Array,
    allowed_BX: jax.Array,
    steps: jax.Array,
    *,
    room: int,
    top: bool,
    depth: int,
    ctx: Context,
) -> tuple[Slots, News]:
    """`loop.decode` of the running slots, in up to ``steps`` steps, ``room`` at most.

    ``allowed_BX``: `sampling.packed` bits of the tokens that may be drawn, in all steps. ``top``: the likeliest tokens
    are recorded.
    """
    before, vocab = slots.state, slots.state.bias.shape[1]
    kept = {name: a for name, a in before.records.items() if top or name not in TOP}
    state = replace(
        before,
        done=before.done | ~running_B,
        bias=jnp.where(unpacked(allowed_BX, vocab), before.bias, -jnp.inf),
        records=kept,
    )
    state = loop.decode(model, state, slots.sampling, steps, depth=depth, ctx=ctx)
    state = replace(
        state,
        done=jnp.where(running_B, state.done, before.done),
        bias=before.bias,
        records=before.records | state.records,
    )
    at_BW = before.known[:, None] + jnp.arange(room * (depth + 1))

    def new(a):
        return jnp.take_along_axis(a, jnp.expand_dims(at_BW, range(2, a.ndim)), axis=1, mode="clip")

    news = News(
        count=state.known - before.known,
        tokens=new(state.tokens),
        logprob=new(state.logprob),
        behaviour=new(state.behaviour),
        top={name: new(state.records[name]) for name in TOP if top},
        done=state.done,
        draft=new(state.records["draft"]),
        drafted=state.drafted,
        accepted=state.accepted,
    )
    return replace(slots, state=state), news


@jax.jit
def scores_of(slots: Slots, slot: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """float32 [S], and [S, ...] of the likeliest: of a slot's tokens, where its prompt was fed to be scored; its first
    token has none."""
    return slots.state.logprob[slot], {name: slots.state.records[name][slot] for name in TOP}


@jax.jit
def routing_of(slots: Slots, slot: jax.Array) -> jax.Array:
    """int32 [S, L, K]: the experts of a slot's tokens that were fed."""
    return slots.state.records["routing"][slot]


def _axes(slots: Slots) -> Slots:
    """Along which axis the slots lie: of what attention holds, behind the layers."""

    def of_cache(cache: Cache) -> Cache:
        held = jax.tree.map(lambda _: 1, cache.held)
        return replace(cache, held=held, mtp=tuple(of_cache(module) for module in cache.mtp))

    axes = jax.tree.map(lambda _: 0, slots)
    return replace(axes, state=replace(axes.state, cache=of_cache(axes.state.cache)))


def _row(slots: Slots, slot: jax.Array) -> Slots:
    """One slot by itself."""
    return jax.tree.map(lambda a, axis: jax.lax.dynamic_slice_in_dim(a, slot, 1, axis), slots, _axes(slots))


def _put(slots: Slots, slot: jax.Array, row: Slots) -> Slots:
    return jax.tree.map(
        lambda a, new, axis: jax.lax.dynamic_update_slice_in_dim(a, new, slot, axis), slots, row, _axes(slots)
    )
