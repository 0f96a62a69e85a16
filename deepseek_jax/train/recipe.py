"""What a training run does, apart from the model and the data. Loads no JAX: the command line reads it."""

from dataclasses import dataclass, field


def _within(owner, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low:g} and {high:g}, not {value}.")


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss terms beside next-token cross-entropy."""

    mtp: float = 0.3
    """Multi-token prediction: lambda of V3 section 2.2 (0.3, for the last third 0.1)."""
    balance: float = 1e-4
    """Sequence-wise balance: alpha of V3 section 2.1.2."""

    def __post_init__(self):
        _within(self, 0, float("inf"), "mtp", "balance")


@dataclass(frozen=True)
class Optimizer:
    """Learning rate, AdamW and Muon."""

    peak_lr: float = 6e-3
    """Learning rate after the warm-up."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay_from: float = 0.5
    """Fraction of all steps after which the rate falls along a cosine."""
    final_lr: float = 0.05
    """Rate at the end, as a fraction of the peak."""
    b1: float = 0.9
    """AdamW's first-moment decay."""
    b2: float = 0.95
    """AdamW's second-moment decay."""
    weight_decay: float = 0.1
    """Times the learning rate; on matrices only, not on norms."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    muon: bool = True
    """Orthogonalised momentum for matrices, scaled to AdamW's step size (2502.16982); AdamW keeps the embedding,
    the head, the routers and the norms. Off: AdamW for all."""

    def __post_init__(self):
        _within(self, 0, float("inf"), "peak_lr", "warmup", "weight_decay", "clip")
        _within(self, 0, 1, "decay_from", "final_lr", "b1", "b2")


@dataclass(frozen=True)
class Recipe:
    """Length, batch, seed, router bias and measurements of a run."""

    steps: int = 2400
    """Optimizer steps."""
    batch_size: int = 4
    """Rows a step."""
    length: int = 512
    """Tokens a row."""
    seed: int = 0
    """Of the initial weights and the order of the text."""
    bias_speed: float = 3e-3
    """Step of the router bias: gamma of V3 section 4.2, there 0.001 over far more steps."""
    bias_until: float = 0.966
    """Fraction of the steps after which the router bias stays (V3: 14.3T of 14.8T tokens)."""
    evaluate_every: int = 200
    """Steps between measurements on the held-out text."""
    log_every: int = 20
    """Steps between lines of the log."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self):
        for name in ("steps", "batch_size", "evaluate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        _within(self, 0, float("inf"), "bias_speed")
        _within(self, 0, 1, "bias_until")
        if self.length < 3:
            raise ValueError(f"length must be at least 3 tokens, not {self.length}.")

    def bias_speed_at(self, step: int) -> float:
        return self.bias_speed if step < self.bias_until * self.steps else 0.0
