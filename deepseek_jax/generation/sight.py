"""Pictures in prompts: what a model's eyes make of them stands in the places of their tokens, chunk by chunk.

Suffixes: P tokens of pictures, T tokens of a chunk, D width.
"""

import numpy as np

from deepseek_jax.generation.choices import Choice, Slot
from deepseek_jax.generation.request import Sight


class Eyes:
    """``sight``: None for a model that is shown none; its programs take no embeddings. ``chunk``: the batcher's."""

    def __init__(self, sight: Sight | None, chunk: int, dim: int):
        self._sight, self._shape = sight, (1, chunk, dim)
        if sight is not None:  # compiled before anybody asks
            sight(np.zeros(sight.shape, np.float32))

    def see(self, choice: Choice) -> np.ndarray | None:
        """float32 [P, D] of a choice's pictures, one after the other; None where it has none."""
        pictures = choice.given.pictures
        return np.concatenate([np.asarray(self._sight(p), np.float32) for p in pictures]) if pictures else None

    def of_chunk(self, slot: Slot) -> tuple[np.ndarray, np.ndarray] | None:
        """Embeddings [1, T, D] of the tokens that a slot is fed next, and which are a picture's, bool [1, T]."""
        if self._sight is None:
            return None
        given, shown = np.zeros(self._shape, np.float32), np.zeros(self._shape[:2], bool)
        if slot.seen is not None:
            at_P = np.flatnonzero(np.asarray(slot.tokens) == self._sight.image_id) - slot.fed
            here_P = (at_P >= 0) & (at_P < self._shape[1])
            given[0, at_P[here_P]], shown[0, at_P[here_P]] = slot.seen[here_P], True
        return given, shown
