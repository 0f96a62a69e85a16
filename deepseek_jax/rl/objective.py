"""GRPO's objective in its three published forms, as a pure function of log-probabilities.

    - sum over answers of (min(rho A, clip(rho) A), unless masked; less beta KL), each averaged as the form says

- DeepSeekMath 2402.03300 eq. 3: a ratio a token, the mean over each answer's tokens, k3.
- V3 2412.19437 eq. 26-27 and R1 2501.12948 eq. 1-2: one ratio an answer, the product over its tokens; k3 of that.
- V3.2 2512.02556 eq. 5-9: a ratio a token, advantages without the deviation, an unbiased KL, a mask on the surrogate of
  answers that are bad and far from the policy.

Suffixes: B answers, T tokens (prompt, answer, padding), V vocabulary. Entry t of an array [B, T] is of the token at t.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from deepseek_jax.rl.variants import Grpo

# Logarithms of ratios beyond this are cut, and counted: e^20 is 5e8, and the product over an answer may overflow. Where
# one is cut its gradient is 0.
LARGEST = 20.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """What a batch's terms are divided by, float32, at least 1: its answers with a token that counts, and those tokens.
    Of the whole batch, so that the losses of its parts add up to its own, and the gradients."""

    answers: jax.Array
    tokens: jax.Array


def count(mask_BT: jax.Array) -> Counts:
    """Of a batch's mask, [..., B, T]."""
    real = jnp.asarray(mask_BT) > 0
    return Counts(*(jnp.maximum(a.sum(), 1).astype(jnp.float32) for a in (real.any(-1), real)))


def answer_mask(
    token_BT: jax.Array, start_B: jax.Array, length_B: jax.Array, stop_ids, truncated: str = "keep"
) -> tuple[jax.Array, jax.Array]:
    """float32 [B, T], 1 at the tokens that count; and bool [B], whether an answer ended by itself.

    ``start_B``, ``length_B``: tokens of the prompt, and of the row. Of an answer count its tokens up to the first stop
    id of any kind, which counts too; what stands after it does not. ``truncated``: `Grpo.truncated`.
    """
    token_BT = jnp.asarray(token_BT)
    place_T = jnp.arange(token_BT.shape[1])
    answer_BT = (place_T >= jnp.asarray(start_B)[:, None]) & (place_T < jnp.asarray(length_B)[:, None])
    stops_BT = answer_BT & jnp.isin(token_BT, jnp.asarray(sorted(stop_ids), token_BT.dtype))
    counts_BT = answer_BT & (jnp.cumsum(stops_BT, axis=1) - stops_BT == 0)
    ended_B = stops_BT.any(1)
    if truncated == "mask":
        counts_BT &= ended_B[:, None]
    return counts_BT.astype(jnp.float32), ended_B


def token_logprobs(logits_BTV: jax.Array, token_BT: jax.Array, temperature=1.0, kept_BTV=None) -> jax.Array:
    """float32 [B, T]: log p of each token by the logits of the one before it, 0 at the first.

    ``temperature``: the sampler's, a number or [B]: policy, old policy and reference are all divided by it.
    ``kept_BTV``: bool, the tokens that its filters left at that token's draw (keep-sampling-mask); at least the token
    itself has to be kept where the value is used.
    """
    scaled_BTV = logits_BTV[:, :-1].astype(jnp.float32) / jnp.reshape(jnp.asarray(temperature, jnp.float32), (-1, 1, 1))
    if kept_BTV is not None:
        # A row of nothing, as a prompt's, keeps all: -inf throughout would make its gradient NaN.
        kept_BTV = kept_BTV[:, 1:] | ~kept_BTV[:, 1:].any(-1, keepdims=True)
        scaled_BTV = jnp.where(kept_BTV, scaled_BTV, -jnp.inf)
    logprob_BT = jnp.take_along_axis(jax.nn.log_softmax(scaled_BTV), token_BT[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(logprob_BT, ((0, 0), (1, 0)))


def kl_terms(kind: str, log_ratio: jax.Array, log_old: jax.Array | float = 0.0) -> jax.Array:
    """An estimate of KL(policy || reference) from each sample, of ``log_ratio`` = log(policy / reference).

    Values: "k1", "k2" and "k3" are Schulman's; of samples of the policy k1 and k3 have the KL as their mean, and k3 is
    never negative. Gradients are another matter: of samples that are held fixed, k1's is 0 on average, k2's is that of
    the KL, k3's is that of KL(reference || policy). "unbiased" is k3 times policy / old, ``log_old`` its logarithm,
    both differentiated: of samples of the old policy its mean is the KL, and its gradient the KL's (V3.2 eq. 7).
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    k3 = jnp.exp(_cut(-log_ratio)) - 1 + _cut(log_ratio)
    return jnp.exp(_cut(log_old)) * k3 if kind == "unbiased" else k3


def terms(
    cfg: Grpo,
    logprob_BT: jax.Array,
    old_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    reference_BT: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Every token's part, [B, T] or [B, 1] where an answer has one for all its tokens; see `loss`, which averages them.

    "loss", "kl" (before beta), "ratio"; bool "clipped_low", "clipped_high", where the clip acts and the gradient is 0;
    "masked", the surrogates that `Grpo.delta` leaves out; "cut", where `LARGEST` acts.
    """
    real_BT = jnp.asarray(mask_BT) > 0
    tokens_B1 = jnp.maximum(real_BT.sum(-1, keepdims=True), 1)

    def by_answer(log_BT, kind):
        if kind == "token":
            return log_BT
        sum_B1 = log_BT.sum(-1, keepdims=True)
        return sum_B1 if kind == "sequence" else sum_B1 / tokens_B1

    # What does not count may hold anything, a pad's sentinel too.
    log_BT = jnp.where(real_BT, logprob_BT, 0) - jnp.where(real_BT, jax.lax.stop_gradient(old_BT), 0)
    log = by_answer(log_BT, cfg.ratio)
    cut = jnp.abs(log) > LARGEST
    ratio = jnp.exp(_cut(log))
    advantage_B1 = jnp.asarray(advantage_B, jnp.float32)[:, None]
    clipped = jnp.clip(ratio, 1 - cfg.low, 1 + cfg.high)
    surrogate = jnp.minimum(ratio * advantage_B1, clipped * advantage_B1)
    masked_B1 = jnp.zeros(advantage_B1.shape, bool)
    if cfg.delta is not None:
        # One decision an answer, over its own tokens; a good answer is never masked.
        off_B1 = jax.lax.stop_gradient(-log_BT.sum(-1, keepdims=True) / tokens_B1)
        masked_B1 = (advantage_B1 < 0) & (off_B1 > cfg.delta)
        surrogate = jnp.where(masked_B1, 0, surrogate)
    kl = jnp.zeros_like(surrogate)
    if reference_BT is not None:
        reference_BT = jnp.where(real_BT, jax.lax.stop_gradient(reference_BT), 0)
        far = by_answer(jnp.where(real_BT, logprob_BT, 0) - reference_BT, cfg.ratio)
        kl, cut = kl_terms(cfg.kl, far, log), cut | (jnp.abs(far) > LARGEST)
    return {
        "loss": cfg.beta * kl - surrogate,
        "kl": kl,
        "ratio": ratio,
        "clipped_low": (ratio < 1 - cfg.low) & (advantage_B1 < 0) & ~masked_B1,
        "clipped_high": (ratio > 1 + cfg.high) & (advantage_B1 > 0) & ~masked_B1,
        "masked": masked_B1,
        "cut": cut,
    }


def loss(
    cfg: Grpo,
    logprob_BT: jax.Array,
    old_BT: jax.Array,
    advantage_B: jax.Array,
    mask_BT: jax.Array,
    reference_BT: jax.Array | None = None,
    counts: Counts | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The loss to make small, float32, and diagnostics; of a part of a batch with the whole batch's ``counts``, the
    part's share of both: they add up.

    ``logprob_BT``: of each token by the policy, which the gradient goes through. ``old_BT``: by what wrote it, the
    behaviour log-probability. ``reference_BT``: by the reference, needed where ``beta`` is not 0. All three at the
    sampler's temperature. ``advantage_B``: `advantage.advantages`. ``mask_BT``: `answer_mask`; of rows without a reward
    or left out by a filter it is 0. A row that is masked throughout counts nowhere; of a batch of such rows the loss
    and its gradient are 0. Groups of equal rewards stay in the batch with advantage 0, where they feel the KL.

    A loss near 0 is no dead run: with ratios of 1 DeepSeekMath's first step has a loss of beta times the KL, its
    gradient is not 0.

    Diagnostics, means as the loss has them unless said: "surrogate"; "kl", by `Grpo.kl`; over tokens "ratio",
    "mismatch" (k3 of old against policy), "clipped_low", "clipped_high" (shares, where the gradient is 0: ratios below
    of bad answers, above of good ones), "cut"; over answers "masked".
    """
    if cfg.beta and reference_BT is None:
        raise ValueError(f"beta={cfg.beta}: the KL needs the reference's log-probabilities.")
    shapes = {"old": old_BT, "mask": mask_BT} | ({} if reference_BT is None else {"reference": reference_BT})
    for name, array in shapes.items():
        if array.shape != logprob_BT.shape:
            raise ValueError(f"{name} has shape {array.shape}, the log-probabilities {logprob_BT.shape}.")
    if jnp.shape(advantage_B) != logprob_BT.shape[:1]:
        raise ValueError(f"advantages have shape {jnp.shape(advantage_B)}; there are {len(logprob_BT)} answers.")
    counts = count(mask_BT) if counts is None else counts
    real_BT = (jnp.asarray(mask_BT) > 0).astype(jnp.float32)
    found = terms(cfg, logprob_BT, old_BT, advantage_B, mask_BT, reference_BT)

    def mean(a, average):
        a = jnp.where(real_BT > 0, a, 0)
        if average == "answer":
            return (a.sum(-1) / jnp.maximum(real_BT.sum(-1), 1)).sum() / counts.answers
        return a.sum() / (counts.tokens if average == "token" else counts.answers * cfg.length)

    off_BT = jnp.where(real_BT > 0, logprob_BT, 0) - jnp.where(real_BT > 0, old_BT, 0)
    over_tokens = {name: found[name] for name in ("ratio", "clipped_low", "clipped_high", "cut")}
    over_tokens["mismatch"] = kl_terms("k3", -off_BT)
    seen = {
        "surrogate": mean(cfg.beta * found["kl"] - found["loss"], cfg.average),
        "kl": mean(found["kl"], cfg.average),
        "masked": mean(found["masked"], "answer"),
        **{name: mean(a, "token") for name, a in over_tokens.items()},
    }
    return mean(found["loss"], cfg.average), jax.lax.stop_gradient(seen)


def reverse_kl(student_BTV: jax.Array, teacher_BTV: jax.Array) -> jax.Array:
    """float32 [B, T]: KL(student || teacher) in nats of each position's logits, over the whole vocabulary. Over the
    teacher's best tokens only it would reward mass that is moved elsewhere. For on-policy distillation."""
    student, teacher = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (student_BTV, teacher_BTV))
    return (jnp.exp(student) * (student - jax.lax.stop_gradient(teacher))).sum(-1)


def _cut(log_ratio):
    return jnp.clip(log_ratio, -LARGEST, LARGEST)
