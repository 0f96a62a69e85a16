"""What training took, as published: GPU hours, days and dollars."""

from dataclasses import dataclass
from fractions import Fraction

from deepseek_jax.analysis.published.figure import Figure, counted


@dataclass(frozen=True)
class Stage:
    """A stage of a training run and the GPU hours that it took."""

    name: str
    gpu_hours: int


@dataclass(frozen=True)
class Cost:
    """What a training run took.

    ``price``: dollars for a GPU hour, as the source assumes. ``tokens``: tokens of the first stage.
    ``peak_flops``: dense bfloat16 FLOPs a second of one GPU.
    """

    gpu: str
    n_gpus: int
    price: int
    stages: tuple[Stage, ...]
    tokens: int
    peak_flops: float
    source: str

    @property
    def gpu_hours(self) -> int:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def dollars(self) -> int:
        return self.gpu_hours * self.price

    @property
    def days(self) -> float:
        """Days that the first stage took on all GPUs."""
        return self.stages[0].gpu_hours / self.n_gpus / 24

    def flops_per_second(self, flops_per_token: int) -> float:
        """FLOPs a second that each GPU did on average in the first stage."""
        return flops_per_token * self.tokens / (self.stages[0].gpu_hours * 3600)

    def utilization(self, flops_per_token: int) -> float:
        """That rate as a fraction of the peak (MFU)."""
        return self.flops_per_second(flops_per_token) / self.peak_flops


COSTS = {
    "deepseek-v3": Cost(
        gpu="H800",
        n_gpus=2048,
        price=2,
        stages=(
            Stage("pre-training", 2_664_000),
            Stage("context extension", 119_000),
            Stage("post-training", 5_000),
        ),
        tokens=14_800_000_000_000,
        peak_flops=989e12,
        source="2412.19437 table 1",
    )
}
# What R1 took on top of V3: H800 hours by stage, at $2 each. R1-Zero ran on 512 GPUs for 198 hours.
R1_ZERO = (512, 198)
R1_STAGES = (Stage("R1-Zero", 101_000), Stage("data for SFT", 5_000), Stage("R1", 41_000))

_V3, _COST, _R1 = "2412.19437", COSTS["deepseek-v3"], "2501.12948v2"
_HOURS_A_TRILLION = 180_000  # V3 §1


def r1_hours() -> int:
    return sum(stage.gpu_hours for stage in R1_STAGES)


def _stage_dollars(number: int) -> int:
    return _COST.stages[number].gpu_hours * _COST.price


FIGURES = (
    Figure("v3-pretraining-hours", "V3, pre-training", _COST.source, "2664", "K hours",
           lambda: _HOURS_A_TRILLION * Fraction(_COST.tokens, 10**12), "from 180K hours a trillion tokens"),
    Figure("v3-hours", "V3, all stages", _COST.source, "2788", "K hours", lambda: _COST.gpu_hours),
    Figure("v3-days-a-trillion", "V3, a trillion tokens on 2048 GPUs", f"{_V3} §1", "3.7", "days",
           lambda: Fraction(_HOURS_A_TRILLION, _COST.n_gpus * 24)),
    Figure("v3-pretraining-dollars", "V3, pre-training at $2 an hour", _COST.source, "5.328", "$M",
           lambda: _stage_dollars(0)),
    Figure("v3-extension-dollars", "V3, context extension", _COST.source, "0.238", "$M", lambda: _stage_dollars(1)),
    Figure("v3-post-dollars", "V3, post-training", _COST.source, "0.010", "$M", lambda: _stage_dollars(2)),
    Figure("v3-dollars", "V3, all stages", _COST.source, "5.576", "$M", lambda: _COST.dollars,
           "research and ablations before it are not included"),
    Figure("v3-days", "V3, pre-training on all GPUs", f"{_COST.source}, from", "54.2", "days", lambda: _COST.days),
    Figure("v3-all-days", "V3, all stages on all GPUs", f"{_COST.source}, from", "56.7", "days",
           lambda: Fraction(_COST.gpu_hours, _COST.n_gpus * 24)),
    Figure("v3-average-rate", "V3, rate of a GPU over all hours of pre-training", f"{_COST.source}, from", "386.5",
           "TFLOPs/s", lambda: _COST.flops_per_second(counted("deepseek-v3").flops_per_token),
           "by 250.46 GFLOPs a token, the routers' among them: 39.08% of the peak"),
    Figure("v2-hours-saved", "V2, training hours saved against DeepSeek 67B", "2405.04434 §3.2.3", "42.5", "%",
           lambda: 1 - Fraction("172.8") / Fraction("300.6"), "from 172.8K and 300.6K hours a trillion tokens"),
    Figure("r1-zero-hours", "R1-Zero, hours", _R1, "101", "K hours", lambda: R1_ZERO[0] * R1_ZERO[1],
           "from 512 GPUs and 198 hours"),
    Figure("r1-hours", "R1 and R1-Zero, on top of V3", _R1, "147", "K hours", r1_hours),
    Figure("r1-dollars", "R1 and R1-Zero at $2 an hour", _R1, "294", "$K", lambda: 2 * r1_hours(),
           "V3's training is not included"),
)  # fmt: skip
