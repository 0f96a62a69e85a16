"""What a model's layers are made of, one by one, and which of them are kept and scanned together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepseek_jax.configs.attention import GQA, MLA, Compressed
from deepseek_jax.configs.checks import check_types, require, require_number
from deepseek_jax.configs.numbers import LARGEST
from deepseek_jax.notes import shown

# V4's two kinds of attention alternate; no release repeats a longer pattern.
LONGEST_PATTERN = 2
# Of the words in a `MoE`.
CHOICES = {
    "score": ("sigmoid", "softmax", "sqrtsoftplus"),
    "group_score": ("top2", "max"),
    "bias_form": ("sum", "product"),
}


@dataclass(frozen=True)
class Dense:
    """A SwiGLU network of inner width ``dim``."""

    dim: int


@dataclass(frozen=True)
class MoE:
    """DeepSeekMoE (2401.06066); by default with V3's sigmoid scores and selection-only bias (V3 §2.1.2).

    ``n_groups`` and ``top_groups``: node-limited routing; 1 and 1 switch it off. ``normalize``: the chosen
    scores are divided by their sum before ``scale``. ``score``: "sigmoid", "softmax" over all experts (V1, V2), or
    "sqrtsoftplus", sqrt(log(1 + exp(logit))) (V4).
    ``group_score``: a group counts as its two best experts ("top2"), or as its best ("max": V2 §2.2.2). ``bias``:
    whether a bias, which balances the load, acts on the choice; by ``bias_form`` it is by score + bias ("sum"), or by
    score x (1 + bias) ("product": the multiplicative bias of 2408.15664, table 4, begins at 1, ours at 0).
    ``shared_dim``: inner width of one shared expert; None: ``expert_dim``.
    ``n_hash``: in the first so many layers with experts a token's id chooses them, by a table; the weights are those of
    the scores all the same, and there is no bias (V4 §2.1). ``limit``: of experts, shared ones too, the gate's input is
    cut off above it and the other factor to at most its magnitude; None: they are not.

    What a layer has (``at``) has an ``n_hash`` of 1 or 0.
    """

    n_experts: int
    top_k: int
    expert_dim: int
    n_shared: int = 1
    n_groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    scale: float = 1.0
    score: str = "sigmoid"
    group_score: str = "top2"
    bias: bool = True
    bias_form: str = "sum"
    shared_dim: int | None = None
    n_hash: int = 0
    limit: float | None = None

    def __post_init__(self):
        check_types(self, finite=True)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"MoE {name} must be one of {', '.join(choices)}, not {shown(value)}.")
        for name in ("n_experts", "top_k", "expert_dim", "n_groups", "top_groups"):
            require(getattr(self, name) > 0, f"MoE {name} must be positive, not {getattr(self, name)}.")
        require_number(self, "scale", low=-LARGEST)
        require(self.n_shared >= 0, f"MoE n_shared must not be negative, as {self.n_shared} is.")
        require(
            self.bias or self.bias_form == "sum",
            f"MoE bias_form={shown(self.bias_form)} says how a bias acts, but bias is False: leave one of them out.",
        )
        require(
            self.shared_dim is None or self.shared_dim > 0, f"MoE shared_dim must be positive, not {self.shared_dim}."
        )
        require(
            self.shared_dim is None or self.n_shared > 0,
            f"MoE shared_dim={self.shared_dim} is the width of a shared expert, but n_shared is 0.",
        )
        require(self.n_hash >= 0, f"MoE n_hash must not be negative, as {self.n_hash} is.")
        if self.limit is not None:
            require_number(self, "limit")
        require(
            self.n_experts % self.n_groups == 0,
            f"n_experts={self.n_experts} does not divide into n_groups={self.n_groups} groups.",
        )
        require(
            self.top_groups <= self.n_groups,
            f"top_groups={self.top_groups} exceeds n_groups={self.n_groups}.",
        )
        per_group = self.n_experts // self.n_groups
        require(
            self.n_groups == 1 or per_group >= 2 or self.group_score == "max",
            f"a group is scored by its two best experts, but n_groups={self.n_groups} of n_experts={self.n_experts} "
            f"have {per_group} each.",
        )
        require(
            self.top_k <= self.top_groups * per_group,
            f"top_k={self.top_k} exceeds the {self.top_groups * per_group} experts that top_groups={self.top_groups} "
            f"of n_groups={self.n_groups} offer, of n_experts={self.n_experts}.",
        )

    def at(self, number: int) -> "MoE":
        """What the layer of this number among those with experts has."""
        if not self.n_hash:
            return self
        if number >= self.n_hash:
            return replace(self, n_hash=0)
        return replace(self, n_hash=1, bias=False, bias_form="sum")

    @property
    def shared_width(self) -> int:
        """Inner width of the shared experts together, which are one network."""
        return self.n_shared * (self.expert_dim if self.shared_dim is None else self.shared_dim)


@dataclass(frozen=True)
class HyperConnections:
    """A residual of several streams, as mHC (2512.24880 §4) and V4 have it, or its unconstrained baseline (2409.19606).

    ``n_streams``: parallel streams. ``constrained``: the matrix that mixes streams has rows and columns that add up to
    one, and reading and writing have positive weights; else a tanh of what is read is added to each weight.
    ``sinkhorn_steps``: how often columns and rows are made to add up to one. ``eps``: what is added to the weights of
    reading, to the matrix and to its sums.
    """

    n_streams: int = 4
    constrained: bool = True
    sinkhorn_steps: int = 20
    eps: float = 1e-6

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("n_streams", "sinkhorn_steps"):
            require(getattr(self, name) > 0, f"HyperConnections {name} must be positive, not {getattr(self, name)}.")
        require_number(self, "eps")
        for name in ("sinkhorn_steps", "eps"):
            value = getattr(self, name)
            require(
                self.constrained or value == getattr(HyperConnections, name),
                f"HyperConnections {name}={value} belongs to the constraint, but constrained is False: leave one of "
                "them out.",
            )


@dataclass(frozen=True)
class Layer:
    """One layer of the model, or of an MTP module."""

    attention: MLA | GQA | Compressed
    ffn: Dense | MoE

    @property
    def is_moe(self) -> bool:
        return isinstance(self.ffn, MoE)


@dataclass(frozen=True)
class Stack:
    """Equal layers, whose leaves a model keeps in one array each; ``numbers``: which layers of the model they are."""

    layer: Layer
    numbers: range


def segmented(layers: Sequence[Layer]) -> tuple[tuple[Stack, ...], ...]:
    """The layers as runs of a pattern that repeats, a stack for each place in the pattern; one scan runs a segment.

    V3: ((3 dense layers,), (58 MoE layers,)). Of patterns up to ``LONGEST_PATTERN`` the one that covers the most layers
    from where the last run ended is taken, of equal ones the shorter.
    """
    segments, first = [], 0
    while first < len(layers):
        length, count = 1, 1
        for pattern in range(1, LONGEST_PATTERN + 1):
            repeats, unit = 1, layers[first : first + pattern]
            while layers[first + repeats * pattern : first + (repeats + 1) * pattern] == unit:
                repeats += 1
            if pattern * repeats > length * count and (repeats > 1 or pattern == 1):
                length, count = pattern, repeats
        stop = first + length * count
        segments.append(tuple(Stack(layers[first + i], range(first + i, stop, length)) for i in range(length)))
        first = stop
    return tuple(segments)
