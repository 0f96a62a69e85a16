"""What the host counts of a run, and how it is told: `Progress`, `Journal`, `phase`. Loads no JAX."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from deepseek_jax.runs.metrics import Reporter


@dataclass
class Progress:
    """What the host counts of a run; saved with every checkpoint, plain values for JSON.

    ``evaluation``: the last measurement. ``minutes``: at the last checkpoint. ``crossed_at``: minutes at the first
    measurement at which the model was better than the trigram.
    """

    step: int = 0
    tokens: int = 0
    minutes: float = 0.0
    skipped_in_a_row: int = 0
    skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    data_state: dict[str, Any] | None = None
    crossed_at: float | None = None


def progress_damage(extra: Any, step: int) -> str | None:
    """What is missing or of the wrong kind in the record of a `Progress` saved at ``step``; None where nothing is."""
    if not isinstance(extra, dict):
        return f"its counters are {extra!r}"
    kinds = {
        **dict.fromkeys(("step", "tokens", "skipped_in_a_row", "skipped"), (int,)),
        "minutes": (int, float),
        "recent_losses": (list,),
        "evaluation": (dict, type(None)),
        "data_state": (dict,),
        "crossed_at": (int, float, type(None)),
    }
    known = [f.name for f in fields(Progress)]
    for name in sorted({*extra, *known}):
        if name not in extra or name not in known:
            return f"its counters {'lack' if name in known else 'have an unknown'} {name}"
        if not isinstance(extra[name], kinds[name]) or isinstance(extra[name], bool):
            return f"its counter {name} is {extra[name]!r}"
    if not all(isinstance(loss, float) for loss in extra["recent_losses"]):
        return "its recent_losses are not all numbers"
    evaluation = extra["evaluation"]
    if evaluation is not None and not isinstance(evaluation.get("step"), int):
        return f"its evaluation's step is {evaluation.get('step')!r}"
    return None if extra["step"] == step else f"its counters are of step {extra['step']}"


@contextmanager
def phase(reporter: Reporter, what: str) -> Iterator[None]:
    """Tells a view that something other than steps takes time; no file gets it."""
    reporter.record({"kind": "phase", "phase": what})
    yield
    reporter.record({"kind": "phase", "phase": None})


class Journal:
    """Reports with the minutes that a run has taken in all its processes together."""

    def __init__(self, reporter: Reporter, began: float):
        self.reporter, self.began = reporter, began

    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def record(self, kind: str, **values) -> None:
        self.reporter.record({"kind": kind, "minutes": round(self.minutes(), 3), **values})

    def event(self, event: str, message: str, progress: Progress) -> None:
        self.record("event", step=progress.step, tokens=progress.tokens, event=event, message=message)

    def say(self, line: str) -> None:
        self.reporter.say(line)
