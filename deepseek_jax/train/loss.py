"""What training differentiates: next-token cross-entropy, MTP (V3 eq. 24-25) and the load-balance terms.

Every term is divided by a count over the whole batch, which depends on the data alone. So the terms of micro-batches
add up to those of the large batch, and their gradients do.

Suffixes: B batch, T tokens, V vocabulary, L MoE layers, P targets ahead (the model's own, then one an MTP module).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.core.lowrank import LowRank, held
from deepseek_jax.model.mtp import shifted
from deepseek_jax.model.outputs import Output
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.balance_loss import balance_losses
from deepseek_jax.train.cross_entropy import chunked_nats
from deepseek_jax.train.weights import LossWeights

ENTRIES = frozenset(("tokens", "segments", "positions", "loss_mask"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """What the terms of a batch are divided by; all float32, at least 1.

    ``targets``: [P], targets of the model and of each MTP module. ``rows``: [P], rows with a token that the model's,
    or that MTP module's, routers see. ``tokens``: [P], those tokens.
    """

    targets: jax.Array
    rows: jax.Array
    tokens: jax.Array


def targets(batch: dict[str, jax.Array], ahead: int) -> jax.Array:
    """int32 [B, T, ahead]: the tokens at +1..+ahead to be predicted, -1 where there is none or it is masked."""
    tokens = batch["tokens"]
    target_BTP = shifted(tokens, _segments(batch), ahead)
    if "loss_mask" in batch:
        mask_BTP = shifted(batch["loss_mask"], jnp.ones_like(tokens), ahead)
        target_BTP = jnp.where(mask_BTP > 0, target_BTP, -1)
    return target_BTP


def count(batch: dict[str, jax.Array], depth: int) -> Counts:
    """The counts of a batch for a model with ``depth`` MTP modules; entries of shape [..., B, T]."""
    flat = {name: a.reshape(-1, a.shape[-1]) for name, a in batch.items() if name != "positions"}
    real_BT = _segments(flat) != 0
    # A module is given the true next tokens; where they are unknown, it routes nothing.
    known_BTD = shifted(flat["tokens"], _segments(flat), depth) >= 0 if depth else jnp.zeros((*real_BT.shape, 0), bool)
    routed_BTP = jnp.concatenate([real_BT[..., None], known_BTD], axis=-1)

    def total(found):
        return jnp.maximum(found.sum((0, 1)), 1).astype(jnp.float32)

    return Counts(
        targets=total(targets(flat, 1 + depth) >= 0),
        rows=total(routed_BTP.any(1, keepdims=True)),
        tokens=total(routed_BTP),
    )


def mtp_divisors(counts: Counts, weights: LossWeights) -> jax.Array:
    """float32 [D]: what each MTP module's summed cross-entropy is divided by (V3 eq. 24; `LossWeights.mtp_over`)."""
    targets_D = counts.targets[1:]
    return targets_D if weights.mtp_over == "targets" else jnp.full_like(targets_D, counts.tokens[0])


def cross_entropy(logits_BTV: jax.Array, target_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(target) in nats and the number of targets; a target of -1 takes no part."""
    known_BT = target_BT >= 0
    picked = jnp.take_along_axis(logits_BTV, jnp.maximum(target_BT, 0)[..., None], axis=-1)[..., 0]
    nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked
    return jnp.where(known_BT, nats_BT, 0).sum(), known_BT.sum()


def _nats(model: Transformer, hidden_BTD: jax.Array, logits_BTV: jax.Array | None, target_BT: jax.Array, ctx: Context):
    """The sum of -log p(target), from the logits, or from the hidden states a chunk of each row's tokens at a time."""
    if logits_BTV is not None:
        return cross_entropy(logits_BTV, target_BT)[0]
    head = model.embed if model.head is None else model.head
    axes = (head.base if isinstance(head, LowRank) else head).get_metadata()["axes"]
    weight = held(head)
    if not isinstance(weight, jax.Array):
        weight = ctx.ops.weight(head, hidden_BTD.dtype)
    return chunked_nats(hidden_BTD, weight, target_BT, axes, ctx)


def loss(
    model: Transformer,
    batch: dict[str, jax.Array],
    weights: LossWeights | None = None,
    ctx: Context | None = None,
) -> tuple[jax.Array, Output]:
    """The training loss in nats a token, and the forward pass's output with ``losses`` filled in.

    ``batch``: "tokens" int32 [B, T]; optional "segments" and "positions" int32 [B, T], as the model takes them;
    optional "loss_mask" [B, T], 1 where that token is to be predicted, 0 where it is only read (all by default).
    A row's tokens stand in the order of their positions.
    Each cross-entropy is the mean over its known targets: token i + 1 for the model, i + 2 + d for MTP module d (whose
    sum `LossWeights.mtp_over` divides by all tokens instead).
    ``losses``: "main", "mtp" (mean over the modules), "balance" (`balance_losses`), "index" where it has a weight, all
    unweighted, and "tokens", the targets counted.

    With ``ctx.loss_chunk`` the output has no logits. On a mesh that splits rows the tokens of ``hidden``, the logits
    and ``aux`` stand in `parallel.sequence.balanced_order`.

    Raises ValueError for a batch without tokens, with unknown entries or shapes, and, where values are known, for ids
    outside the vocabulary; under jit such an id makes the loss NaN.
    """
    weights = weights or LossWeights()
    if not isinstance(model, Transformer) or not isinstance(weights, LossWeights):
        raise ValueError(
            f"loss is of a model, a batch and LossWeights(...), not of {type(model).__name__} and "
            f"{type(weights).__name__}."
        )
    check_entries(batch)
    depth = mtp_depth(model, weights)
    return part_loss(model, batch, count(batch, depth), weights, weights.mtp, ctx)


def part_loss(
    model: Transformer,
    batch: dict[str, jax.Array],
    counts: Counts,
    weights: LossWeights,
    mtp_weight: float | jax.Array,
    ctx: Context | None = None,
    capture: tuple[str, ...] = (),
) -> tuple[jax.Array, Output]:
    """`loss` with the terms divided by ``counts``, which may be those of a larger batch of which this is a part.

    ``mtp_weight`` stands for ``weights.mtp``, of which only matters whether it is 0: then no module is run.
    """
    depth, ctx = mtp_depth(model, weights), ctx or DEFAULT
    target_BTP = targets(batch, 1 + depth)
    inputs = {"segments": batch.get("segments"), "positions": batch.get("positions")}
    order, ctx = ctx.ops.row_order(batch["tokens"].shape[1], ctx)
    if order is not None:
        # What is shifted along a row is shifted before its tokens change places.
        batch, inputs, target_BTP = _ordered(batch, depth, target_BTP, order)
    logits = "all" if ctx.loss_chunk is None else "none"
    if weights.index:
        if not model.cfg.attention.indexed:
            raise ValueError(f"LossWeights(index={weights.index}): {model.cfg.name} has no indexer.")
        capture = (*capture, "index_kl")
    out = model(batch["tokens"], **inputs, with_mtp=depth > 0, logits=logits, capture=capture, ctx=ctx)
    if order is not None:
        place = np.argsort(order)
        out = replace(out, captured={name: a[:, :, place] for name, a in out.captured.items()})
    logits_of = (None,) * (1 + depth) if out.logits is None else (out.logits, *out.mtp_logits)
    heads = zip((out.hidden, *out.mtp_hidden), logits_of, strict=True)
    nats = []
    for ahead, (hidden_BTD, logits_BTV) in enumerate(heads):
        if nats:
            # One head after the other, before any MTP module's backward pass: each holds a gradient of its own size.
            hidden_BTD, nats[-1] = jax.lax.optimization_barrier((hidden_BTD, nats[-1]))
        nats.append(_nats(model, hidden_BTD, logits_BTV, target_BTP[..., ahead], ctx))
    losses = {"main": nats[0] / counts.targets[0], "tokens": (target_BTP[..., 0] >= 0).sum()}
    total = losses["main"]
    if depth:
        over_D = mtp_divisors(counts, weights)
        losses["mtp"] = sum(nats[1 + d] / over_D[d] for d in range(depth)) / depth
        total = total + mtp_weight * losses["mtp"]
    if out.aux is not None or out.mtp_aux is not None:
        balance, losses["balance"] = balance_losses(out, model.cfg.moe, weights, counts.rows, counts.tokens)
        total = total + balance
    if weights.index:
        # A module counts the tokens whose next one is known.
        kl = [a["index_kl"] for a in (out.captured, out.mtp_captured) if "index_kl" in a]
        kl_LBT, modules = jnp.concatenate(kl), sum(map(len, kl[1:]))
        layers = jnp.asarray([*[0] * len(kl[0]), *range(1, 1 + modules)])
        losses["index"] = (kl_LBT.sum((1, 2)) / counts.tokens[layers]).sum()
        total = total + weights.index * losses["index"]
    return total, replace(out, losses=losses)


def _ordered(batch: dict[str, jax.Array], depth: int, target_BTP: jax.Array, order: np.ndarray):
    """The batch, the model's arguments and the targets with every row's tokens in that order."""
    B, T = batch["tokens"].shape
    inputs = {
        "segments": _segments(batch),
        "positions": batch.get("positions", jnp.broadcast_to(jnp.arange(T), (B, T))),
    }
    if depth:
        inputs["next_tokens"] = shifted(batch["tokens"], _segments(batch), depth)
    return jax.tree.map(lambda a: a[:, order], (batch, inputs, target_BTP))


def check_entries(batch: dict[str, jax.Array], entries: frozenset[str] = ENTRIES) -> None:
    """Raises ValueError for a batch without tokens, with other entries than ``entries``, or with ones of other shapes
    or kinds. Those that are not in `ENTRIES` may have axes of their own behind the tokens'."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a dict of arrays, 'tokens' among them, not {type(batch).__name__}.")
    if "tokens" not in batch or not set(batch) <= entries:
        hint = "; a loss_mask of 0 says what labels of -100 do" if "labels" in batch else ""
        raise ValueError(
            f"a batch needs 'tokens' and may have {sorted(entries - {'tokens'})}, not {sorted(map(str, batch))}{hint}."
        )
    for name, a in batch.items():
        if not hasattr(a, "dtype"):
            raise ValueError(f"a batch's entries are arrays, but {name} is {type(a).__name__}.")
        kinds = (jnp.integer, *((jnp.bool_,) if name in ("segments", "loss_mask") else ()))
        kinds += (jnp.floating,) if name == "loss_mask" else ()
        theirs = name not in ENTRIES
        if not theirs and not any(jnp.issubdtype(a.dtype, kind) for kind in kinds):
            raise ValueError(f"a batch's {name} are integers, not {a.dtype}.")
        if (a.shape[: batch["tokens"].ndim] if theirs else a.shape) != batch["tokens"].shape:
            raise ValueError(f"a batch's {name} have shape {a.shape}, its tokens {batch['tokens'].shape}.")


def mtp_depth(model: Transformer, weights: LossWeights) -> int:
    """How many MTP modules take part in the loss."""
    return model.cfg.mtp_depth if weights.mtp else 0


def _segments(batch: dict[str, jax.Array]) -> jax.Array:
    return batch["segments"] if "segments" in batch else jnp.ones_like(batch["tokens"])
