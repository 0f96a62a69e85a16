"""A paper's recipe in proportion to a budget of tokens. Loads no JAX."""

from dataclasses import replace

from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.schedule import count_steps

ENOUGH_STEPS = 1000
FEWEST_ROWS = 8
# A sigmoid score lies within 1, so a bias that travels 8 can cross the scores' range several times.
REACH = 8.0
# 2408.15664 figure 4: at 0.01 the balance oscillates late in the run.
FASTEST_BIAS = 0.01


def scaled(recipe: Recipe, tokens: int, batch_rows: int | None = None, length: int | None = None) -> Recipe:
    """``recipe`` in proportion to a budget of ``tokens``.

    - Every point given in tokens (decay, drops, ramp, MTP weight, end of the bias's moves) keeps its share.
    - The batch: ``batch_rows`` rows; by default the recipe's own, or fewer, but not under `FEWEST_ROWS`, so that
      the run has `ENOUGH_STEPS` steps. The ramp begins at the same share of the batch, and where the batch
      changes, a micro-batch is the first step's batch.
    - The warm-up keeps its share of the steps, but is no shorter than 2% of them and no longer than it was.
    - The bias speed rises so that a bias can travel `REACH` over the run, or as far as it could if that was
      less, but not above `FASTEST_BIAS`.
    - The moving average keeps its share of the run.
    - Learning rates stay: they depend on the model's width more than on the run's length.

    Raises ValueError for a budget of less than one row.
    """
    length = recipe.length if length is None else length
    if tokens < length:
        raise ValueError(f"{tokens} tokens do not fill one row of {length}.")
    paper_steps, share = count_steps(recipe), tokens / recipe.tokens

    def at(point: int | None) -> int | None:
        return None if point is None else round(point * share)

    if batch_rows is None:
        enough = tokens // (length * min(ENOUGH_STEPS, paper_steps))
        batch_rows = min(recipe.batch_rows, max(enough, FEWEST_ROWS))
    first_rows, micro_rows = recipe.first_rows, recipe.micro_rows
    if batch_rows != recipe.batch_rows:
        # The nearest divisor below, so that every step is a whole number of equal micro-batches.
        first_rows = max(1, batch_rows * recipe.start_rows // recipe.batch_rows)
        first_rows = next(rows for rows in range(first_rows, 0, -1) if batch_rows % rows == 0)
        first_rows = micro_rows = None if first_rows == batch_rows else first_rows
    rate = recipe.rate
    new = replace(
        recipe,
        tokens=tokens,
        length=length,
        batch_rows=batch_rows,
        first_rows=first_rows,
        micro_rows=micro_rows,
        ramp_tokens=at(recipe.ramp_tokens),
        mtp_change=at(recipe.mtp_change),
        bias_until=at(recipe.bias_until),
        rate=replace(
            rate,
            decay_from=at(rate.decay_from),
            decay_until=max(at(rate.decay_until), 1 + (at(rate.decay_from) or 0)),
            drops=tuple((at(point), value) for point, value in rate.drops),
        ),
    )
    steps = count_steps(new)
    ratio = steps / paper_steps
    travel = min(recipe.bias_speed * paper_steps, REACH)
    speed = max(recipe.bias_speed, min(travel / steps, FASTEST_BIAS)) if recipe.bias_speed else 0.0
    warmup = min(rate.warmup_steps, max(round(rate.warmup_steps * ratio), round(0.02 * steps)))
    return replace(
        new,
        bias_speed=speed,
        ema_decay=max(0.0, 1 - (1 - recipe.ema_decay) / ratio) if recipe.ema_decay else 0.0,
        rate=replace(new.rate, warmup_steps=warmup),
    )
