"""``deepseek-jax rl --pipeline`` while somebody watches: a view of each stage, and the table at the end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.table import Table

from deepseek_jax.cli.files import write_json
from deepseek_jax.cli.interrupts import EXIT_CODES, remarks
from deepseek_jax.cli.tables import Output, show
from deepseek_jax.convert.folders import why_no_checkpoint
from deepseek_jax.core.context import Context
from deepseek_jax.rl.pipeline import Outcome, pipeline
from deepseek_jax.rl.tasks import Exercise
from deepseek_jax.runs.live import LiveView
from deepseek_jax.train.recipe import Recipe

if TYPE_CHECKING:
    from deepseek_jax.cli.rl import Rl

HELD = "stopping after the step under way; Ctrl-C again stops at once."


def lead(asked: Rl, task: Exercise, ctx: Context, began: float) -> int:
    """Leads the base through the stages that are left, and returns the exit code."""
    if (why := why_no_checkpoint(asked.source)) is not None:
        raise ValueError(f"--from {why}")
    out = asked.out
    remarks(HELD, lambda: "The same command goes on." if (out / "run.json").is_file() else "")

    @contextmanager
    def shown(name: str) -> Iterator[tuple[LiveView, Callable[[Recipe], None]]]:
        view = LiveView(1, f"{task.name}, {name}", Output(highlight=False))
        try:
            yield view, lambda recipe: view.expect(recipe.tokens)
        finally:
            view.close()

    outcome = pipeline(
        asked.source,
        task,
        out,
        stages=asked.stages,
        recipe=asked.recipe,
        grpo=asked.grpo,
        keep=asked.keep,
        patterns=asked.train,
        lora=asked.lora,
        options=asked.options,
        shown=shown,
        ctx=ctx,
        command=shlex.join(["deepseek-jax", "rl", *asked.arguments]),
        arguments=list(asked.arguments),
    )
    _tell(outcome, asked.recipe.attempts)
    if outcome.interrupted is None:
        print(f"{out}: all stages in {(time.monotonic() - began) / 60:.1f} minutes; the model is {out}/rl/checkpoint.")
    else:
        print(f"{out}: ended in the stage after {', '.join(outcome.stages) or 'none'}; the same command goes on.")
    if asked.json is not None:
        write_json(asked.json, {"interrupted": outcome.interrupted, "stages": outcome.stages})
    return EXIT_CODES[outcome.interrupted]


def _tell(outcome: Outcome, attempts: int) -> None:
    rows = outcome.table()
    if not rows:
        return
    table = Table("model", title="held-out problems", title_justify="left")
    keys = {"pass@1": "pass_at_1", f"pass@{attempts}": "pass_at_k", f"maj@{attempts}": "maj_at_k", "form": "format"}
    if "language" in rows[0][1]:
        keys["language"] = "language"
    for name in (*keys, "tokens an answer"):
        table.add_column(name, justify="right")
    for name, found in rows:
        shares = (f"{found[key]:.1%}" for key in keys.values())
        table.add_row(name, *shares, f"{found['length']:.1f}")
    show(Output(highlight=False), table)
    if (kept := outcome.stages.get("sampled")) is not None:
        print(f"rejection sampling: {kept['kept']:,} answers to {kept['solved']:,} of {kept['problems']:,} problems.")
