"""What R1's pipeline does beside its runs of reinforcement learning. Loads no JAX."""

from dataclasses import dataclass

from deepseek_jax.configs.checks import check_types
from deepseek_jax.rl.recipe import FORMS

LEFT_OUT = "none"


@dataclass(frozen=True)
class Stages:
    """Fine-tuning and rejection sampling of the pipeline (R1 2501.12948 §2.3)."""

    zero: str = "r1-zero"
    """How R1-Zero, which learns from the base beside the pipeline, is put its problems: a --form; none: it is left
    out."""
    cold_start: int = 2000
    """Of the task's solutions so many begin it, the first ones."""
    rollouts: int = 200
    """Rejection sampling: rollouts of --prompts x --group answers, of which the right ones are learned from,
    --keep to a problem."""
    cold_epochs: float = 3.0
    """Passes over the solutions."""
    sft_epochs: float = 5.0
    """Passes over the answers that are learned from; the base knows none of it, so they have to be enough."""
    sft_lr: float = 1e-3
    """Learning rate of fine-tuning; it ends at a tenth of it."""

    def __post_init__(self):
        check_types(self, ValueError)
        if self.zero not in (*FORMS, LEFT_OUT):
            raise ValueError(f"zero must be one of {', '.join((*FORMS, LEFT_OUT))}, not {self.zero!r}.")
        for name, least in (("cold_start", 2), ("rollouts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("cold_epochs", "sft_epochs", "sft_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
