"""Held-out measurements, over all and by domain: bits per byte, MTP drafts, the experts' load; the n-gram baseline.

Suffixes: W windows, B windows a batch, T tokens, V vocabulary, D domains, L MoE layers, E experts; T2 stands for T - 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.analysis.ngram import KneserNey
from deepseek_jax.analysis.specialisation import load_divergence
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.model.arguments import check_knock_out
from deepseek_jax.model.router import KnockOut
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import everywhere, place_batch, row_share
from deepseek_jax.train.balance import max_violation

WINDOWS_A_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """What a model does on the held-out text.

    ``bits_per_byte`` of it, and of each of its ``domains``. Of the first MTP module's drafts on the true text, None and
    {} without MTP: ``draft_agreement``, the share that is the model's own best token one step later, which greedy
    decoding would accept; ``draft_acceptance``, the share that sampling at temperature 1 would accept, the mean of
    sum(min(p, q)) over the vocabulary; both by the drafted token's domain in ``domain_agreement`` and
    ``domain_acceptance``. Without experts None: ``load_DLE``, int64, how often each domain's tokens chose each expert,
    one domain where the text names none; ``max_violation_global`` [L], MaxVio of each layer's load over the whole text
    (2408.15664 §4.1).
    """

    bits_per_byte: float
    domains: dict[str, float]
    draft_agreement: float | None
    draft_acceptance: float | None
    domain_agreement: dict[str, float]
    domain_acceptance: dict[str, float]
    max_violation_global: list[float] | None
    load_DLE: np.ndarray | None

    def record(self) -> dict:
        """The figures as plain values, with the load's Jensen-Shannon divergence between domains (nats, [L]) in place
        of the load itself."""
        kept = {name: value for name, value in vars(self).items() if name != "load_DLE"}
        several = self.load_DLE is not None and len(self.load_DLE) > 1
        return kept | {"load_divergence": load_divergence(self.load_DLE).tolist() if several else None}


@partial(jax.jit, static_argnames=("domains", "ctx"))
def _score(model: Transformer, tokens_BT, segments_BT, domain_BT, routing, domains: int, ctx: Context):
    return everywhere(_measured(model, tokens_BT, segments_BT, domain_BT, routing, domains, ctx), ctx)


def _measured(model: Transformer, tokens_BT, segments_BT, domain_BT, routing, domains: int, ctx: Context):
    """Nats [B, T - 1], the load [D, L, E], and of the drafts [B, T - 2] whether they agree, and how often sampling
    accepts them."""
    out = model(tokens_BT, segments=segments_BT, routing=routing, with_mtp=bool(model.cfg.mtp_depth), ctx=ctx)
    target = tokens_BT[:, 1:, None]
    log_p_BTV = jax.nn.log_softmax(out.logits[:, :-1], axis=-1)
    nats_BT = -jnp.take_along_axis(log_p_BTV, target, axis=-1)[..., 0]
    load_DLE = None
    if out.aux is not None:
        layers, experts = out.aux.load.shape
        layer_L11 = jnp.arange(layers)[:, None, None, None]
        index_LBTK = out.aux.expert_index
        place_LBTK = jnp.where(index_LBTK >= 0, (domain_BT[..., None] * layers + layer_L11) * experts + index_LBTK, -1)
        count = partial(ctx.ops.count, size=domains * layers * experts)
        place_BTX = jnp.moveaxis(place_LBTK, 0, 2).reshape(*tokens_BT.shape, -1)
        load_DLE = count(place_BTX).reshape(domains, layers, experts)
    if not out.mtp_logits:
        return nats_BT, load_DLE, None, None
    # Position i's draft, for token i + 2, against the model's own distribution there, given at position i + 1.
    draft_BTV, own_BTV = out.mtp_logits[0][:, :-2], out.logits[:, 1:-1]
    same_BT = jnp.argmax(draft_BTV, -1) == jnp.argmax(own_BTV, -1)
    log_q_BTV = jax.nn.log_softmax(draft_BTV, axis=-1)
    accepted_BT = jnp.exp(jnp.minimum(log_p_BTV[:, 1:], log_q_BTV)).sum(-1)
    return nats_BT, load_DLE, same_BT, accepted_BT


def in_batches(ctx: Context, **arrays: np.ndarray) -> Iterator[dict[str, jax.Array]]:
    """Arrays int [W, T] in batches of rows where ``ctx`` computes them; the last one is filled up with zeros."""
    groups, count = row_share(ctx)
    size = -(-WINDOWS_A_BATCH // count) * count
    missing = -len(next(iter(arrays.values()))) % size
    padded = {name: np.pad(a, ((0, missing), (0, 0))) for name, a in arrays.items()}
    own = (np.asarray(groups)[:, None] * (size // count) + np.arange(size // count)).reshape(-1)
    for start in range(0, len(next(iter(padded.values()))), size):
        yield place_batch({name: a[start + own] for name, a in padded.items()}, ctx)


def evaluate(
    model: Transformer, held_out: HeldOut, ctx: Context = DEFAULT, routing: KnockOut | None = None
) -> Evaluation:
    """Scores every token of the held-out stream but its first, once, in windows without carry-over.

    ``routing``: experts that the model has to do without.

    On a mesh each device computes its part of a batch of windows, and every process gets the figures.
    """
    segments, domains = held_out.segments_WT, held_out.domain_WT
    n_domains = max(1, len(held_out.domains))
    if routing is not None:
        check_knock_out(model.cfg, routing)
    nats, load_DLE, drafts = [], None, []
    for batch in in_batches(ctx, tokens=held_out.windows_WT, segments=segments, domains=domains):
        given = (batch["tokens"], batch["segments"], batch["domains"], routing)
        n, load, *draft = _score(model, *given, domains=n_domains, ctx=ctx)
        nats.append(np.asarray(n, np.float64))
        drafts.append([np.asarray(a, np.float64) for a in draft if a is not None])
        if load is not None:
            load_DLE = np.asarray(load, np.int64) + (0 if load_DLE is None else load_DLE)
    scores_n1 = held_out.scores(np.concatenate(nats)[: len(held_out.windows_WT)])
    agreement, acceptance = (None, {}), (None, {})
    if model.cfg.mtp_depth:
        same_WT2, accepted_WT2 = (np.concatenate(parts)[: len(segments)] for parts in zip(*drafts, strict=True))
        real_WT2 = (segments[:, 2:] != 0) & (segments[:, 2:] == segments[:, :-2])
        domain = domains[:, 2:][real_WT2]
        agreement = _shares(same_WT2[real_WT2], domain, held_out.domains)
        acceptance = _shares(accepted_WT2[real_WT2], domain, held_out.domains)
    return Evaluation(
        bits_per_byte=held_out.bits_per_byte(scores_n1),
        domains=held_out.bits_by_domain(scores_n1),
        draft_agreement=agreement[0],
        draft_acceptance=acceptance[0],
        domain_agreement=agreement[1],
        domain_acceptance=acceptance[1],
        max_violation_global=None if load_DLE is None else max_violation(jnp.asarray(load_DLE.sum(0))).tolist(),
        load_DLE=load_DLE,
    )


def _shares(values_n: np.ndarray, domain_n: np.ndarray, names: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """The mean over all, and that of each domain that has any."""
    counts, sums = np.bincount(domain_n), np.bincount(domain_n, values_n)
    by_name = {name: float(s / c) for name, s, c in zip(names, sums, counts, strict=False) if c}
    return float(values_n.mean()), by_name


def trigram_bits_per_byte(rows: np.ndarray, held_out: HeldOut, vocab_size: int) -> float:
    """Interpolated Kneser-Ney trigram (discount 0.75) counted on ``rows``, int [n, T], on the same held-out tokens.

    It is given the true two tokens before each one, also where a window of the model begins.
    """
    nats = KneserNey(vocab_size, order=3, discount=0.75).fit(rows).nats(held_out.stream_n)
    return held_out.bits_per_byte(nats[1:])
