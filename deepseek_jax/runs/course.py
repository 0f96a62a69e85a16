"""What a run takes its steps from, and how it is measured and exported: `Course`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deepseek_jax.runs.journal import Progress
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.step import State

Measure = Callable[[State, Progress], dict[str, Any]]
Step = Callable[[State, dict[str, np.ndarray], Knobs], tuple[State, dict[str, Any]]]


class Batches(Iterator[dict[str, np.ndarray]], Protocol):
    """Micro-batches without end, of this process's rows; `data.batches.Batches` says what these are to do."""

    def get_state(self) -> dict: ...

    def set_state(self, state: dict) -> None: ...

    def damage(self, state) -> str | None: ...

    def passes(self, rows: int) -> dict[str, float]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Course:
    """``batches``: what steps take; "tokens" are among the entries. ``measure``: the figures of an evaluation.
    ``figure``: the name of the one by which the best checkpoints stay, the lower the better; that of the moving average
    has "ema_" before it. ``export``: writes a state's model, and returns its bits per byte as stored, None where they
    are not measured. ``begin``: the state before the first step of a model and the step, which is given batches as they
    come."""

    batches: Batches
    measure: Measure
    figure: str
    export: Callable[[State], float | None]
    begin: Callable[[Any], tuple[State, Step]]


class Source(Protocol):
    """What a run is given to learn from."""

    def open(self, run: RunFolder, recipe: Recipe, options: Options, ctx) -> Course:
        """``run``: the folder, whose run.json is told what there is. ``ctx``: what measurements run in."""
        ...
