"""What runs on the device: prefill in chunks, and the loop of decoding steps with MTP drafts.

A row's known tokens are its prompt and what was generated. All but the last are in the cache; a step feeds
the last one and the drafts after it, keeps the drafts that hold, and draws one token more. Plain decoding is
the same step with no drafts. Shapes depend on the batch, the cache's capacity and the chunk only, never on a
prompt's length.

Suffixes: B rows, S slots, T = P + 1 tokens a step, P drafts (MTP modules), W = 2 P positions that the modules
see again, V vocabulary, D width.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp

from deepseek_jax.core.context import Context
from deepseek_jax.generation.programs import Ready
from deepseek_jax.generation.sampling import DRAFT, Sampling, distribution, draw, packed, verify
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.tokens import make_tokens
from deepseek_jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything a row's continuation depends on; donated to every call.

    ``tokens``: int32 [B, S], known tokens, then drafts. ``logprob``, ``behaviour``: float32 [B, S], of each generated
    token by the model, and by the distribution that it was drawn from. ``known``, ``limit``: int32 [B], known tokens,
    and how many there may be. ``stop``: int32 [B, N], tokens that end the row, filled up with -1. ``done``: bool [B].
    ``drafts``, ``offered``: int32 [B], drafts that a row takes, all or 0, and those that the next step verifies: none
    in a row's first.
    ``q``: float32 [B, P, V], what they were drawn from. ``recent``: [B, P - 1, D], the hidden states before
    the last known token (of several streams, these), which deeper modules need again. ``drafted``, ``accepted``: int32
    [B]. ``bias``: float32 [B, V], added to the logits that tokens are drawn from, or None. ``records``: what is kept
    beside the tokens, of `RECORDS` those asked for, arrays [B, S, ...].
    """

    cache: Cache
    tokens: jax.Array
    logprob: jax.Array
    behaviour: jax.Array
    known: jax.Array
    limit: jax.Array
    stop: jax.Array
    done: jax.Array
    drafts: jax.Array
    offered: jax.Array
    q: jax.Array
    recent: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    bias: jax.Array | None
    records: dict[str, jax.Array]


# "routing": int32 [B, S, L, K], the experts of every token that was fed, -1 elsewhere. Of every generated token's
# distribution, "kept_size": int32 [B, S], tokens that the filters leave; "kept_mask": uint32 [B, S, V / 32], which.
# Besides, for slots, "top_id" and "top_logprob": [B, S, N], the model's likeliest tokens in each one's place; "draft":
# int32 [B, S], of a generated token that was drafted which of its step's drafts it is, from 1, of others 0.
RECORDS = ("routing", "kept_size", "kept_mask")
TOP = ("top_id", "top_logprob")


def prefill(
    model: Transformer,
    state: State,
    start: jax.Array,
    scored: jax.Array | None = None,
    given: tuple[jax.Array, jax.Array] | None = None,
    *,
    chunk: int,
    depth: int,
    ctx: Context,
) -> State:
    """Feeds the prompts' tokens start..start + chunk, except a prompt's last one: that is `decode`'s first.

    ``scored``: a bool, whether the log-probabilities of the prompts' own tokens are wanted: then all have theirs, as
    generated ones do, but for the first. None: they never are. ``given``: [B, chunk, D] and bool [B, chunk], embeddings
    of these tokens, and which take theirs from there. ``depth``: MTP modules in use, 0 or all.
    """
    position_BT = jnp.broadcast_to(start + jnp.arange(chunk), (state.known.shape[0], chunk))
    real_BT = position_BT < state.known[:, None] - 1
    next_tokens = None
    if depth:
        ahead = [_tokens_at(state.tokens, position_BT + d, state.known) for d in range(1, depth + 1)]
        next_tokens = jnp.stack(ahead, axis=-1)
    tokens_BT, embeddings = _tokens_at(state.tokens, position_BT, state.known, missing=0), None
    if given is not None:
        own_BTD = ctx.ops.lookup(model.embed, tokens_BT, model.compute_dtype(ctx))
        embeddings = jnp.where(given[1][..., None], given[0].astype(own_BTD.dtype), own_BTD)
    out = model(
        tokens_BT,
        embeddings=embeddings,
        segments=real_BT.astype(jnp.int32),
        next_tokens=next_tokens,
        cache=state.cache,
        with_mtp=depth > 0,
        logits="none",
        ctx=ctx,
    )
    state = replace(
        state,
        cache=out.cache,
        recent=_latest(state.recent, out.carry, real_BT.sum(-1)),
        records=_recorded(state.records, out, position_BT, real_BT),
    )
    if scored is None:
        return state

    def score():
        logits_BTV = model.unembed(out.hidden, ctx)
        next_BT = _tokens_at(state.tokens, position_BT + 1, state.known, missing=0)
        logprob_BT = _logprob(logits_BTV, next_BT)
        likeliest = _likeliest(state.records, logits_BTV, position_BT, real_BT)
        return _put(state.logprob, logprob_BT, position_BT + 1, real_BT), likeliest

    logprob, likeliest = jax.lax.cond(scored, score, lambda: (state.logprob, _only(state.records, TOP)))
    return replace(state, logprob=logprob, records=state.records | likeliest)


def decode(
    model: Transformer,
    state: State,
    sampling: Sampling,
    steps: jax.Array,
    *,
    depth: int,
    ctx: Context,
) -> State:
    """Up to ``steps`` steps, fewer when every row is done."""

    def body(carry):
        i, state = carry
        return i + 1, _step(model, state, sampling, depth, ctx)

    def more(carry):
        i, state = carry
        return (i < steps) & ~jnp.all(state.done)

    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), state))[1]


@lru_cache
def compiled(structure=None, places=None):
    """`prefill` and `decode`, jitted; ``structure``, ``places``: on a mesh the state's tree and where its leaves lie,
    which is where they stay, so that every call runs the same program."""
    out = None if structure is None else jax.tree.unflatten(structure, places)
    jit = partial(jax.jit, donate_argnames=("state",), out_shardings=out)
    both = jit(prefill, static_argnames=("chunk", "depth", "ctx")), jit(decode, static_argnames=("depth", "ctx"))
    return both if places else tuple(map(Ready, both))


def _step(model, state: State, sampling: Sampling, depth: int, ctx: Context) -> State:
    """Verifies the drafts, draws one token more, takes rejected ones back, drafts again."""
    active_B, first_B = ~state.done, state.cache.length
    ahead_T = jnp.arange(depth + 1)
    position_BT = first_B[:, None] + ahead_T
    tokens_BT = jnp.take_along_axis(state.tokens, position_BT, axis=1, mode="clip")
    segment_BT = (active_B[:, None] & (ahead_T <= state.offered[:, None])).astype(jnp.int32)
    out = model(tokens_BT, segments=segment_BT, cache=state.cache, logits="all", ctx=ctx)

    p_BTV = distribution(_biased(out.logits, state), sampling)
    drafts_BP = tokens_BT[:, 1:]
    accepted_B, last_B = verify(p_BTV, state.q, drafts_BP, state.offered, sampling, position_BT + 1)
    new_BT = jnp.pad(drafts_BP, ((0, 0), (0, 1)))
    new_BT = jnp.where(ahead_T == accepted_B[:, None], last_B[:, None], new_BT)
    # A stop token ends the row; what was accepted after it is dropped.
    stops_BT = (new_BT[..., None] == state.stop[:, None]).any(-1)
    ended_BT = jnp.cumsum(stops_BT, axis=-1) - stops_BT > 0
    kept_BT = (ahead_T <= accepted_B[:, None]) & (position_BT + 1 < state.limit[:, None]) & ~ended_BT
    kept_BT &= active_B[:, None]

    p_BT = jnp.take_along_axis(p_BTV, new_BT[..., None], axis=-1)[..., 0]
    draft_BT = jnp.where(ahead_T < accepted_B[:, None], ahead_T + 1, 0)
    known_B = state.known + kept_BT.sum(-1)
    rejected_B = jnp.where(active_B, state.offered - accepted_B, 0)
    state = replace(
        state,
        cache=out.cache.rewind(rejected_B) if depth else out.cache,
        tokens=_put(state.tokens, new_BT, position_BT + 1, kept_BT),
        logprob=_put(state.logprob, _logprob(out.logits, new_BT), position_BT + 1, kept_BT),
        behaviour=_put(state.behaviour, jnp.log(p_BT), position_BT + 1, kept_BT),
        known=known_B,
        done=state.done | (kept_BT & stops_BT).any(-1) | (known_B >= state.limit),
        drafted=state.drafted + jnp.where(active_B, state.offered, 0),
        accepted=state.accepted + (kept_BT & (draft_BT > 0)).sum(-1),
        records=_recorded(state.records, out, position_BT, segment_BT != 0, p_BTV, draft_BT, kept_BT),
    )
    return _draft(model, state, out.carry, first_B, accepted_B, sampling, depth, ctx) if depth else state


def _draft(model, state: State, carry_BT, first_B, accepted_B, sampling: Sampling, depth: int, ctx) -> State:
    """One draft a module, each module reading the one before and its draft.

    The modules see the new positions, and the ``depth - 1`` before them again: there the deeper ones had
    drafts in place of tokens that are known now.
    """
    carry_BW = jnp.concatenate([state.recent, carry_BT], axis=1)
    place_W = jnp.arange(2 * depth)
    position_BW = first_B[:, None] - (depth - 1) + place_W
    at_B = depth - 1 + accepted_B
    real_BW = (position_BW >= 0) & (place_W <= at_B[:, None]) & ~state.done[:, None]
    seen = make_tokens(model.cfg, jnp.maximum(position_BW, 0), real_BW.astype(jnp.int32), position_BW)
    # A row that does nothing, perhaps as its prompt is not fed yet, keeps all.
    again = jnp.where(state.done, state.cache.capacity, jnp.maximum(position_BW[:, 0], 0))
    cache = replace(state.cache, mtp=tuple(module.up_to(again) for module in state.cache.mtp))
    recent = _latest(state.recent, carry_BT, jnp.where(state.done, 0, accepted_B + 1))
    tokens, q = state.tokens, []
    for d in range(depth):
        next_BW = jnp.take_along_axis(tokens, position_BW + 1 + d, axis=1, mode="clip")
        carry_BW, seen, cache, *_ = model.predict_depth(d, carry_BW, next_BW, seen, cache, ctx)
        hidden_B1D = model.mtp[d].hidden(_taken(carry_BW, at_B), ctx)
        q.append(distribution(_biased(model.unembed(hidden_B1D, ctx), state), sampling)[:, 0])
        position_B = first_B + accepted_B + 2 + d
        token_B = draw(q[-1], sampling, position_B, DRAFT)
        tokens = _put(tokens, token_B[:, None], position_B[:, None], ~state.done[:, None])
    return replace(
        state,
        cache=cache,
        tokens=tokens,
        recent=recent,
        q=jnp.stack(q, axis=1),
        offered=jnp.where(state.done, state.offered, state.drafts),
    )


def _biased(logits_BTV, state: State):
    return logits_BTV if state.bias is None else logits_BTV + state.bias[:, None]


def _recorded(records, out, position_BT, fed_BT, p_BTV=None, draft_BT=None, kept_BT=None) -> dict[str, jax.Array]:
    """The records with those of the tokens fed, and of the tokens kept, which stand one further on. A rejected draft's
    are overwritten when its position is fed again."""
    result = dict(records)
    if "routing" in records:
        index_BTLK = out.aux.expert_index.transpose(1, 2, 0, 3)
        result["routing"] = _put(records["routing"], index_BTLK, position_BT, fed_BT)
    if p_BTV is None:
        return result
    found = {"kept_size": lambda: (p_BTV > 0).sum(-1, dtype=jnp.int32), "kept_mask": lambda: packed(p_BTV > 0)}
    found["draft"] = lambda: draft_BT
    for name in found.keys() & records.keys():
        result[name] = _put(records[name], found[name](), position_BT + 1, kept_BT)
    return result | _likeliest(records, out.logits, position_BT, kept_BT)


def _likeliest(records, logits_BTV, position_BT, kept_BT) -> dict[str, jax.Array]:
    """The records of the likeliest tokens, where there are any, with those in the places behind positions."""
    held = _only(records, TOP)
    if not held:
        return {}
    value_BTN, id_BTN = jax.lax.top_k(jax.nn.log_softmax(logits_BTV), held["top_id"].shape[-1])
    new = {"top_id": id_BTN, "top_logprob": value_BTN}
    return {name: _put(held[name], new[name], position_BT + 1, kept_BT) for name in held}


def _only(records, names) -> dict[str, jax.Array]:
    return {name: records[name] for name in names if name in records}


def _logprob(logits_BTV, token_BT):
    """Of tokens by the model."""
    logit_BT = jnp.take_along_axis(logits_BTV, token_BT[..., None], axis=-1)[..., 0]
    return logit_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def _tokens_at(tokens_BS, position_BT, known_B, missing: int = -1):
    """The known tokens at positions, ``missing`` beyond them."""
    token_BT = jnp.take_along_axis(tokens_BS, position_BT, axis=1, mode="clip")
    return jnp.where(position_BT < known_B[:, None], token_BT, missing)


def _put(held_BS, new_BT, position_BT, kept_BT):
    """Writes the kept entries at their positions."""
    rows, slots = jnp.arange(held_BS.shape[0])[:, None], jnp.where(kept_BT, position_BT, held_BS.shape[1])
    return held_BS.at[rows, slots].set(new_BT, mode="drop")


def _latest(recent_BX, carry_BT, real_B):
    """The last X hidden states, or streams, of each row after ``real_B`` more."""
    index = real_B[:, None] + jnp.arange(recent_BX.shape[1])
    both = jnp.concatenate([recent_BX, carry_BT.astype(recent_BX.dtype)], axis=1)
    return _taken(both, index)


def _taken(a_BT, index):
    """[B, X, ...]: what stands at X places of each row; ``index``: [B, X], or [B] for one place."""
    return jnp.take_along_axis(a_BT, jnp.expand_dims(index, range(index.ndim, a_BT.ndim)), axis=1)
