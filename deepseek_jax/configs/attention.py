"""Forms of attention: frozen, hashable dataclasses, checked when they are made.

A model's says by ``at`` what that of its layer of a number is: for all but V4's the same. Each says how wide what it
rotates is (``rope_dim``); all else follows from the class.
"""

from dataclasses import dataclass, replace

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
    """The lightning indexer (V3.2, 2512.02556 §2.1; V4): ``index_heads`` heads of ``index_dim`` score every earlier
    token, in V4 every earlier entry, and a query attends to the ``index_top_k`` best only."""

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
    def indexed(self) -> bool:
        """Whether an indexer chooses keys."""
        return self.indexer is not None

    def at(self, number: int) -> "MLA":
        return self

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
    def indexed(self) -> bool:
        """Whether an indexer chooses keys."""
        return False

    def at(self, number: int) -> "GQA":
        return self

    @property
    def rope_dim(self) -> int:
        """Heads are rotated whole."""
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Keys and values of all key heads."""
        return 2 * self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class Compressed:
    """V4's attention (2606.19348 §2.3): recent tokens as they are, earlier ones as compressed entries.

    ``n_heads`` query heads, from ``q_rank`` latents, share one key of ``head_dim``, which is the value as well; of it
    and of queries the last ``rope_dim`` dimensions are rotated, and rotated back in the output, which leaves by
    ``o_groups`` groups of heads through ``o_rank`` dimensions each. ``window``: how many tokens a query sees as they
    are, its own included.

    ``ratios``: for each layer, of how many tokens it makes an entry, 0 for none (MTP modules have none). Entries of
    ``sparse_ratio`` tokens have overlapping windows, and ``indexer`` chooses which of them a query sees (CSA); a query
    sees all entries of another ratio (HCA). ``rope``: of layers without entries; ``entry_rope``: of those with.

    What a layer has (``at``) is one of these with a single ratio and with its own ``rope``.
    """

    n_heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    o_groups: int
    o_rank: int
    window: int
    ratios: tuple[int, ...]
    indexer: Indexer
    sparse_ratio: int = 4
    rope: Rope = Rope()
    entry_rope: Rope = Rope(160000.0)

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("n_heads", "head_dim", "rope_dim", "q_rank", "o_groups", "o_rank", "window", "sparse_ratio"):
            require(getattr(self, name) > 0, f"Compressed {name} must be positive, not {getattr(self, name)}.")
        require(bool(self.ratios), "Compressed ratios must name a ratio for each layer, but there are none.")
        for ratio in self.ratios:
            require(ratio >= 0, f"Compressed ratios must not be negative, as {ratio} is.")
        require(self.rope_dim % 2 == 0, f"Compressed rope_dim must be even, not {self.rope_dim}.")
        require(
            self.rope_dim <= min(self.head_dim, self.indexer.index_dim),
            f"Compressed rope_dim={self.rope_dim} exceeds the head_dim={self.head_dim} or "
            f"index_dim={self.indexer.index_dim} of which it is a part.",
        )
        require(
            self.n_heads % self.o_groups == 0,
            f"n_heads={self.n_heads} does not divide into o_groups={self.o_groups} groups.",
        )

    def at(self, number: int) -> "Compressed":
        ratio = self.ratios[number] if number < len(self.ratios) else 0
        return replace(self, ratios=(ratio,), rope=self.entry_rope if ratio else self.rope)

    @property
    def indexed(self) -> bool:
        """Whether an indexer chooses entries, in any layer."""
        return self.sparse_ratio in self.ratios

    @property
    def ratio(self) -> int:
        """Of a layer's."""
        (ratio,) = self.ratios
        return ratio

    @property
    def sparse(self) -> bool:
        """Whether, in a layer's, windows overlap and an indexer chooses entries."""
        return self.ratio == self.sparse_ratio
