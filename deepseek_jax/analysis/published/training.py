"""Published sizes of training steps: V4's largest batches, and R1's batches and rewards."""

from fractions import Fraction

from deepseek_jax.analysis.published.figure import Figure
from deepseek_jax.train.recipes import recipe

_V4, _R1 = "2606.19348 §4.2.2", "2501.12948v2"
_ROWS = "in rows of 4,096 tokens, of which the paper gives no number: {} is inferred"
# R1-Zero (§2.2): questions of a step, answers to each, steps that learn from one rollout.
R1_ZERO_STEP = (32, 16, 16)
# Of R1's second stage of reinforcement learning: all steps, and the last ones, which alone have rewards by preference.
R1_SECOND_STAGE = (1700, 400)


def _batch(name: str) -> int:
    """Tokens of a recipe's largest step."""
    return recipe(name).batch_rows * recipe(name).length


def _answers() -> int:
    questions, each, _ = R1_ZERO_STEP
    return questions * each


FIGURES = (
    Figure("v4-flash-batch", "V4-Flash, largest batch in tokens", _V4, "75.5", "M",
           lambda: _batch("deepseek-v4-flash"), _ROWS.format("18,432"), releases=("deepseek-v4-flash",)),
    Figure("v4-pro-batch", "V4-Pro, largest batch in tokens", _V4, "94.4", "M", lambda: _batch("deepseek-v4-pro"),
           _ROWS.format("23,040"), releases=("deepseek-v4-pro",)),
    Figure("r1-zero-batch", "R1-Zero, samples of a step", _R1, "512", "", _answers,
           "from 32 questions, 16 answers each"),
    Figure("r1-zero-rollout", "R1-Zero, samples of a rollout", _R1, "8,192", "", lambda: R1_ZERO_STEP[2] * _answers(),
           "from 16 steps that learn from it"),
    Figure("r1-preferences", "R1, second stage, steps with rewards by preference", f"{_R1}, from", "23.5", "%",
           lambda: Fraction(R1_SECOND_STAGE[1], R1_SECOND_STAGE[0]), "from the last 400 of 1,700 steps"),
)  # fmt: skip
