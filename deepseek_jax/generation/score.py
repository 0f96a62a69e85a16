"""Log-probabilities of given tokens, chunk by chunk through the cache.

Suffixes: B rows (one), T tokens of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation.arguments import check_count, check_ids, check_model
from deepseek_jax.generation.engine import MIN_CACHE
from deepseek_jax.generation.programs import Ready
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import fetch, place, row_groups

CHUNK = 256


def score(
    model: Transformer,
    ids: Sequence[int],
    ctx: Context | None = None,
    *,
    window: int | None = None,
    chunk: int = CHUNK,
) -> list[float]:
    """log p(ids[i] | ids[..i]) in nats for i = 1, 2, ...: one value fewer than there are tokens.

    A text longer than ``window`` tokens (default: the model's length) is scored in windows that begin half a
    window apart: every token sees at least half a window before it, or the text's beginning. ``chunk``:
    tokens that one call feeds. ``ctx``: on a mesh each of its groups of rows but the first has an empty row.

    Raises ValueError for fewer than two tokens, ids outside the vocabulary, and a window that the model
    cannot hold.
    """
    ctx = check_model(model, ctx)
    cfg = model.cfg
    tokens = check_ids("ids", ids, cfg.vocab_size)
    if len(tokens) < 2:
        raise ValueError("one token alone has no log-probability: give at least two.")
    window = cfg.max_length if window is None else window
    check_count("chunk", chunk)
    check_count("window", window)
    if not 2 <= window <= cfg.max_length:
        raise ValueError(f"window={window}: must lie in 2..{cfg.max_length}, the length of {cfg.name}.")
    size = min(window, len(tokens))
    capacity = min(max(1 << (size - 1).bit_length(), MIN_CACHE), cfg.max_length)

    rows = 1 if ctx.mesh is None else row_groups(ctx)
    model = place(model, ctx)
    values, start = [], 0
    while len(values) < len(tokens) - 1:
        part = np.asarray(tokens[start : start + window], np.int32)
        cache, pieces = model.init_cache(rows, capacity, ctx=ctx), []
        leaves, structure = jax.tree.flatten(cache)
        feed = _compiled(*(() if ctx.mesh is None else (structure, tuple(a.sharding for a in leaves))))
        for first in range(0, len(part) - 1, chunk):
            fed = np.zeros((3, rows, chunk), np.int32)
            size = min(chunk, len(part) - 1 - first)
            fed[0, 0, :size] = part[first : first + size]
            fed[1, 0, :size] = part[first + 1 : first + 1 + size]
            fed[2, 0, :size] = 1
            cache, logprob_BT = feed(model, cache, *fed, ctx=ctx)
            pieces.append(fetch(logprob_BT, ctx)[0, :size])
        found = np.concatenate(pieces)
        if not np.isfinite(found).all():
            raise ValueError("the model's logits are not finite: its weights hold NaN or inf.")
        values.extend(found[len(values) - start :].tolist())
        start += window // 2
    return values


@lru_cache
def _compiled(structure=None, places=None):
    """`_feed`, jitted; on a mesh the cache, of that structure, stays in its places."""
    out = None if structure is None else (jax.tree.unflatten(structure, places), None)
    feed = jax.jit(_feed, static_argnames=("ctx",), donate_argnames=("cache",), out_shardings=out)
    return feed if places else Ready(feed)


def _feed(
    model: Transformer,
    cache: Cache,
    tokens_BT: jax.Array,
    next_BT: jax.Array,
    segment_BT: jax.Array,
    *,
    ctx: Context,
) -> tuple[Cache, jax.Array]:
    out = model(tokens_BT, segments=segment_BT, cache=cache, ctx=ctx)
    logit_BT = jnp.take_along_axis(out.logits, next_BT[..., None], axis=-1)[..., 0]
    return out.cache, logit_BT - jax.nn.logsumexp(out.logits, axis=-1)
