"""GRPO as what a training step differentiates: `train.objective.Objective` over batches of rollouts.

Suffixes: B answers, T tokens, L MoE layers, K chosen experts, W words of a packed set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.generation.sampling import unpacked
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.rl.objective import Counts, count, loss, token_logprobs
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.train.objective import CAPTURE, loads, squares


@dataclass(frozen=True)
class Policy:
    """`objective.loss` of a model's log-probabilities.

    ``temperature``: the rollout's. Of a batch (`rollout.batch`): "answer", 1 where a token counts; "old", its behaviour
    log-probability; "advantage", its answer's; "reference", by the reference model (`logprobs`), where ``grpo.beta`` is
    not 0; "routing", the rollout's experts, with ``grpo.keep_routing``; "kept", its filters' sets, with
    ``grpo.keep_sampling_mask``.

    With replayed experts the routers' biases stay, whatever their speed: what they would count are the rollout's
    choices. The replayed experts' weights are the live router's, which so gets its gradient.
    """

    grpo: Grpo
    temperature: float = 1.0

    @property
    def entries(self) -> frozenset[str]:
        optional = {
            "reference": self.grpo.beta > 0,
            "routing": self.grpo.keep_routing,
            "kept": self.grpo.keep_sampling_mask,
        }
        return frozenset(("tokens", "segments", "answer", "old", "advantage")) | {n for n, on in optional.items() if on}

    def counts(self, batch) -> tuple[Counts, jax.Array]:
        real = batch["segments"] != 0
        return count(jnp.where(real, batch["answer"], 0)), jnp.maximum(real.sum(), 1).astype(jnp.float32)

    def __call__(self, model: Transformer, part: Mapping[str, jax.Array], counts, knobs, ctx: Context):
        needed = self.entries - ({"routing"} if model.cfg.moe is None else set())
        if missing := sorted(needed - part.keys()):
            raise ValueError(
                f"a batch of GRPO needs {', '.join(missing)}: `rl.rollout.batch` and `logprobs` give them."
            )
        routing = part["routing"].transpose(2, 0, 1, 3) if "routing" in part else None
        out = model(part["tokens"], segments=part["segments"], routing=routing, capture=CAPTURE, ctx=ctx)
        logprob_BT = token_logprobs(out.logits, part["tokens"], self.temperature, _kept(part, out.logits.shape[-1]))
        mask_BT = jnp.where(part["segments"] != 0, part["answer"], 0)
        total, seen = loss(
            self.grpo, logprob_BT, part["old"], part["advantage"][:, 0], mask_BT, part.get("reference"), counts[0]
        )
        routers = {} if routing is not None else loads(out)
        return total, {**seen, "activation_norm": squares(out, part) / counts[1], **routers}


@partial(jax.jit, static_argnames=("temperature", "ctx"))
def logprobs(
    model: Transformer, batch: Mapping[str, jax.Array], temperature: float = 1.0, ctx: Context = DEFAULT
) -> jax.Array:
    """float32 [B, T]: a reference model's entry of a batch [B, T]: over the same kept sets, by experts of its own."""
    out = model(batch["tokens"], segments=batch["segments"], ctx=ctx)
    return token_logprobs(out.logits, batch["tokens"], temperature, _kept(batch, out.logits.shape[-1]))


def _kept(part: Mapping[str, jax.Array], vocab_size: int) -> jax.Array | None:
    return unpacked(part["kept"], vocab_size) if "kept" in part else None
