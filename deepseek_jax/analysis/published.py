"""Figures that the makers of a release publish, each with its source, and what follows from them."""

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_jax.analysis.counts import BF16_BYTES, Counts
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import zoo

# The length at which FLOPs a token are published.
CONTEXT = 4096


@dataclass(frozen=True)
class Claim:
    """A published figure: its text as printed, its source, and the same figure from `Counts` at `CONTEXT`."""

    name: str
    published: str
    source: str
    ours: Callable[[Counts], str]


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


def _billions(value: int, digits: int = 2) -> str:
    return f"{value / 1e9:.{digits}f}B"


def _activated(c: Counts) -> str:
    return f"{_billions(c.activated_no_embedding)} to {_billions(c.activated)}"


def _layer(c: Counts) -> int:
    return c.mtp - c.mtp_components["projection"]


_PAPER, _INSIGHTS, _WEIGHTS = "2412.19437 §4.2", "2505.09343", "the release's README_WEIGHTS"
_V3 = (
    Claim("parameters", "671B", _PAPER, lambda c: _billions(c.total)),
    Claim("activated", "37B", _PAPER, _activated),
    Claim("MTP layer", "11.5B", _WEIGHTS, lambda c: _billions(_layer(c))),
    Claim("whole checkpoint", "685B", "the release's page", lambda c: _billions(c.stored)),
    Claim(
        "cache a token",
        "70.272 KB",
        f"{_INSIGHTS} table 1",
        lambda c: f"{c.kv_bytes_per_token / 1000:.3f} KB",
    ),
    Claim(
        "training a token",
        "250 GFLOPs",
        f"{_INSIGHTS} table 2",
        lambda c: f"{c.flops_per_token / 1e9:.2f} GFLOPs",
    ),
)
_MOONLIGHT = (
    Claim("without embeddings", "15.29B", "2502.16982 table 4", lambda c: _billions(c.total - 2 * c.embedding)),
    Claim(
        "the same, activated",
        "2.24B",
        "2502.16982 table 4",
        lambda c: _billions(c.activated - 2 * c.embedding),
    ),
)
_KIMI_K2 = (
    Claim("parameters", "1T", "the release's page", lambda c: f"{c.total / 1e12:.2f}T"),
    Claim("activated", "32B", "the release's page", _activated),
)

_V2_PAPER, _V1_PAPER = "2405.04434", "2401.06066 §5.1.2"
_V2 = (
    Claim("parameters", "236B", _V2_PAPER, lambda c: _billions(c.total)),
    Claim("activated", "21B", _V2_PAPER, _activated),
    Claim(
        "cache a token, numbers", "34.6K", f"{_V2_PAPER} table 9", lambda c: f"{c.kv_bytes_per_token // BF16_BYTES:,}"
    ),
    Claim("training a token", "155 GFLOPs", f"{_INSIGHTS} table 2", lambda c: f"{c.flops_per_token / 1e9:.2f} GFLOPs"),
)
_V2_LITE = (
    Claim("parameters", "15.7B", f"{_V2_PAPER} appendix B", lambda c: _billions(c.total)),
    Claim("activated", "2.4B", f"{_V2_PAPER} appendix B", _activated),
)
_MOE_16B = (
    Claim("parameters", "16.4B", _V1_PAPER, lambda c: _billions(c.total)),
    Claim("activated", "2.8B", _V1_PAPER, _activated),
)

CLAIMS = {
    "deepseek-moe-16b": _MOE_16B,
    "deepseek-v2-lite": _V2_LITE,
    "deepseek-v2": _V2,
    "deepseek-v2.5": _V2[:2],
    "deepseek-coder-v2": _V2[:2],
    "deepseek-v3": _V3,
    "deepseek-r1": _V3[:4],
    "deepseek-v3.1": _V3[:4],
    "moonlight-16b": _MOONLIGHT,
    "kimi-k2": _KIMI_K2,
}
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


def release_of(cfg: ModelConfig) -> str | None:
    """The release that a config is, None for an ablation or any other model of the same name."""
    return cfg.name if cfg.name in zoo() and cfg == zoo(cfg.name) else None
