"""``deepseek-jax distill``: a student learns a task from a teacher, by its answers or by its distribution."""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.files import check_destination, free_folder, write_json
from deepseek_jax.cli.interrupts import EXIT_CODES, remarks
from deepseek_jax.cli.rl import HELD, resumed, told
from deepseek_jax.rl.recipe import RlRecipe, on_chats
from deepseek_jax.rl.variants import MATH, Grpo
from deepseek_jax.runs.options import Options

GO_ON = "deepseek-jax distill {} --resume goes on"


@dataclass(frozen=True)
class Distill:
    """Teach a student what a teacher can.

    reverse-kl: the student writes answers, and at every token of them its distribution is moved to the teacher's, over
    the whole vocabulary; both have the same tokenizer. sft: the student learns the teacher's right answers, which are
    written into OUT-traces first. grpo: it learns by rewards alone, for comparison.

    Folder, checkpoints, guards, Ctrl-C, --resume and export are those of `deepseek-jax rl` and `deepseek-jax train`.
    """

    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """Folder for the run. Unless --resume is given it must not exist, or be empty; by default the first free one of
    runs/TASK-1, runs/TASK-2..."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in OUT. Its own options are the defaults then."""
    teacher: Annotated[Path | None, tyro.conf.arg(metavar="CKPT")] = None
    """The checkpoint to learn from."""
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="CKPT")] = None
    """The checkpoint that learns."""
    how: Literal["sft", "reverse-kl", "grpo"] = "reverse-kl"
    """By the teacher's right answers, by its distribution on the student's, or by rewards."""
    task: Annotated[str, tyro.conf.arg(metavar="NAME[,FIELD=VALUE...]")] = "sort"
    """Task, as `deepseek-jax rl` takes it."""
    recipe: Annotated[RlRecipe, tyro.conf.arg(name="")] = field(default_factory=RlRecipe)
    """Rollouts: the student's, with sft the teacher's."""
    grpo: Grpo = field(default_factory=lambda: replace(MATH, beta=0.0))
    """Form of the objective, with grpo."""
    keep: int = 1
    """With sft: right answers to a problem at most, the shortest ones, none twice."""
    epochs: float = 3.0
    """With sft: passes over them, at --lr."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    """How it is kept."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the result to this file; "-" is the standard output."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """What was given, for run.json."""

    @classmethod
    def defaults(cls, arguments: list[str], parse: Callable) -> "Distill":
        """A resumed run's options."""
        return resumed(lambda given: cls(arguments=tuple(given)), "distill", arguments, parse, "--how")

    def run(self) -> int:
        began = time.monotonic()
        check_destination(self.json)
        if self.resume and self.out is None:
            raise ValueError("--resume needs the folder of the run: deepseek-jax distill OUT --resume.")
        for name, path in (("--teacher", self.teacher), ("--from", self.source)):
            if path is None and not (name == "--teacher" and self.how == "grpo"):
                raise ValueError(f"{name} is missing: distillation is from one checkpoint to another.")
        from deepseek_jax.rl.tasks import parse_exercise

        task, ctx = parse_exercise(self.task), self.devices.context()

        from deepseek_jax.cli.tables import Output
        from deepseek_jax.convert.folders import why_no_checkpoint
        from deepseek_jax.parallel.processes import from_first, is_first
        from deepseek_jax.rl.trainer import improve
        from deepseek_jax.runs.live import LiveView

        for name, path in (("--teacher", self.teacher), ("--from", self.source)):
            if path is not None and (why := why_no_checkpoint(path)) is not None:
                raise ValueError(f"{name} {why}")
        out = self.out
        if out is None:
            out = Path(from_first(lambda: str(free_folder(Path("runs"), task.name)), "choosing a folder"))
        if is_first():
            remarks(HELD, lambda: f"{GO_ON.format(shlex.quote(str(out)))}." if (out / "run.json").is_file() else "")
        view = LiveView(1, task.name, Output(highlight=False), began=began) if is_first() else None
        how = {
            "options": self.options,
            "resume": self.resume,
            "view": view,
            "planned": lambda recipe: None if view is None else view.expect(recipe.tokens),
            "ctx": ctx,
            "began": began,
            "command": shlex.join(["deepseek-jax", "distill", *self.arguments]),
            "arguments": list(self.arguments),
        }
        try:
            if self.how == "sft":
                result = self._answers(task, out, ctx, how)
            else:
                teacher = self.teacher if self.how == "reverse-kl" else None
                result = improve(self.source, task, out, recipe=self.recipe, grpo=self.grpo, teacher=teacher, **how)
        finally:
            if view is not None:
                view.close()
        if is_first():
            found = told(result, self.recipe.attempts) if self.how != "sft" else f"{result.steps} steps."
            print(f"{out}: {found}")
        if self.json is not None and is_first():
            write_json(self.json, {**asdict(result), "checkpoint": result.checkpoint and str(result.checkpoint)})
        return EXIT_CODES[result.interrupted]

    def _answers(self, task, out: Path, ctx, how: dict):
        from deepseek_jax.convert.config_file import read_config
        from deepseek_jax.rl.reject import reject
        from deepseek_jax.rl.traces import CHATS
        from deepseek_jax.runs.finetune import fine_tune

        traces = out.with_name(f"{out.name}-traces")
        if not (self.resume and (traces / CHATS).is_file()):
            reject(self.teacher, task, traces, self.recipe, self.keep, ctx)
        recipe = on_chats(self.recipe.lr, read_config(self.source).max_length, self.recipe.seed)
        return fine_tune(self.source, recipe, traces / CHATS, out, epochs=self.epochs, **how)
