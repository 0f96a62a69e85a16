"""Starts the process that compiles, waits for what is wanted of it, and leaves nothing behind."""

import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_jax.aot.child import DUMP, LOG, RESULT, Job, compile_in
from deepseek_jax.aot.topology import check_compiler

# Written after the last of the files that are read. Generating code follows, which takes most of the time.
SCHEDULED = "after_optimizations_after_buffer_assignment.txt"
POLL = 0.25


class CompileError(ValueError):
    """The program could not be built or compiled."""


@dataclass(frozen=True)
class Built:
    """A compiled program, or with ``quick`` one that is scheduled and has its memory assigned.

    ``dump``: the compiler's files. ``coordinates``: of the mesh's devices on the torus, in the mesh's order. ``sizes``:
    of the mesh's axes. ``lower_seconds``, ``compile_seconds``: of this machine. ``out_of_memory``: the compiler's
    sentence when the program does not fit. ``memory``, ``cost``: what the compiler says of the finished program, None
    with ``quick``.
    """

    dump: Path
    coordinates: tuple[tuple[int, ...], ...]
    sizes: dict[str, int]
    lower_seconds: float
    compile_seconds: float
    out_of_memory: str | None
    memory: dict[str, int] | None
    cost: dict[str, float] | None


@contextmanager
def built(job: Job, quick: bool, say: Callable[[str], Any] = lambda text: None) -> Iterator[Built]:
    """Compiles in a process of its own; the dump is there within the ``with``. ``say`` is told of progress.

    Raises TopologyError without libtpu, CompileError where lowering or compiling fails for another reason than memory.
    """
    check_compiler()
    with tempfile.TemporaryDirectory(prefix="deepseek_jax_compile_", ignore_cleanup_errors=True) as folder:
        process = multiprocessing.get_context("spawn").Process(target=compile_in, args=(folder, job), daemon=True)
        process.start()
        try:
            yield _wait(process, Path(folder), quick, say)
        finally:
            _kill(process)


def _kill(process) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def _wait(process, folder: Path, quick: bool, say) -> Built:
    began, lowered = time.monotonic(), None
    while True:
        alive = process.is_alive()
        result = _result(folder)
        if lowered is None and "lower_seconds" in result:
            lowered = time.monotonic()
            say(f"lowered in {result['lower_seconds']:.0f} s")
        scheduled = any((folder / DUMP).glob(f"*.{SCHEDULED}"))
        if "error" in result:
            break
        if "memory" in result or (quick and scheduled and lowered is not None):
            break
        if not alive:
            raise CompileError(f"the compiler ended by itself ({process.exitcode}): {_last_line(folder / LOG)}")
        time.sleep(POLL)
    if quick:
        _kill(process)
    error = result.get("error")
    if error is not None and "CompileTimeHbmOom" not in error:
        raise CompileError(_first_line(error))
    return Built(
        dump=folder / DUMP,
        coordinates=tuple(map(tuple, result["coordinates"])),
        sizes=result["sizes"],
        lower_seconds=result["lower_seconds"],
        compile_seconds=result.get("compile_seconds", time.monotonic() - (lowered or began)),
        out_of_memory=error and _first_line(error),
        memory=result.get("memory"),
        cost=result.get("cost"),
    )


def _result(folder: Path) -> dict:
    try:
        return json.loads((folder / RESULT).read_text())
    except FileNotFoundError:
        return {}


def _first_line(error: str) -> str:
    return re.sub(r"^(\w+: )+", "", error.strip().splitlines()[0]) if error.strip() else "no reason was given."


def _last_line(log: Path) -> str:
    if not log.exists():
        return "it wrote nothing."
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing."
