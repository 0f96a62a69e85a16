"""Runs of the workbench made while somebody watches: the corpus, processes side by side, progress and time left."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deepseek_jax.cli.programs import keep_programs
from deepseek_jax.lab.asked import tasks
from deepseek_jax.lab.records import Runs
from deepseek_jax.lab.study import Setup
from deepseek_jax.lab.workers import Task, View, carry_out_all
from deepseek_jax.train.schedule import count_steps


class Watch(View):
    """On a terminal a bar a run and one of all steps, with the time that is left; elsewhere a line a run that ended."""

    def __init__(self, wanted: list[Task]):
        self.console = Console(stderr=True, highlight=False)
        self.began, self.ended_runs, self.count = time.monotonic(), 0, len(wanted)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.bars = Progress(
            *columns, TextColumn("left"), TimeRemainingColumn(), console=self.console, disable=not live
        )
        self.whole = self.bars.add_task("all runs, steps", total=sum(count_steps(t.setup.recipe) for t in wanted))
        self.of: dict[Path, tuple[int, int]] = {}

    def begun(self, task: Task) -> None:
        self.of[task.path] = self.bars.add_task(task.label, total=count_steps(task.setup.recipe)), 0

    def step(self, task: Task, number: int, steps: int) -> None:
        bar, before = self.of[task.path]
        self.bars.update(bar, completed=number)
        self.bars.advance(self.whole, number - before)
        self.of[task.path] = bar, number

    def ended(self, task: Task) -> None:
        self.bars.remove_task(self.of.pop(task.path)[0])
        self.ended_runs += 1
        minutes = (time.monotonic() - self.began) / 60
        left = minutes / self.ended_runs * (self.count - self.ended_runs)
        done = f"{minutes:7.1f} min  {task.label}: {task.path.name}"
        self.bars.console.print(f"{done}; {self.ended_runs} of {self.count}, about {left:.0f} min left", soft_wrap=True)


def make(
    title: str,
    wanted: list[tuple[str, int, Setup]],
    runs: Runs,
    about: dict,
    *,
    scale: str,
    processes: int | None,
    check: Callable[[dict], None] = lambda corpus: None,
) -> str:
    """Makes the runs of ``wanted`` that are not there, and returns the hash of the corpus that is here.

    ``about``: what their files say of who asked for them. ``check``: is shown the corpus before anything is trained.
    """

    import jax

    from deepseek_jax.lab.corpus import corpus, default_home

    if processes is not None and processes < 1:
        raise ValueError(f"--processes must be at least 1, not {processes}.")
    one_thread = scale == "cpu"
    if processes is None:
        processes = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) if one_thread else 1
    home = default_home()
    text = corpus(wanted[0][2], home, lambda line: print(line, file=sys.stderr)).record()
    check(text)
    missing = tasks(wanted, runs, text["hash"], about, title)
    if not missing:
        return text["hash"]
    runs.folder.mkdir(parents=True, exist_ok=True)
    keep_programs()
    watch = Watch(missing)
    with watch.bars:
        carry_out_all(
            missing,
            home,
            processes=min(processes, len(missing)),
            pinned=one_thread,
            cache=jax.config.jax_compilation_cache_dir,
            view=watch,
        )
    return text["hash"]
