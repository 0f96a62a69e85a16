"""What a model is: frozen, hashable dataclasses without arrays.

An ablation is one ``dataclasses.replace``. Every value is checked when the dataclass is made, so that a
config that exists is one that can be built.
"""

from dataclasses import dataclass, replace

from deepseek_jax.configs.attention import GQA, MLA, Compressed, Indexer, Llama3, Rope, Yarn
from deepseek_jax.configs.checks import ConfigError, check_types, require, require_number
from deepseek_jax.configs.layers import Dense, HyperConnections, Layer, MoE, Stack, segmented
from deepseek_jax.configs.numbers import LARGEST

__all__ = [
    "GQA",
    "MLA",
    "Compressed",
    "ConfigError",
    "HyperConnections",
    "Indexer",
    "Llama3",
    "MoE",
    "ModelConfig",
    "Rope",
    "Yarn",
]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the DeepSeek family. Sizes are numbers of elements; lengths are tokens.

    ``mtp_depth``: multi-token-prediction modules after the last layer. ``init_std``: standard deviation of
    freshly initialised matrices (the V3 paper's 0.006, not transformers' 0.02). ``residual``: what layers read from and
    write to; None: one stream.
    """

    name: str
    vocab_size: int
    dim: int
    n_layers: int
    n_dense_layers: int
    ffn_dim: int
    attention: MLA | GQA | Compressed
    moe: MoE | None
    mtp_depth: int = 0
    norm_eps: float = 1e-6
    max_length: int = 4096
    tie_embeddings: bool = False
    init_std: float = 0.006
    model_type: str = "deepseek_v3"
    bos_id: int | None = 0
    eos_ids: tuple[int, ...] = (1,)
    residual: HyperConnections | None = None

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("vocab_size", "dim", "n_layers", "ffn_dim", "max_length"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}.")
        require(self.mtp_depth >= 0, f"mtp_depth must not be negative, as {self.mtp_depth} is.")
        require(
            0 <= self.n_dense_layers <= self.n_layers,
            f"n_dense_layers={self.n_dense_layers} does not lie within n_layers={self.n_layers}.",
        )
        require(
            self.moe is not None or self.n_dense_layers == self.n_layers,
            f"{self.n_layers - self.n_dense_layers} layers are neither dense nor have a MoE config.",
        )
        if isinstance(self.attention, Compressed):
            require(
                len(self.attention.ratios) == self.n_layers,
                f"Compressed ratios name {len(self.attention.ratios)} layers, but n_layers is {self.n_layers}.",
            )
        require(
            self.moe is None or self.moe.n_hash <= self.n_moe_layers,
            f"n_hash={self.moe and self.moe.n_hash} exceeds the {self.n_moe_layers} layers with experts.",
        )
        require_number(self, "norm_eps", "init_std", low=-LARGEST)
        require(self.norm_eps > 0, f"norm_eps must be positive, not {self.norm_eps}.")
        require(self.init_std > 0, f"init_std must be positive, not {self.init_std}.")
        for name, ids in (
            ("bos_id", () if self.bos_id is None else (self.bos_id,)),
            ("eos_ids", self.eos_ids),
        ):
            for i in ids:
                require(0 <= i < self.vocab_size, f"{name} {i} lies outside vocab_size={self.vocab_size}.")

    def layer(self, number: int) -> Layer:
        """What a layer is made of; all else that concerns layers follows from this."""
        first = self.n_dense_layers
        return Layer(self.attention.at(number), Dense(self.ffn_dim) if number < first else self.moe.at(number - first))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer of the main model."""
        return tuple(self.layer(number) for number in range(self.n_layers))

    @property
    def segments(self) -> tuple[tuple[Stack, ...], ...]:
        """The layers as they are scanned."""
        return segmented(self.layers)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers as they are kept: the stacks of all segments, which are a model's ``stacks``."""
        return tuple(stack for segment in self.segments for stack in segment)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts, in the order in which their statistics stand."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.is_moe)

    @property
    def stream_shape(self) -> tuple[int, ...]:
        """What layers hand on of a token: (dim,), of several streams (n_streams, dim)."""
        return (self.dim,) if self.residual is None else (self.residual.n_streams, self.dim)

    @property
    def n_moe_layers(self) -> int:
        return self.n_layers - self.n_dense_layers

    @property
    def mtp_layer(self) -> Layer:
        """What an MTP module holds: a layer of the kind that ends the model; of V4 one of recent tokens."""
        ffn = self.layer(self.n_layers - 1).ffn
        return Layer(self.attention.at(self.n_layers), self.moe.at(self.n_layers) if isinstance(ffn, MoE) else ffn)

    def first_layers(self, n_layers: int) -> "ModelConfig":
        """The config of the first layers between the embedding and the head, without MTP modules."""
        dense, attention, moe = min(self.n_dense_layers, n_layers), self.attention, self.moe
        if isinstance(attention, Compressed):
            attention = replace(attention, ratios=attention.ratios[:n_layers])
        if moe is not None:
            moe = replace(moe, n_hash=min(moe.n_hash, n_layers - dense))
        return replace(self, n_layers=n_layers, n_dense_layers=dense, mtp_depth=0, attention=attention, moe=moe)
