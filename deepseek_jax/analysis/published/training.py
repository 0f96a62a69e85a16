"""Published figures of training steps: V3's speed, V4's largest batches, and R1's batches and rewards."""

from fractions import Fraction

from deepseek_jax.analysis.published.costs import COSTS
from deepseek_jax.analysis.published.figure import Figure, counted
from deepseek_jax.train.recipes import recipe

_INSIGHTS, _V4, _R1 = "2505.09343 table 4", "2606.19348 §4.2.2", "2501.12948v2"
_ROWS = "in rows of 4,096 tokens, of which the paper gives no number: {} is inferred"
# R1-Zero (§2.2): questions of a step, answers to each, steps that learn from one rollout.
R1_ZERO_STEP = (32, 16, 16)
# Of R1's second stage of reinforcement learning: all steps, and the last ones, which alone have rewards by preference.
R1_SECOND_STAGE = (1700, 400)
# Seconds of a step of V3 on 2048 GPUs, its largest batch (2505.09343 table 4, the multi-plane network).
V3_STEP = Fraction("19.926")
_NO_ROUTER = "from the step's 19.926 s; that the routers are left out is inferred, with them it is {}"


def step_flops(whole: bool = False) -> int:
    """FLOPs of a token of V3 in training without the routers' products. ``whole``: with the whole square of attention's
    products instead of its causal half."""
    c = counted("deepseek-v3")
    matrices = 6 * (c.activated_no_embedding - c.components["router"])
    return matrices + (2 if whole else 1) * (c.flops_per_token - 6 * c.activated_no_embedding)


def _rate(whole: bool = False) -> Fraction:
    """FLOPs a second of a GPU."""
    return step_flops(whole) * _batch("deepseek-v3") / (V3_STEP * COSTS["deepseek-v3"].n_gpus)


def _utilization(whole: bool = False) -> Fraction:
    return _rate(whole) / int(COSTS["deepseek-v3"].peak_flops)


def _batch(name: str) -> int:
    """Tokens of a recipe's largest step."""
    return recipe(name).batch_rows * recipe(name).length


def _answers() -> int:
    questions, each, _ = R1_ZERO_STEP
    return questions * each


FIGURES = (
    Figure("v3-day", "V3, tokens a day on 2048 GPUs", _INSIGHTS, "272.80", "B",
           lambda: _batch("deepseek-v3") * 86400 / V3_STEP, "from the step's 19.926 s"),
    Figure("v3-rate", "V3, rate of a GPU in a step, causal attention", _INSIGHTS, "385", "TFLOPs/s", _rate,
           _NO_ROUTER.format("386.13")),
    Figure("v3-mfu", "V3, utilization in a step, causal attention", _INSIGHTS, "38.94", "%", _utilization,
           _NO_ROUTER.format("39.04%")),
    Figure("v3-rate-whole", "V3, rate of a GPU in a step, whole attention", _INSIGHTS, "432", "TFLOPs/s",
           lambda: _rate(whole=True), _NO_ROUTER.format("433.46")),
    Figure("v3-mfu-whole", "V3, utilization in a step, whole attention", _INSIGHTS, "43.73", "%",
           lambda: _utilization(whole=True), _NO_ROUTER.format("43.83%")),
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
