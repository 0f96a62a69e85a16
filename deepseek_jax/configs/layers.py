"""What a model's layers are, one by one, and which of them are kept and scanned together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# V4's two kinds of attention alternate; no release repeats a longer pattern.
LONGEST_PATTERN = 2


@dataclass(frozen=True)
class Dense:
    """A SwiGLU network of inner width ``dim``."""

    dim: int


@dataclass(frozen=True)
class Layer:
    """One layer. ``attention``: a config of `configs.schema`. ``ffn``: a `Dense` or a `schema.MoE`."""

    attention: Any
    ffn: Any

    @property
    def is_moe(self) -> bool:
        return not isinstance(self.ffn, Dense)


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
