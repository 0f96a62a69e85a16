"""Forms of attention: frozen, hashable dataclasses, checked when they are made.

Each says how wide what it rotates is (``rope_dim``) and how many numbers a token leaves in a layer's cache
(``cache_width``); all else follows from the class.
"""

from dataclasses import dataclass

from deepseek_jax.configs.checks import check_types, require, require_number


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2309.00071; V3 §4.3), as published configs spell it.

    ``mscale_all_dim`` scales the softmax by ``m(mscale_all_dim)**2``; cos and sin are scaled by
    ``m(mscale) / m(mscale_all_dim)``, where ``m(a) = 0.1 * a * ln(factor) + 1``.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        check_types(self, finite=True)
        require_number(self, "factor")
        require(self.factor >= 1, f"YaRN factor must be at least 1, not {self.factor}.")
        require(self.original_length > 0, f"YaRN original_length must be positive, not {self.original_length}.")
        require(
            self.beta_fast >= self.beta_slow > 0,
            f"YaRN needs beta_fast >= beta_slow > 0, not {self.beta_fast} and {self.beta_slow}.",
        )


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's context extension (2407.21783; numbers as published configs spell them).

    Pairs that turn fewer than ``low_turns`` times in ``original_length`` tokens are slowed by ``factor``, those that
    turn more than ``high_turns`` times are kept, and between the two the frequencies are blended.
    """

    factor: float
    original_length: int
    low_turns: float = 1.0
    high_turns: float = 4.0

    def __post_init__(self):
        check_types(self, finite=True)
        require_number(self, "factor")
        require(self.factor >= 1, f"Llama3 factor must be at least 1, not {self.factor}.")
        require(self.original_length > 0, f"Llama3 original_length must be positive, not {self.original_length}.")
        require(
            self.high_turns > self.low_turns > 0,
            f"Llama3 needs high_turns > low_turns > 0, not {self.high_turns} and {self.low_turns}.",
        )


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; ``interleaved`` means that pair i is dimensions 2i and 2i + 1, else i and i + half.

    ``yarn``, ``llama3``: what extends it to longer contexts, one of them at most.
    """

    theta: float = 10000.0
    yarn: Yarn | None = None
    interleaved: bool = True
    llama3: Llama3 | None = None

    def __post_init__(self):
        check_types(self, finite=True)
        require_number(self, "theta")
        require(self.theta > 1, f"RoPE theta must exceed 1, not {self.theta}.")
        require(self.yarn is None or self.llama3 is None, "RoPE is extended by yarn or by llama3, not by both.")


@dataclass(frozen=True)
class Indexer:
    """V3.2's lightning indexer (2512.02556 §2.1): ``index_heads`` heads of ``index_dim`` score every earlier token, and
    a query attends to the ``index_top_k`` best only."""

    index_heads: int
    index_dim: int
    index_top_k: int

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("index_heads", "index_dim", "index_top_k"):
            require(getattr(self, name) > 0, f"Indexer {name} must be positive, not {getattr(self, name)}.")


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (V2 §2.1). ``q_rank=None``: queries are not compressed (Moonlight). ``indexer``:
    what chooses the keys that a query sees; None: it sees all earlier ones."""

    n_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    rope: Rope = Rope()
    indexer: Indexer | None = None

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("n_heads", "kv_rank", "nope_dim", "rope_dim", "v_dim"):
            require(getattr(self, name) > 0, f"MLA {name} must be positive, not {getattr(self, name)}.")
        require(self.q_rank is None or self.q_rank > 0, f"MLA q_rank must be positive or None, not {self.q_rank}.")
        require(self.rope_dim % 2 == 0, f"MLA rope_dim must be even, not {self.rope_dim}.")
        if self.indexer is not None:
            require(self.q_rank is not None, "an indexer reads compressed queries, but MLA q_rank is None.")
            require(
                self.indexer.index_dim >= self.rope_dim,
                f"Indexer index_dim={self.indexer.index_dim} is smaller than the rope_dim={self.rope_dim} that is "
                "rotated of it.",
            )

    @property
    def cache_width(self) -> int:
        """A latent and a rotated key, shared by all heads; and the indexer's key."""
        return self.kv_rank + self.rope_dim + (self.indexer.index_dim if self.indexer else 0)


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (2305.13245): ``n_heads`` query heads share ``n_kv_heads`` key heads in equal groups.

    As many of both is multi-head attention. ``bias``: queries, keys and values have one (Qwen2).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    bias: bool = False
    rope: Rope = Rope(interleaved=False)

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("n_heads", "n_kv_heads", "head_dim"):
            require(getattr(self, name) > 0, f"GQA {name} must be positive, not {getattr(self, name)}.")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads={self.n_heads} does not divide into n_kv_heads={self.n_kv_heads} groups.",
        )
        require(self.head_dim % 2 == 0, f"GQA head_dim must be even, not {self.head_dim}.")

    @property
    def rope_dim(self) -> int:
        """Heads are rotated whole."""
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Keys and values of all key heads."""
        return 2 * self.n_kv_heads * self.head_dim
