"""What a run watches on the host: losses that jump, steps that are skipped. Loads no JAX.

The compiled step leaves everything as it was where a loss, a gradient or an update is not finite; here such steps are
counted, and their cause is named.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WINDOW, FEWEST, SIGMAS = 100, 20, 5.0


class TrainingStopped(ValueError):
    """A run that cannot usefully go on; the message names the last good checkpoint."""


class Spikes:
    """Notices a loss above the mean of the last `WINDOW` finite losses by more than `SIGMAS` of their deviations.

    Says nothing before `FEWEST` losses. A spike enters the window like any loss, so that a loss that stays high is
    reported a few times and then is the new level.
    """

    def __init__(self, recent: Iterable[float] = ()):
        self.recent = deque(recent, maxlen=WINDOW)

    def see(self, loss: float) -> str | None:
        """Takes a step's loss; returns what to log when it is a spike."""
        if not math.isfinite(loss):
            return None
        message = None
        if len(self.recent) >= FEWEST:
            mean, deviation = statistics.fmean(self.recent), statistics.pstdev(self.recent)
            if loss > mean + SIGMAS * deviation:
                message = (
                    f"loss {loss:.4f} is more than {SIGMAS:g} deviations of {deviation:.4f} above the mean of the last "
                    f"{len(self.recent)} steps, {mean:.4f}"
                )
        self.recent.append(loss)
        return message


@dataclass(frozen=True)
class Fault:
    """Why a step changed nothing: ``what`` is not finite, and what a run may do about it."""

    what: str
    advice: str


def fault(found: Mapping[str, Any], names: Callable[[], Mapping[str, list[str]]]) -> Fault:
    """The cause of a skipped step, from `train_step`'s metrics; ``names``: `norms.fault_names`."""
    loss, at = float(found["loss"]), found["fault"]
    if at["loss"]:
        return Fault(
            f"the loss is {loss:g}",
            "look at the text of these steps, or continue from it with a lower learning rate or a dtype of float32",
        )
    if at["gradient"] >= 0 or not math.isfinite(found["grad_norm"]):
        part = f"the gradient of {names()['gradient'][at['gradient']]}"
        where = part if at["gradient"] >= 0 else "the gradient's norm"
        return Fault(
            f"{where} is not finite, though the loss is {loss:g}",
            "continue from it with smaller weights of the loss's terms, a lower learning rate or a dtype of float32",
        )
    return Fault(
        f"the update of {names()['update'][at['update']]} is not finite, though the loss, {loss:g}, and its gradient "
        "are",
        "the text is not the cause: continue from it with a lower learning rate or weight decay, or AdamW's moments in "
        "float32",
    )


class Skips:
    """Counts steps that changed nothing because something in them was not finite."""

    def __init__(self, most: int, in_a_row: int = 0, total: int = 0):
        self.most, self.in_a_row, self.total = most, in_a_row, total

    def see(self, skipped: bool) -> bool:
        """Takes whether a step was skipped; returns whether it is one too many in a row."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        return self.in_a_row >= self.most
