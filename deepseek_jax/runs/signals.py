"""Ctrl-C and SIGTERM end a run between two steps, in all its processes between the same two."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

CAUGHT = (signal.SIGINT, signal.SIGTERM)
# What processes tell one another; the largest counts.
CODES = {None: 0, "SIGINT": 1, "SIGTERM": 2}
NAMES = {code: name for name, code in CODES.items()}


class Agreement(Protocol):
    """`parallel.processes.Agreement`."""

    def exchange(self, number: int) -> int: ...


class StopSignals:
    """From `hold` on, until its block ends, Ctrl-C or SIGTERM is noted in ``asked``, so that no step is torn.

    ``asked``: None, "SIGINT" or "SIGTERM", the first of them. Before `hold` there is nothing to keep, and a signal does
    what it did outside. A second Ctrl-C is raised as KeyboardInterrupt, and ends a command at once. Outside the main
    thread, where Python delivers no signals, nothing is noted. ``agreement``: of several processes, which must all
    call `agreed` and `settled` as often.
    """

    def __init__(self, agreement: Agreement | None = None):
        self._agreement, self._decided = agreement, None

    def agreed(self) -> str | None:
        """What is asked for in any process: alone at once, among several as it was at their call before, so that
        nobody waits for it."""
        if self._agreement is None:
            return self.asked
        if self._decided is None:
            self._decided = NAMES[self._agreement.exchange(CODES[self.asked])]
        return self._decided

    def settled(self) -> str | None:
        """What is asked for in any process up to now; among several it waits for all."""
        for _ in range(1 if self._agreement is None else 2):
            found = self.agreed()
        return found

    def __enter__(self) -> "StopSignals":
        self.asked: str | None = None
        self._pressed, self._held, self._before = False, False, {}
        return self

    def hold(self) -> None:
        """From now on there is something to keep; may be called again and again."""
        if self._held:
            return
        self._held = True
        if _watched:
            _holding.append(self)
        elif threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in CAUGHT}

    def take(self, number: int) -> bool:
        """Notes a signal; False for a second Ctrl-C."""
        if number == signal.SIGINT and self._pressed:
            return False
        self._pressed = self._pressed or number == signal.SIGINT
        self.asked = self.asked or signal.Signals(number).name
        return True

    def _note(self, number: int, frame) -> None:
        if not self.take(number):
            signal.default_int_handler(number, frame)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self in _holding:
            _holding.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)


# A program that takes the signals itself (`cli.interrupts`) asks `held` where each belongs, and before it ends the
# process does what `undone` has.
_watched = False
_holding: list[StopSignals] = []
undone: list[Callable[[], None]] = []


def watch(on: bool) -> None:
    """Whether somebody else receives the process's signals and asks `held`."""
    global _watched
    _watched = on


def held(number: int) -> bool:
    """Notes a signal where a `StopSignals` holds it; False where none does, or no longer."""
    return bool(_holding) and _holding[-1].take(number)


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Calls ``undo`` after an error in the block, and before a signal ends the process in it."""
    undone.append(undo)
    try:
        yield
    except BaseException:
        undo()
        raise
    finally:
        undone.remove(undo)
