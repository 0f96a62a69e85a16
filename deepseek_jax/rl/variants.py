"""The objective's forms: `Grpo`, and the published ones. Loads no JAX: the command line reads it."""

from dataclasses import dataclass, replace

from deepseek_jax.configs.checks import check_types
from deepseek_jax.rl.advantage import SCALES

CHOICES = {
    "ratio": ("token", "sequence", "mean"),
    "average": ("answer", "token", "fixed"),
    "scale": SCALES,
    "kl": ("k2", "k3", "unbiased"),
    "truncated": ("keep", "mask"),
}


@dataclass(frozen=True)
class Grpo:
    """One form of the objective; each part is switched by itself with `dataclasses.replace`.

    Raises ValueError for unknown choices, values out of range, and choices of which one undoes the other.
    """

    ratio: str = "token"
    """token: each token's own; sequence: the product over the answer; mean: its root of the answer's length (GSPO
    2507.18071). A ratio of an answer stands at each of its tokens. The KL's ratios follow it."""
    low: float = 0.2
    """The clip's range begins at 1 less this."""
    high: float = 0.2
    """And ends at 1 and this."""
    average: str = "answer"
    """answer: the mean over each answer's tokens, then over answers; token: over all tokens (DAPO 2503.14476); fixed:
    sums divided by as many tokens an answer as length says (Dr. GRPO 2503.20783)."""
    length: int | None = None
    """Of average fixed."""
    scale: str = "std"
    """What rewards less their group's mean are divided by: std, its standard deviation, or none."""
    ddof: int = 0
    """1: a deviation of one answer fewer, as torch.std has it."""
    beta: float = 0.0
    """Weight of the KL; 0 for none."""
    kl: str = "k3"
    """The KL's estimate: k2, k3, or unbiased, k3 times the ratio."""
    delta: float | None = None
    """Answers of a negative advantage whose mean log(old / policy) exceeds it lose their surrogate; by default none.
    V3.2 does not print its value."""
    keep_routing: bool = False
    """Training replays the experts that wrote the answer."""
    keep_sampling_mask: bool = False
    """Training has its probabilities over the tokens that the sampler's filters left."""
    truncated: str = "keep"
    """Whether an answer that met its limit of tokens counts (keep), or is no part of the loss (mask); its reward is
    part of its group's mean either way."""

    def __post_init__(self):
        check_types(self, ValueError)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                why = ": the gradient of k1 is 0 on average" if (name, self.kl) == ("kl", "k1") else ""
                raise ValueError(f"Grpo({name}={getattr(self, name)!r}): choose one of {', '.join(choices)}{why}.")
        for name in ("low", "high", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Grpo({name}={getattr(self, name)!r}): must be at least 0.")
        if self.ddof not in (0, 1):
            raise ValueError(f"Grpo(ddof={self.ddof!r}): must be 0 or 1.")
        if self.scale == "none" and self.ddof:
            raise ValueError('Grpo(scale="none", ddof=1): without a deviation there is nothing to count.')
        if (self.average == "fixed") != (self.length is not None) or (self.length is not None and self.length < 1):
            raise ValueError(
                f"Grpo(average={self.average!r}, length={self.length!r}): a length of at least 1 belongs to "
                'average="fixed", and to no other.'
            )
        if self.delta is not None and not self.delta >= 0:
            raise ValueError(f"Grpo(delta={self.delta!r}): must be at least 0, or None for no mask.")


MATH = Grpo(beta=0.04)
V3 = Grpo(ratio="sequence", beta=0.001)
V32 = Grpo(scale="none", beta=0.001, kl="unbiased", delta=0.5, keep_routing=True, keep_sampling_mask=True)
# R1's report gives beta, and a clip of 10 for its first stage. DeepSeekMath gives beta; V3 and V3.2 print neither, and
# no paper of the three its clip: those are the usual 0.2, and R1's beta.
VARIANTS = {"deepseek-math": MATH, "v3": V3, "r1": replace(V3, low=10.0, high=10.0), "v3.2": V32}
