"""A step of reinforcement learning: a rollout by the weights that are trained, its rewards, the updates on it.

Suffixes: N answers, A micro-batches, B answers of one, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.core.partition import combine
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import fetch, place_batch, row_share
from deepseek_jax.rl.advantage import advantages
from deepseek_jax.rl.problems import Problems
from deepseek_jax.rl.prompts import read
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.rewards import total
from deepseek_jax.rl.rollout import Rollout, batch, rollout
from deepseek_jax.rl.tasks import scored
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.step import State

# Whose random numbers: of rollouts and of held-out answers.
ROLLOUTS, HELD_OUT = 0, 1
# Of the updates on one rollout the mean is told, of all else the last.
MEANS = ("loss", "surrogate", "kl", "ratio", "clipped_low", "clipped_high", "masked", "cut", "mismatch", "grad_norm")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyState(State):
    """``old``: copies of the trained parameters as they were before the last steps, the oldest first, which write the
    rollouts; none where the weights that are trained do."""

    old: tuple[Any, ...]

    @property
    def writer(self) -> Transformer:
        """The model that writes the next rollout; without old parameters it is the one that is trained, not a copy."""
        return combine(self.old[0], self.rest) if self.old else self.model


def policy_state(state: State, stale: int) -> PolicyState:
    return PolicyState(**_plain(state), old=tuple(_copied(state.params) for _ in range(stale)))


def _plain(state: State) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in fields(State)}


def _copied(params):
    return jax.tree.map(jnp.copy, params)


def seed_of(seed: int, use: int, number: int) -> int:
    """Of a rollout: it follows from the run's seed and the step's number, so that a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, use, number]).generate_state(1)[0])


@dataclass(frozen=True)
class Writing:
    """How a run's models write answers to its problems, and what these are worth. ``ctx``: of the rollouts."""

    problems: Problems
    words: Tokenizer
    recipe: RlRecipe
    grpo: Grpo
    ctx: Context

    @property
    def length(self) -> int:
        """Tokens of a row: the longest prompt and the longest answer."""
        return self.problems.width + self.recipe.max_new_tokens

    def rollout(self, model: Transformer, prompts: list[list[int]], size: int, seed: int) -> Rollout:
        recipe = self.recipe
        how = {name: getattr(recipe, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        shape = {"ctx": self.ctx, "width": self.problems.width}
        return rollout(model, prompts, size, self.grpo, recipe.max_new_tokens, seed, **how, **shape)

    def texts(self, found: Rollout) -> list[str]:
        return read(self.words, found.answers, found.stop_ids)


@dataclass(frozen=True)
class Improve:
    """A `course.Step` over `problems.Prompts`. ``update``: `train.begin.compiled`, with `policy.Policy` or another
    objective over rollouts. ``beside``: of a micro-batch, what another model says of it, by the name of the batch's
    entry; None for nothing. ``ctx``: of training."""

    update: Callable[[State, dict, Knobs], tuple[State, dict]]
    writing: Writing
    beside: Callable[[dict[str, Any]], dict[str, jax.Array]] | None
    ctx: Context

    def __call__(
        self, state: PolicyState, prompts: dict[str, np.ndarray], knobs: Knobs
    ) -> tuple[PolicyState, dict[str, Any]]:
        """The metrics are the update's, those of `MEANS` as the mean over the rollout's updates, and of the rollout:
        "reward", the weighted sum; "rewards", its parts; "silent", the share of groups without signal; "length", tokens
        an answer; "truncated", the share that met their limit; "entropy", in nats a token, estimated from the draws, of
        the distribution that was drawn from."""
        recipe = self.writing.recipe
        count = int(state.step) // recipe.inner
        shaped, figures = self.answered(state.writer, prompts, count)
        old = (*state.old[1:], _copied(state.params)) if state.old else ()
        plain, found = State(**_plain(state)), []
        for _ in range(recipe.inner):
            plain, metrics = self.update(plain, shaped, knobs)
            found.append(metrics)
        return PolicyState(**_plain(plain), old=old), {**_together(found), **figures}

    def answered(
        self, writer: Transformer, prompts: dict[str, np.ndarray], count: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The update's batch [A, B, T] of rollout number ``count``, where it is computed, and the rollout's figures."""
        writing, recipe, grpo = self.writing, self.writing.recipe, self.writing.grpo
        numbers = prompts["problem"].reshape(-1)
        asked = [writing.problems.prompts[number] for number in numbers]
        found = writing.rollout(writer, asked, recipe.group, seed_of(recipe.seed, ROLLOUTS, count))
        problems = [writing.problems.training[number] for number in np.repeat(numbers, recipe.group)]
        columns = scored(writing.problems.task, problems, writing.texts(found), writing.problems.opened)
        reward_N = total(columns, {name: getattr(recipe.rewards, name) for name in columns})
        better = advantages(reward_N, found.group, grpo.scale, grpo.ddof)
        rows = batch(found, better, grpo, writing.length)
        shaped = {name: a.reshape(len(prompts["problem"]), -1, *a.shape[1:]) for name, a in rows.items()}
        placed = place_batch(own_rows(shaped, self.ctx), self.ctx)
        if self.beside is not None:
            parts = ({name: a[i] for name, a in placed.items()} for i in range(len(prompts["problem"])))
            said = [fetch(self.beside(part), self.ctx) for part in parts]
            more = {name: np.stack([by[name] for by in said]) for name in said[0]}
            placed |= place_batch(own_rows({"tokens": shaped["tokens"], **more}, self.ctx), self.ctx)
        drawn = np.concatenate([np.asarray(row, np.float64) for row in found.info.behaviour_logprobs])
        return placed, {
            "reward": np.nanmean(reward_N),
            "rewards": {name: np.nanmean(column) for name, column in columns.items()},
            "silent": better.silent,
            "length": np.mean([len(answer) for answer in found.answers]),
            "truncated": np.mean([reason == "length" for reason in found.info.finish_reason]),
            "entropy": -drawn.mean(),
        }


def own_rows(arrays: dict[str, np.ndarray], ctx: Context) -> dict[str, np.ndarray]:
    """Of whole micro-batches [A, B, ...] the rows that this process's devices compute."""
    groups, count = row_share(ctx)
    size = arrays["tokens"].shape[1] // count
    own = (np.asarray(groups)[:, None] * size + np.arange(size)).reshape(-1)
    return arrays if count == len(groups) else {name: a[:, own] for name, a in arrays.items()}


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of several updates as those of one step: the first that was skipped says why."""
    if len(found) == 1:
        return found[0]
    found = jax.device_get(found)
    skipped = [metrics["skipped"] for metrics in found]
    means = {name: np.mean([metrics[name] for metrics in found]) for name in MEANS if name in found[-1]}
    return {**found[-1], **means, "skipped": max(skipped), "fault": found[int(np.argmax(skipped))]["fault"]}
