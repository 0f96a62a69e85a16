"""Ctrl-C and SIGTERM end a run between two steps, in all its processes between the same two."""

import signal
import threading
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
    """Within it the first Ctrl-C or SIGTERM is noted in ``asked``, so that no step is torn.

    ``asked``: None, "SIGINT" or "SIGTERM". A second Ctrl-C is raised as KeyboardInterrupt at once. Outside the main
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
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def _note(self, number: int, frame) -> None:
        self.asked = self.asked or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
