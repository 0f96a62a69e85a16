"""Held-out measurements: bits per byte over all and by domain, MTP drafts, balance, the n-gram baseline.

Suffixes: W windows, B windows a batch, T tokens, V vocabulary, L MoE layers, E experts.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.analysis.ngram import KneserNey
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import everywhere, place_batch, row_share
from deepseek_jax.train.balance import max_violation

WINDOWS_A_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """``bits_per_byte`` of the held-out text, and of each of its ``domains``. ``draft_agreement``: the share of
    positions at which the first MTP module's best token is the model's own best one step later, on the true text; None
    without MTP. ``max_violation_global`` [L]: MaxVio of each layer's load over the whole held-out text (2408.15664
    §4.1); None without experts."""

    bits_per_byte: float
    domains: dict[str, float]
    draft_agreement: float | None
    max_violation_global: list[float] | None


@partial(jax.jit, static_argnames=("ctx",))
def _score(model: Transformer, tokens_BT, segments_BT, ctx: Context):
    return everywhere(_measured(model, tokens_BT, segments_BT, ctx), ctx)


def _measured(model: Transformer, tokens_BT, segments_BT, ctx: Context):
    out = model(tokens_BT, segments=segments_BT, with_mtp=bool(model.cfg.mtp_depth), ctx=ctx)
    target = tokens_BT[:, 1:, None]
    log_p_BTV = jax.nn.log_softmax(out.logits[:, :-1], axis=-1)
    nats_BT = -jnp.take_along_axis(log_p_BTV, target, axis=-1)[..., 0]
    load_LE = None if out.aux is None else out.aux.load
    if not out.mtp_logits:
        return nats_BT, load_LE, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    # Position i's draft, for token i + 2, against the model's own choice there, made at position i + 1.
    same = jnp.argmax(out.mtp_logits[0][:, :-2], -1) == jnp.argmax(out.logits[:, 1:-1], -1)
    real = (segments_BT[:, 2:] != 0) & (segments_BT[:, 2:] == segments_BT[:, :-2])
    return nats_BT, load_LE, (same & real).sum(), real.sum()


def evaluate(model: Transformer, held_out: HeldOut, ctx: Context = DEFAULT) -> Evaluation:
    """Scores every token of the held-out stream but its first, once, in windows without carry-over.

    On a mesh each device computes its part of a batch of windows, and every process gets the figures.
    """
    windows, segments = held_out.windows_WT, held_out.segments_WT
    groups, count = row_share(ctx)
    size = -(-WINDOWS_A_BATCH // count) * count
    missing = -len(windows) % size
    windows, segments = (np.pad(a, ((0, missing), (0, 0))) for a in (windows, segments))
    own = (np.asarray(groups)[:, None] * (size // count) + np.arange(size // count)).reshape(-1)
    nats, load_LE, same, real = [], None, 0, 0
    for start in range(0, len(windows), size):
        batch = place_batch({"tokens": windows[start + own], "segments": segments[start + own]}, ctx)
        n, load, s, r = _score(model, batch["tokens"], batch["segments"], ctx)
        nats.append(np.asarray(n, np.float64))
        same, real = same + int(s), real + int(r)
        if load is not None:
            load_LE = np.asarray(load, np.int64) + (0 if load_LE is None else load_LE)
    scores_n1 = held_out.scores(np.concatenate(nats)[: len(held_out.windows_WT)])
    return Evaluation(
        bits_per_byte=held_out.bits_per_byte(scores_n1),
        domains=held_out.bits_by_domain(scores_n1),
        draft_agreement=same / real if model.cfg.mtp_depth else None,
        max_violation_global=None if load_LE is None else max_violation(load_LE).tolist(),
    )


def trigram_bits_per_byte(rows: np.ndarray, held_out: HeldOut, vocab_size: int) -> float:
    """Interpolated Kneser-Ney trigram (discount 0.75) counted on ``rows``, int [n, T], on the same held-out tokens.

    It is given the true two tokens before each one, also where a window of the model begins.
    """
    nats = KneserNey(vocab_size, order=3, discount=0.75).fit(rows).nats(held_out.stream_n)
    return held_out.bits_per_byte(nats[1:])
