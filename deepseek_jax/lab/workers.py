"""Runs in processes of their own, each held to one thread of one core, side by side. Loads no JAX.

Two such processes use two cores whole; one process with two threads does not, for much of a small model's step runs on
one. A process is told apart from its parent by nothing but its environment: ``NPROC`` is what XLA sizes its pool of
threads by, and where the system can pin a process it is pinned.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from deepseek_jax.lab.study import Setup
from deepseek_jax.runs.run_folder import unfinished
from deepseek_jax.runs.signals import undoing

# One thread; and freed memory stays the process's: a step's buffers would cost page faults every time, a sixth of it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "1",
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
OFTEN = 0.5  # seconds between two reports of a run


@dataclass(frozen=True)
class Task:
    """A run to be made. ``path``: its file. ``about``: what its record says beside what was trained. ``label``: what
    people read."""

    setup: Setup
    seed: int
    path: Path
    label: str
    about: Mapping = field(default_factory=dict)


class RunFailed(ValueError):
    """A run's process ended without its record."""


class View:
    """Is told what happens; by default it shows nothing."""

    def begun(self, task: Task) -> None:
        pass

    def step(self, task: Task, number: int, steps: int) -> None:
        pass

    def ended(self, task: Task) -> None:
        pass


def carry_out_all(
    tasks: Sequence[Task],
    home: Path,
    *,
    processes: int,
    pinned: bool = True,
    cache: str | None = None,
    view: View | None = None,
) -> None:
    """Makes every run, ``processes`` at a time, and returns when all their files are there.

    ``home``: where the corpora lie, which are there already. ``pinned``: each process has one core and one thread.
    ``cache``: JAX's folder of compiled programs.

    An error, Ctrl-C or SIGTERM ends the runs under way, which then leave nothing; those that had ended stay. Raises
    RunFailed for a process that ended by itself.
    """
    view, waiting, running = view or View(), list(tasks), {}
    context = multiprocessing.get_context("spawn")
    cores = _cores(processes) if pinned else [None] * processes

    def stop() -> None:
        for process, _, _ in running.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process, task, _ in running.values():
            process.join()
            unfinished(task.path).unlink(missing_ok=True)

    with undoing(stop):
        while waiting or running:
            while waiting and len(running) < processes:
                task = waiting.pop(0)
                core = next(core for core in cores if core not in [c for _, _, c in running.values()] or core is None)
                heard, told = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(task, home, core, pinned, cache, told), daemon=True)
                with _environment(pinned):
                    process.start()
                told.close()
                running[heard] = (process, task, core)
                view.begun(task)
            for heard in wait(list(running)):
                process, task, _ = running[heard]
                try:
                    message = heard.recv()
                except EOFError:
                    process.join()
                    raise RunFailed(f"{task.label}: its process ended by itself ({process.exitcode}).") from None
                if isinstance(message, tuple):
                    view.step(task, *message)
                    continue
                process.join()
                heard.close()
                del running[heard]
                if message:
                    raise RunFailed(f"{task.label}: {message}")
                view.ended(task)


def _cores(processes: int) -> list[int | None]:
    """A core for each process; None where the system cannot pin one."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * processes
    there = sorted(os.sched_getaffinity(0))
    if processes > len(there):
        raise ValueError(f"{processes} processes need as many cores, and there are {len(there)}: give --processes.")
    return there[:processes]


@contextmanager
def _environment(pinned: bool) -> Iterator[None]:
    """Within it the process's environment is that of a child with a core of its own, which spawning hands on."""
    new = ENVIRONMENT if pinned else {}
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(task: Task, home: Path, core: int | None, pinned: bool, cache: str | None, told: Connection) -> None:
    """The child: makes one run, tells of its steps, and writes its file before it says that it is done."""
    # Ctrl-C reaches every process of the terminal; what becomes of a run is the parent's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if pinned and core is not None:
        os.sched_setaffinity(0, {core})
    try:
        import jax

        from deepseek_jax.lab.corpus import corpus
        from deepseek_jax.lab.lean import carry_out
        from deepseek_jax.lab.records import text
        from deepseek_jax.runs.run_folder import write_whole

        if cache is not None:
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        last = [0.0]

        def tell(number: int, steps: int) -> None:
            # A pipe whose other end is closed raises: without its parent a run ends as well.
            if number == steps or time.monotonic() - last[0] > OFTEN:
                last[0] = time.monotonic()
                told.send((number, steps))

        record = carry_out(task.setup, task.seed, corpus(task.setup, home), tell)
        write_whole(task.path, text({**record, **task.about}))
        told.send("")
    except BrokenPipeError:
        return
    except Exception as error:
        with suppress(OSError):
            told.send(_sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    return "".join(traceback.format_exception(error)).strip()
