"""Ctrl-C and SIGTERM end a command at once, wherever it is, with one line and the shell's exit code.

Python's own way is an exception in the main thread, once that comes back from native code: a compilation of minutes is
waited for, callbacks and destructors swallow the exception, and the interpreter that is then taken down crashes on what
XLA had under way. Here signals wake a thread instead (`signal.set_wakeup_fd`), which runs while the main one compiles.
Unless something holds the signal (`runs.signals.StopSignals`), it undoes what is half made and ends the process
without taking it down.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from deepseek_jax.runs import signals

# Signal -> what happened, and the exit code.
ENDS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
# `StopSignals.asked` -> exit code.
EXIT_CODES = {None: 0} | {number.name: code for number, (_, code) in ENDS.items()}
ASK = b"\0"  # no signal's number
SHOW_CURSOR = "\x1b[?25h"  # a live view hides it

_held_line = ""
_remark: Callable[[], str] = str


def remarks(held: str = "", ended: Callable[[], str] = str) -> None:
    """What a command adds: ``held``, the line that is said when a signal is noted to be followed later; ``ended``: a
    sentence after "interrupted.", such as how to go on."""
    global _held_line, _remark
    _held_line, _remark = held, ended


class Interrupts:
    """Within it the process's signals are taken; only in the main thread of a process that is the command's own."""

    def __init__(self, command: str):
        """``command``: "deepseek-jax NAME", for the line."""
        self._command = command

    def __enter__(self) -> None:
        self._woken, wake = os.pipe()
        self._answered, self._answer = os.pipe()
        os.set_blocking(wake, False)
        self._wake = wake
        remarks()
        signals.watch(True)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in ENDS:
            signal.signal(number, self._stand_still)

    def __exit__(self, *error) -> None:
        # The work is done. What is left is the interpreter's end, in which no thread of Python's runs any more; only
        # where it waits for other processes may it be cut short.
        jax = sys.modules.get("jax")
        waits = jax is not None and jax.distributed.is_initialized()
        for number in ENDS:
            signal.signal(number, signal.SIG_DFL if waits else signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        signals.watch(False)

    def _stand_still(self, number: int, frame) -> None:
        """The main thread: waits until all signals so far are dealt with, so that it changes nothing that is being
        undone. The bytes come in order, hence the answer comes after them or never."""
        os.write(self._wake, ASK)
        os.read(self._answered, 1)

    def _watch(self) -> None:
        while True:
            (number,) = os.read(self._woken, 1)
            if number == ASK[0]:
                os.write(self._answer, ASK)
            elif number in ENDS and not signals.held(number):
                self._end(number)
            elif number in ENDS and _held_line:
                _say(f"{self._command}: {_held_line}")

    def _end(self, number: int) -> None:
        what, code = ENDS[signal.Signals(number)]
        line = f"{self._command}: {what}."
        try:
            for undo in reversed(signals.undone):
                undo()
            line = f"{line} {_remark()}".rstrip()
        except OSError as error:
            line = f"{line} {error}"
        finally:
            _say(line, SHOW_CURSOR)
            os._exit(code)


def _say(line: str, restore: str = "") -> None:
    """Past Python's buffers, whose locks may be held by a thread that stands still."""
    # A terminal has written ^C where the cursor was.
    start = f"\n{restore}" if os.isatty(2) else ""
    with suppress(OSError):  # nobody reads it any more
        os.write(2, f"{start}{line}\n".encode(errors="replace"))
