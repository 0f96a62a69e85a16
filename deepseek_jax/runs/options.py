"""How a run is kept, shown and exported; nothing here changes what is trained. Loads no JAX."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """Checkpoints, export and reporters of a run. A resumed run may have others than it began with."""

    save_every: int | None = None
    """Steps between checkpoints; by default one at every measurement on the held-out text."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 1
    """How many of those with the fewest held-out bits per byte stay beside them."""
    export: Literal["weights", "ema"] = "weights"
    """What is exported at the end, and measured for the best checkpoint: the weights, or their moving average (a
    recipe with ema_decay above 0). V3 keeps the average to see early how good the decayed weights will be."""
    export_dtype: Literal["source", "float32", "bfloat16", "fp8"] = "source"
    """Of what is exported. source: as the checkpoint it began from has each tensor, or, begun from nothing, the dtype
    that the run computes in. fp8: the linear maps in FP8 blocks. Router biases keep their dtype."""
    tensorboard: bool = False
    """Also write TensorBoard events, into the run's folder tensorboard (pip install 'deepseek-jax[tensorboard]')."""

    def __post_init__(self):
        for name, low in (("save_every", 1), ("keep_last", 1), ("keep_best", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, not {value}.")
        if self.export not in ("weights", "ema"):
            raise ValueError(f"export must be weights or ema, not {self.export!r}.")
        if self.export_dtype not in ("source", "float32", "bfloat16", "fp8"):
            raise ValueError(f"export_dtype must be source, float32, bfloat16 or fp8, not {self.export_dtype!r}.")
