"""From logits to tokens: temperature, filters, random draws, and the acceptance of drafts.

A greedy row is the same arithmetic: its distribution is one at the largest logit, so that a draft is accepted
exactly when it is that token.

Suffixes: B rows, T positions, P drafts, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

# What a random number at a position is for. Each is used for at most one decision, so that decisions are
# independent although a position may be drafted more than once.
DRAW, ACCEPT, DRAFT = 0, 1, 2
# Numbers whose maximum is taken at once, on the way to the place of the largest.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How each row samples, arrays [B]: changing a value compiles nothing.

    ``temperature``: float32, 0 for greedy. ``top_k``: int32, 0 for all. ``top_p``, ``min_p``: float32.
    ``seed``: uint32, of a row's random numbers; those of a position are keyed by ``fold_in(fold_in(key(seed),
    position), purpose)``: by the row's place in the batch or its neighbours nothing is decided.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def make_sampling(batch: int, temperature, top_k, top_p, min_p, seed) -> Sampling:
    """Checks the settings, each a number or one for each row.

    One ``seed`` is the first row's; the others get seeds that follow from it (NumPy's `SeedSequence`), so that equal
    prompts are continued differently.

    Raises ValueError that names the setting and the row for a value out of range.
    """
    top = np.iinfo(np.int32).max
    values = {
        "temperature": _rows("temperature", temperature, batch, np.float32, 0, np.inf, "at least 0 and below 3.4e38"),
        "top_k": _rows("top_k", top_k, batch, np.int32, 0, top + 1, "an integer of at least 0 (0: no limit)"),
        "top_p": _rows("top_p", top_p, batch, np.float32, np.nextafter(0, 1), 1.5, "in (0, 1]", last=1),
        "min_p": _rows("min_p", min_p, batch, np.float32, 0, 1.5, "in [0, 1]", last=1),
    }
    seeds = _rows("seed", seed, batch, np.uint32, 0, 2**32, "an integer in [0, 2**32)")
    if np.ndim(seed) == 0:
        seeds[1:] = np.random.SeedSequence(int(seeds[0])).generate_state(batch)[1:]
    return Sampling(seed=seeds, **values)


def _rows(name: str, value, batch: int, dtype, low, below, meaning: str, last=None) -> np.ndarray:
    try:
        given = np.asarray(value)
    except ValueError:  # rows of unequal length
        given = np.asarray(None)
    if given.dtype.kind not in "iuf":
        raise ValueError(f"{name}={value!r} must be a number, or one for each row; {name} must be {meaning}.")
    given = given.astype(np.float64)
    if given.shape not in ((), (batch,)):
        raise ValueError(f"{name} has shape {given.shape}; give one number, or one for each of {batch} rows.")
    rows = np.broadcast_to(given, (batch,))
    bad = ~((rows >= low) & (rows < below)) if last is None else ~((rows >= low) & (rows <= last))
    if np.issubdtype(dtype, np.integer):
        bad |= rows != np.floor(rows)
    else:
        # As it is used: what float32 cannot hold, it takes for inf.
        bad |= np.abs(rows) > np.finfo(dtype).max
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"{name}={rows[row]:g} of row {row}: {name} must be {meaning}.")
    return rows.astype(dtype)


def distribution(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 [B, T, V]: the probabilities after temperature, then top-k, top-p and min-p.

    top-k keeps exactly k tokens, equal logits in order of their ids. top-p keeps the smallest set of what
    top-k left whose probability reaches it; min-p drops tokens below its share of the most likely one.
    """
    temperature = sampling.temperature[:, None, None]
    logits_BTV = logits_BTV.astype(jnp.float32)
    greedy = jax.nn.one_hot(_largest(logits_BTV), logits_BTV.shape[-1])

    def sampled():
        top = jnp.max(logits_BTV, axis=-1, keepdims=True)
        scaled = (logits_BTV - top) / jnp.where(temperature > 0, temperature, 1.0)
        filters = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        # The sort costs more than all else here: it is skipped while no row needs it.
        scaled = jax.lax.cond(jnp.any(filters), lambda: _filter(scaled, sampling), lambda: scaled)
        return jnp.where(temperature > 0, jax.nn.softmax(scaled, axis=-1), greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sampled, lambda: greedy)


def _largest(a: jax.Array) -> jax.Array:
    """int32 ``argmax(a, axis=-1)``, by way of a block that has the maximum. XLA compares numbers and their places one
    after the other on a CPU, and takes the maxima of blocks a vector at a time.

    No number is compared with a maximum: XLA may compute both anew, and differently rounded.
    """
    padded = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % BLOCK)], constant_values=-jnp.inf)
    blocks = padded.reshape(*a.shape[:-1], -1, BLOCK)
    block = jnp.argmax(blocks.max(-1), axis=-1).astype(jnp.int32)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + jnp.argmax(inside, axis=-1).astype(jnp.int32)


def _filter(scaled_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits with dropped tokens at -inf."""
    V = scaled_BTV.shape[-1]
    top_k, top_p, min_p = (a[:, None, None] for a in (sampling.top_k, sampling.top_p, sampling.min_p))
    order = jnp.argsort(-scaled_BTV, axis=-1, stable=True)
    kept = jnp.arange(V) < jnp.where(top_k > 0, top_k, V)
    p_BTV = jax.nn.softmax(jnp.where(kept, jnp.take_along_axis(scaled_BTV, order, axis=-1), -jnp.inf), axis=-1)
    before = jnp.pad(jnp.cumsum(p_BTV, axis=-1)[..., :-1], ((0, 0), (0, 0), (1, 0)))
    # The likeliest token reaches any top_p that float32 takes for 0.
    kept &= ((before < top_p) | (top_p >= 1) | (jnp.arange(V) == 0)) & (p_BTV >= min_p * p_BTV[..., :1])
    kept = jnp.take_along_axis(jnp.broadcast_to(kept, order.shape), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, scaled_BTV, -jnp.inf)


def packed(kept_BTV: jax.Array) -> jax.Array:
    """uint32 [B, T, V / 32, rounded up]: which tokens are kept, token i at bit i % 32 of number i // 32."""
    words = -(-kept_BTV.shape[-1] // 32)
    padded = jnp.pad(kept_BTV, ((0, 0), (0, 0), (0, 32 * words - kept_BTV.shape[-1])))
    bits = padded.reshape(*padded.shape[:-1], words, 32).astype(jnp.uint32)
    return (bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def unpacked(mask, vocab_size: int):
    """bool [..., V] of `packed`'s numbers [..., V / 32], NumPy's or JAX's."""
    bits = mask[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return bits.reshape(*mask.shape[:-1], -1)[..., :vocab_size].astype(bool)


def keys_at(seed_B: jax.Array, position_BT: jax.Array, purpose: int) -> jax.Array:
    """Random keys [B, T] of positions."""

    def one(seed, position):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)

    return jax.vmap(jax.vmap(one, (None, 0)))(seed_B, position_BT)


def draw(p_BV: jax.Array, sampling: Sampling, position_B: jax.Array, purpose: int) -> jax.Array:
    """int32 [B]: one token a row from (unnormalised) probabilities."""

    def random():
        keys = keys_at(sampling.seed, position_B[:, None], purpose)[:, 0]
        return jax.vmap(jax.random.categorical)(keys, jnp.log(p_BV)).astype(jnp.int32)

    # Greedy rows have a single token to draw; without any other row the noise is not made.
    return jax.lax.cond(jnp.any(sampling.temperature > 0), random, lambda: _largest(p_BV))


def verify(
    p_BTV: jax.Array,
    q_BPV: jax.Array,
    draft_BP: jax.Array,
    offered_B: jax.Array,
    sampling: Sampling,
    position_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Speculative sampling (Leviathan et al. 2211.17192, algorithm 1), each row by itself.

    ``p_BTV``: the model's distributions at the T = P + 1 positions ``position_BT``; ``q_BPV``: those that the
    drafts were drawn from; ``offered_B``: int32, how many drafts each row has, 0..P. Returns int32 [B]: how
    many drafts are accepted, and the token after them: from the residual max(p - q, 0) where a draft was
    rejected, from p where none was.
    """
    P = draft_BP.shape[1]
    if P == 0:
        return jnp.zeros(p_BTV.shape[0], jnp.int32), draw(p_BTV[:, 0], sampling, position_BT[:, 0], DRAW)
    uniform_BP = jax.vmap(jax.vmap(jax.random.uniform))(keys_at(sampling.seed, position_BT[:, :P], ACCEPT))
    p_BP, q_BP = (jnp.take_along_axis(a[:, :P], draft_BP[..., None], -1)[..., 0] for a in (p_BTV, q_BPV))
    accept_BP = (uniform_BP * q_BP < p_BP) & (jnp.arange(P) < offered_B[:, None])
    accepted_B = jnp.cumprod(accept_BP.astype(jnp.int32), axis=-1).sum(-1)

    at = accepted_B[:, None, None]
    p_BV = jnp.take_along_axis(p_BTV, at, axis=1)[:, 0]
    q_BV = jnp.take_along_axis(jnp.pad(q_BPV, ((0, 0), (0, 1), (0, 0))), at, axis=1)[:, 0]
    residual_BV = jnp.where((accepted_B < offered_B)[:, None], jnp.maximum(p_BV - q_BV, 0.0), p_BV)
    # p = q up to rounding can leave nothing after a rejection, which then happens about once in 1e7 drafts.
    residual_BV = jnp.where(residual_BV.sum(-1, keepdims=True) > 0, residual_BV, p_BV)
    position_B = jnp.take_along_axis(position_BT, accepted_B[:, None], axis=1)[:, 0]
    return accepted_B, draw(residual_BV, sampling, position_B, DRAW)
