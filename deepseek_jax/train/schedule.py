"""What changes over a run, as functions of the tokens seen: rate, batch, bias speed, MTP weight. Loads no JAX.

Tokens seen are rows times length of the steps before, padding included, so a schedule depends on nothing that the
model or the data do. V3 §4.2 gives its points in tokens, its warm-up in steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_jax.train.recipe import LearningRate, Recipe


@dataclass(frozen=True)
class Setting:
    """One step's numbers: what `Knobs` hands to the compiled step, and the rows it takes."""

    lr: float
    bias_speed: float
    mtp_weight: float
    micro_batches: int
    rows: int


def setting(recipe: Recipe, tokens: int, step: int) -> Setting:
    """The numbers of step ``step`` (from 0), before which ``tokens`` tokens were seen."""
    micro_batches = batch_rows(recipe, tokens) // recipe.pass_rows
    return Setting(
        lr=learning_rate(recipe.rate, tokens, step),
        bias_speed=bias_speed(recipe, tokens),
        mtp_weight=mtp_weight(recipe, tokens),
        micro_batches=micro_batches,
        rows=micro_batches * recipe.pass_rows,
    )


def learning_rate(rate: LearningRate, tokens: int, step: int) -> float:
    """Linear in steps up to the peak, which step ``warmup_steps - 1`` is the first to have; then by tokens."""
    value = rate.peak
    if rate.decay_from is not None and tokens > rate.decay_from:
        share = min((tokens - rate.decay_from) / (rate.decay_until - rate.decay_from), 1.0)
        value = rate.decay_to + (rate.peak - rate.decay_to) * 0.5 * (1 + math.cos(math.pi * share))
    for start, dropped in rate.drops:
        if tokens >= start:
            value = dropped
    return value * min((step + 1) / rate.warmup_steps, 1.0) if rate.warmup_steps else value


def batch_rows(recipe: Recipe, tokens: int) -> int:
    """Rows of the step after ``tokens``: linear in tokens over the ramp, down to a whole number of micro-batches."""
    if tokens >= recipe.ramp_tokens:
        return recipe.batch_rows
    grown = (recipe.batch_rows - recipe.start_rows) * tokens / recipe.ramp_tokens
    return recipe.start_rows + int(grown // recipe.pass_rows) * recipe.pass_rows


def bias_speed(recipe: Recipe, tokens: int) -> float:
    """The router bias's step."""
    return recipe.bias_speed if recipe.bias_until is None or tokens < recipe.bias_until else 0.0


def mtp_weight(recipe: Recipe, tokens: int) -> float:
    """The weight of multi-token prediction."""
    before = recipe.mtp_change is None or tokens < recipe.mtp_change
    return recipe.weights.mtp if before or not recipe.weights.mtp else recipe.mtp_later


def tokens_by_step(recipe: Recipe) -> Iterator[int]:
    """Tokens seen before step 0, 1, ...: the run's steps, the last of which reaches ``recipe.tokens``."""
    tokens = 0
    while tokens < recipe.tokens:
        yield tokens
        tokens += batch_rows(recipe, tokens) * recipe.length


def count_steps(recipe: Recipe) -> int:
    """Steps of the run."""
    steps = 0
    for tokens in tokens_by_step(recipe):
        if tokens >= recipe.ramp_tokens:
            return steps + math.ceil((recipe.tokens - tokens) / (recipe.batch_rows * recipe.length))
        steps += 1
    return steps
