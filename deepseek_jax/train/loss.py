"""What training differentiates: next-token cross-entropy, MTP (V3 eq. 24-25) and sequence balance (eq. 17).

Suffixes: B batch, T tokens, V vocabulary, P targets ahead.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from deepseek_jax.core.context import Context
from deepseek_jax.model.outputs import Output
from deepseek_jax.model.transformer import Transformer, shifted
from deepseek_jax.train.recipe import LossWeights


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(target) in nats and the number of targets; a target of -1 takes no part."""
    known_BT = target_BT >= 0
    picked = jnp.take_along_axis(logits_BTV, jnp.maximum(target_BT, 0)[..., None], axis=-1)[..., 0]
    nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked
    return jnp.where(known_BT, nats_BT, 0).sum(), known_BT.sum()


def loss(
    model: Transformer,
    batch: dict[str, jax.Array],
    weights: LossWeights | None = None,
    ctx: Context | None = None,
) -> tuple[jax.Array, Output]:
    """The training loss in nats a token, and the forward pass's output with ``losses`` filled in.

    ``batch``: "tokens" int32 [B, T]; optional "segments" and "positions" int32 [B, T], as the model takes them;
    a row's tokens stand in the order of their positions.
    Each cross-entropy is the mean over its known targets: token i + 1 for the model, i + 2 + d for MTP module d.
    ``losses``: "main", "mtp" (mean over the modules) and "balance" (sum over layers, mean over rows), unweighted,
    and "tokens", the targets counted.

    Raises ValueError for a batch without tokens or with unknown entries.
    """
    if "tokens" not in batch or not set(batch) <= {"tokens", "segments", "positions"}:
        raise ValueError(f"a batch needs 'tokens' and may have 'segments' and 'positions', not {sorted(batch)}.")
    weights = weights or LossWeights()
    tokens, segments = batch["tokens"], batch.get("segments")
    with_mtp = bool(model.cfg.mtp_depth and weights.mtp)
    out = model(tokens, positions=batch.get("positions"), segments=segments, with_mtp=with_mtp, ctx=ctx)
    depth = len(out.mtp_logits)
    target_BTP = shifted(tokens, jnp.ones_like(tokens) if segments is None else segments, 1 + depth)
    nats, count = cross_entropy(out.logits, target_BTP[..., 0])
    losses = {"main": nats / jnp.maximum(count, 1), "tokens": count}
    total = losses["main"]
    if depth:
        sums = [cross_entropy(out.mtp_logits[d], target_BTP[..., 1 + d]) for d in range(depth)]
        losses["mtp"] = sum(n / jnp.maximum(c, 1) for n, c in sums) / depth
        total = total + weights.mtp * losses["mtp"]
    terms = [a.balance["sequence"] for a in (out.aux, out.mtp_aux) if a is not None]
    if terms:
        losses["balance"] = sum(term_LB.mean(-1).sum() for term_LB in terms)
        total = total + weights.balance * losses["balance"]
    return total, replace(out, losses=losses)
