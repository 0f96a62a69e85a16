"""Janus-Pro's three stages of training as recipes (2501.17811 §2.2, §3.1): what learns, from what, how fast.

Neither encoder of pictures is trained from nothing: SigLIP's tower and LlamaGen's VQ come as they are, and the VQ stays
so. Not stated, and a choice made here: that the table of codes' embeddings learns with the adaptor that reads it.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from deepseek_jax.train.recipe import LearningRate, Optimizer

ADAPTORS = ("aligner.*", "gen_embed", "gen_aligner.*", "gen_head.*")
# AdamW without weight decay; moments in float32, which is not stated.
ADAMW = Optimizer(weight_decay=0.0, moments="float32")


@dataclass(frozen=True)
class Stage:
    """``trained``: patterns (shell globs) of the dotted paths of what learns; all else is frozen. ``rate``: after its
    warm-up constant. ``mixture``: rows about pictures, of text alone, and of pictures to draw, in these shares of
    ``batch_rows``. ``stops``: the step at which the paper ended it, before ``steps``."""

    trained: tuple[str, ...]
    rate: LearningRate
    steps: int
    batch_rows: int
    mixture: tuple[int, int, int]
    stops: int | None = None
    optimizer: Optimizer = ADAMW

    def trains(self, path: str) -> bool:
        """Whether the parameter of a dotted path learns: what `core.partition.partition` asks."""
        return any(fnmatchcase(path, pattern) for pattern in self.trained)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of a batch of each kind; what does not divide goes to the last."""
        first, second = (self.batch_rows * share // sum(self.mixture) for share in self.mixture[:2])
        return first, second, self.batch_rows - first - second


def _constant(peak: float, warmup_steps: int) -> LearningRate:
    return LearningRate(peak, warmup_steps, decay_from=None, drops=())


STAGES = {
    # Adaptors and the image head, on ImageNet's categories: how pixels depend on one another.
    "janus-pro-1": Stage(ADAPTORS, _constant(1e-3, 600), 20_000, 256, (1, 0, 3)),
    # All but the encoders, on ordinary text-to-image data: ImageNet is no longer in it.
    "janus-pro-2": Stage((*ADAPTORS, "language.*"), _constant(1e-4, 5000), 360_000, 512, (2, 3, 5), stops=270_000),
    # The understanding encoder too. Steps of the 1B; the 7B has 40,000.
    "janus-pro-3": Stage((*ADAPTORS, "language.*", "vision.*"), _constant(4e-5, 0), 80_000, 128, (5, 1, 4)),
}
