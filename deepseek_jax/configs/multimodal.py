"""What a Janus is: a language model, an encoder for pictures it is shown, a code for those it draws (2501.17811 §2).

Frozen, hashable dataclasses, checked when they are made, like `configs.schema.ModelConfig`, which the language model's
config is.
"""

from dataclasses import dataclass

from deepseek_jax.configs.checks import check_types, require, require_number
from deepseek_jax.configs.schema import ModelConfig

TRADITIONS = ("multi_modality", "janus")
# Of channels in every group norm of a VQ.
GROUPS = 32


@dataclass(frozen=True)
class Vision:
    """SigLIP's tower (2303.15343): a pre-norm ViT over patches, every one of which is a token. Sizes in pixels and
    elements; by default ViT-L/16 at 384, which all of Janus-Pro has."""

    image_size: int = 384
    patch: int = 16
    dim: int = 1024
    n_layers: int = 24
    n_heads: int = 16
    ffn_dim: int = 4096
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("image_size", "patch", "dim", "n_layers", "n_heads", "ffn_dim"):
            require(getattr(self, name) > 0, f"Vision {name} must be positive, not {getattr(self, name)}.")
        require_number(self, "norm_eps")
        require(
            self.image_size % self.patch == 0,
            f"Vision image_size={self.image_size} does not divide into patches of {self.patch} pixels.",
        )
        require(
            self.dim % self.n_heads == 0, f"Vision dim={self.dim} does not divide into n_heads={self.n_heads} heads."
        )

    @property
    def n_tokens(self) -> int:
        """Of a picture."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class VQ:
    """LlamaGen's VQ tokenizer (2406.06525 §2.1): a picture as codes, of ``n_codes`` unit vectors of ``code_dim``.

    ``channels`` times ``multipliers``: the convolutions' width at each resolution, finest first; between two of them
    the resolution halves. ``n_blocks``: residual blocks of the encoder at each; the decoder has one more. ``z_dim``:
    channels before they are quantised.
    """

    n_codes: int = 16384
    code_dim: int = 8
    z_dim: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    n_blocks: int = 2

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("n_codes", "code_dim", "z_dim", "channels", "n_blocks"):
            require(getattr(self, name) > 0, f"VQ {name} must be positive, not {getattr(self, name)}.")
        require(
            bool(self.multipliers) and min(self.multipliers) > 0,
            f"VQ multipliers must be positive numbers, one a resolution, not {self.multipliers}.",
        )
        require(
            self.channels % GROUPS == 0,
            f"VQ channels={self.channels} do not divide into the {GROUPS} groups of a group norm.",
        )

    @property
    def factor(self) -> int:
        """Pixels of a side that one code stands for."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class JanusConfig:
    """A Janus. ``language``: a decoder of the family, dense in all of Janus-Pro.

    ``head_dim``: inner width of the head that predicts codes. ``depth``: linear maps of each aligner. ``image_id``: the
    token in whose place a shown picture's features stand, `Vision.n_tokens` of them. ``model_type``: the tradition of
    its files, DeepSeek's "multi_modality" or transformers' "janus".
    """

    name: str
    language: ModelConfig
    vision: Vision = Vision()
    vq: VQ = VQ()
    head_dim: int = 2048
    depth: int = 2
    image_id: int = 100581
    model_type: str = "multi_modality"

    def __post_init__(self):
        check_types(self, finite=True)
        for name in ("head_dim", "depth"):
            require(getattr(self, name) > 0, f"JanusConfig {name} must be positive, not {getattr(self, name)}.")
        require(
            0 <= self.image_id < self.language.vocab_size,
            f"image_id {self.image_id} lies outside vocab_size={self.language.vocab_size}.",
        )
        require(
            self.vision.image_size % self.vq.factor == 0,
            f"pictures of image_size={self.vision.image_size} do not divide into codes of {self.vq.factor} pixels.",
        )
        require(self.language.mtp_depth == 0, "a Janus's language model has no MTP modules: give it mtp_depth=0.")
        require(
            not self.language.tie_embeddings, "a Janus's language model has a head of its own: tie_embeddings=False."
        )
        require(
            self.model_type in TRADITIONS,
            f"JanusConfig model_type must be one of {', '.join(TRADITIONS)}, not {self.model_type!r}.",
        )

    @property
    def grid(self) -> int:
        """Codes of a drawn picture's side."""
        return self.vision.image_size // self.vq.factor

    @property
    def n_codes(self) -> int:
        """Codes of a drawn picture: as many tokens are generated."""
        return self.grid**2
