"""Whether two LaTeX answers are equal, by math-verify in a process of its own.

math-verify's time limits are signals, which work in a process's main thread only: elsewhere every answer silently
counts as wrong, or one hangs. Here the process is the limit: one that takes too long is ended, and another started.
"""

import importlib.util
import multiprocessing
from types import TracebackType

MISSING = "LaTeX answers are compared by math-verify, which is not installed: pip install 'deepseek-jax[math]'."
SECONDS = 5.0
STARTING = 60.0


class Judge:
    """Compares LaTeX answers. A context manager: its process ends with it.

    ``seconds``: that one comparison may take.

    Raises ValueError where math-verify is not installed.
    """

    def __init__(self, seconds: float = SECONDS):
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(MISSING)
        if not seconds > 0:
            raise ValueError(f"seconds={seconds!r}: must be positive.")
        self._seconds, self._process, self._pipe = seconds, None, None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def check_gold(self, gold: str) -> None:
        """Raises ValueError for a reference answer that is not understood: it would make every answer wrong."""
        if not self._ask(("parse", gold)):
            raise ValueError(f"the reference answer {gold!r} is not understood as LaTeX.")

    def reward(self, answer: str | None, gold: str) -> float:
        """1 where they are equal, 0 where they are not or there is no answer, NaN where the comparison took too long
        or failed. ``gold``: one that `check_gold` takes."""
        if answer is None:
            return 0.0
        equal = self._ask(("equal", gold, answer))
        return float("nan") if equal is None else float(equal)

    def _ask(self, question: tuple[str, ...]) -> bool | None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            if not self._pipe.poll(STARTING) or self._pipe.recv() != "ready":
                self._end()
                raise RuntimeError(f"math-verify's process did not start within {STARTING:g} s.")
        try:
            self._pipe.send(question)
            if self._pipe.poll(self._seconds):
                return self._pipe.recv()
        except (EOFError, OSError):  # the process died, of memory for one
            pass
        self._end()
        return None

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None


def _serve(pipe) -> None:
    import logging

    from math_verify import parse, verify

    # Of its own time limits, which are off (see above), it warns.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str):
        # As an answer is written in a text; nothing, not the text itself, where it is not understood.
        return parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None)

    pipe.send("ready")
    while True:
        try:
            what, *texts = pipe.recv()
        except EOFError:
            return
        try:
            found = [read(text) for text in texts]
            equal = what == "parse" or verify(*found, timeout_seconds=None, raise_on_error=True)
            answer = bool(found[0]) and bool(equal)
        except Exception:  # whatever it raises of a text: the comparison failed, and is told apart from "not equal"
            answer = None
        pipe.send(answer)
