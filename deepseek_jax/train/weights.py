"""What the terms of the loss weigh. Loads no JAX."""

from dataclasses import dataclass, fields

from deepseek_jax.configs.checks import check_types
from deepseek_jax.configs.numbers import LARGEST, within


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss terms beside next-token cross-entropy; a term of weight 0 is not computed."""

    mtp: float = 0.3
    """Multi-token prediction: lambda of V3 section 2.2, before `Recipe.mtp_change`. 0: the modules are not run."""
    mtp_over: str = "targets"
    """What a module's summed cross-entropy is divided by: its own "targets", so that it is a mean, or "tokens", all of
    the batch that are no padding: T of V3 equation 24. A module that looks further ahead weighs less then."""
    balance: float = 1e-4
    """Sequence-wise balance: alpha of V3 section 2.1.2, equation 17."""
    batch_balance: float = 0.0
    """Batch-wise balance (V3 section 4.5.3): the same over all tokens of a micro-batch instead of a row's. The one
    term that accumulating micro-batches changes: it acts on each of them, weighed by its tokens."""
    expert_balance: float = 0.0
    """Expert-level balance over the experts really chosen: alpha 1 of DeepSeekMoE (2401.06066) and V2 (2405.04434)."""
    device_balance: float = 0.0
    """Device-level balance: alpha 2 of DeepSeekMoE and V2."""
    communication_balance: float = 0.0
    """Balance of the tokens sent to each device: alpha 3 of V2. Needs a router with groups."""
    index: float = 0.0
    """How far the indexers of V3.2 and V4 are from what attention looks at: a divergence in nats, the mean over tokens,
    added up over layers (2512.02556 section 2.1.1). Of all terms it alone reaches the indexers, and nothing else."""
    devices: int | None = None
    """Groups of experts that stand for devices in the two terms above; by default the router's groups."""

    def __post_init__(self):
        check_types(self, ValueError)
        weights = [f.name for f in fields(self) if f.name not in ("devices", "mtp_over")]
        within(self, 0, LARGEST, *weights)
        if self.mtp_over not in ("targets", "tokens"):
            raise ValueError(f"mtp_over must be targets or tokens, not {self.mtp_over!r}.")
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"devices must be at least 1, not {self.devices}.")
