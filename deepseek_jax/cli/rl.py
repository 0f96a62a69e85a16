"""``deepseek-jax rl``: a checkpoint learns a task with verifiable rewards by GRPO, in one of its published forms."""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from deepseek_jax.cli.devices import Devices
from deepseek_jax.cli.files import check_destination, free_folder, write_json
from deepseek_jax.cli.given import given
from deepseek_jax.cli.interrupts import EXIT_CODES, remarks
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.stages import Stages
from deepseek_jax.rl.variants import VARIANTS, Grpo
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.run_folder import extended, read_run
from deepseek_jax.train.tuning import LoRA

HELD = "stopping after the step under way; Ctrl-C again stops at once."
GO_ON = "deepseek-jax rl {} --resume goes on"


@dataclass(frozen=True)
class Rl:
    """Teach a checkpoint a task with verifiable rewards, by GRPO.

    A step writes a group of answers to each of some problems, rewards them by rules, and moves the weights that wrote
    them. --variant names the form of the objective, its parts are the --grpo options. The run's folder, checkpoints,
    guards, Ctrl-C, --resume, meshes and export are those of `deepseek-jax train`; `deepseek-jax plot OUT` draws it.

    With --traces FOLDER the task's solutions are written there instead: chats to begin with by fine-tuning
    (`deepseek-jax train --sft FOLDER/traces.jsonl`), the same as texts, and a tokenizer for models that are trained on
    such texts alone. With --from beside it they are that checkpoint's own right answers: rejection sampling.

    With --pipeline R1's stages follow one another, each a folder of OUT: a cold start on the task's solutions, GRPO,
    rejection sampling, fine-tuning of the base on what was kept, GRPO; beside them R1-Zero, GRPO from the base. The
    same command goes on wherever it was ended.
    """

    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """Folder for the run. Unless --resume is given it must not exist, or be empty; by default the first free one of
    runs/TASK-1, runs/TASK-2..."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in OUT. Its own options are the defaults then; one that would change what is trained is an
    error, but for more --steps: they extend the run."""
    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="CKPT")] = None
    """The checkpoint to begin from, with its tokenizer; the KL is to it."""
    task: Annotated[str, tyro.conf.arg(metavar="NAME[,FIELD=VALUE...]")] = "sort"
    """Task: tags, sort, reverse, carry, mixed, parity or countdown, with settings such as parity,bits=12,long=20."""
    variant: Annotated[str, tyro.conf.arg(metavar="NAME")] = "r1"
    """Form of the objective: deepseek-math, v3, r1 or v3.2."""
    grpo: Grpo = field(default_factory=lambda: VARIANTS["r1"])
    """Its parts, shown with the values of the form that --variant names."""
    recipe: Annotated[RlRecipe, tyro.conf.arg(name="")] = field(default_factory=RlRecipe)
    """What the run does."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Train these parts only, by patterns of parameter paths, as `deepseek-jax train` takes them."""
    lora: LoRA = field(default_factory=lambda: LoRA(rank=0))
    """Adapters."""
    traces: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write the task's solutions into this folder, and train nothing; with --from the right ones among the answers of
    --steps rollouts."""
    keep: int = 1
    """Of rejection sampling: so many answers to a problem at most, the shortest ones, none twice."""
    pipeline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """All of R1's stages, from the base that --from names; the other options are those of each stage."""
    stages: Stages = field(default_factory=Stages)
    """What they do beside reinforcement learning."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    """How it is kept."""
    devices: Annotated[Devices, tyro.conf.arg(name="")] = field(default_factory=Devices)
    """Where it runs."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the result to this file; "-" is the standard output."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """What was given, for run.json."""

    @classmethod
    def defaults(cls, arguments: list[str], parse: Callable) -> "Rl":
        """What the options default to, given those that are there: a form's parts, or a resumed run's options."""
        return resumed(cls._of_variant, "rl", arguments, parse, "--variant")

    @classmethod
    def _of_variant(cls, arguments: list[str]) -> "Rl":
        name = given(arguments, "--variant") or "r1"
        if name not in VARIANTS:
            raise ValueError(f"there is no variant {name!r}; choose one of {', '.join(VARIANTS)}.")
        return cls(variant=name, grpo=VARIANTS[name], arguments=tuple(arguments))

    def run(self) -> int:
        began = time.monotonic()
        check_destination(self.json)
        from deepseek_jax.rl.tasks import parse_exercise

        task = parse_exercise(self.task)
        if self.traces is not None:
            return self._write(task)
        self._check()
        ctx = self.devices.context()
        if self.pipeline:
            from deepseek_jax.cli.stages import lead

            return lead(self, task, ctx, began)

        from deepseek_jax.cli.tables import Output
        from deepseek_jax.convert.folders import why_no_checkpoint
        from deepseek_jax.parallel.processes import from_first, is_first
        from deepseek_jax.rl.trainer import improve
        from deepseek_jax.runs.live import LiveView

        if (why := why_no_checkpoint(self.source)) is not None:
            raise ValueError(f"--from {why}")
        out = self.out
        if out is None:
            out = Path(from_first(lambda: str(free_folder(Path("runs"), task.name)), "choosing a folder"))
        if is_first():
            remarks(HELD, lambda: f"{GO_ON.format(shlex.quote(str(out)))}." if (out / "run.json").is_file() else "")
        view = LiveView(1, task.name, Output(highlight=False), began=began) if is_first() else None
        try:
            result = improve(
                self.source,
                task,
                out,
                recipe=self.recipe,
                grpo=self.grpo,
                patterns=self.train,
                lora=self.lora,
                options=self.options,
                resume=self.resume,
                view=view,
                planned=lambda recipe: None if view is None else view.expect(recipe.tokens),
                ctx=ctx,
                began=began,
                command=shlex.join(["deepseek-jax", "rl", *self.arguments]),
                arguments=list(self.arguments),
            )
        finally:
            if view is not None:
                view.close()
        if is_first():
            print(f"{out}: {told(result, self.recipe.attempts)}")
        if self.json is not None and is_first():
            write_json(self.json, {**asdict(result), "checkpoint": result.checkpoint and str(result.checkpoint)})
        return EXIT_CODES[result.interrupted]

    def _write(self, task) -> int:
        from deepseek_jax.rl.traces import write_traces

        if self.out is not None or self.resume or self.pipeline:
            raise ValueError("--traces writes solutions and trains nothing: leave OUT, --resume and --pipeline out.")
        if self.source is None:
            write_traces(task, self.traces)
            print(f"{self.traces}: {task.documents:,} solutions of {task.spelled}, and a tokenizer for them.")
            return 0
        ctx = self.devices.context()
        from deepseek_jax.rl.reject import reject

        asked, solved, kept = reject(self.source, task, self.traces, self.recipe, self.keep, ctx)
        print(f"{self.traces}: {kept:,} answers to {solved:,} of {asked:,} problems of {task.spelled}.")
        return 0

    def _check(self) -> None:
        if self.resume and self.out is None:
            raise ValueError("--resume needs the folder of the run: deepseek-jax rl OUT --resume.")
        if self.source is None:
            raise ValueError("a run of reinforcement learning begins from a checkpoint: name it with --from.")
        if self.pipeline and self.out is None:
            raise ValueError("--pipeline needs a folder, by which the same command goes on: deepseek-jax rl OUT ...")
        if not self.pipeline and self.stages != Stages():
            raise ValueError("--stages options belong to --pipeline.")
        if not self.lora.rank and self.lora != LoRA(rank=0):
            raise ValueError("--lora options without adapters: give these a rank above 0 with --lora.rank.")


def resumed(of: Callable, command: str, arguments: list[str], parse: Callable, fixed: str):
    """The defaults that ``of`` has of some arguments, or with --resume the options that the run was begun with.

    ``fixed``: an option that says what others default to, and so may not be another.
    """
    default = of(arguments)
    if "--resume" not in arguments:
        return default
    out = parse(arguments, default=default).out
    if out is None or not (out / "run.json").is_file():
        return default
    run = read_run(out)
    begun = run.get("arguments")
    if begun is None or not str(run.get("command")).startswith(f"deepseek-jax {command} "):
        raise ValueError(f"{out} holds no run of deepseek-jax {command}: resume it as it was begun.")
    was = parse(begun, default=of(begun))
    if (steps := extended(run, "rl.steps")) is not None:
        was = replace(was, recipe=replace(was.recipe, steps=steps))
    name = fixed.removeprefix("--")
    if given(arguments, fixed) not in (None, getattr(was, name)):
        raise ValueError(f"{out} was begun with {fixed} {getattr(was, name)}: resume it as it was begun.")
    # The processes are this command's own.
    devices = Devices(mesh=was.devices.mesh, layout=was.devices.layout, set=was.devices.set)
    return replace(was, out=None, devices=devices)


def told(result, attempts: int) -> str:
    steps = f"{result.steps} steps in {result.minutes:.1f} minutes"
    if result.checkpoint is None:
        return f"{steps}; saved, to go on with --resume."
    found = result.figures
    return (
        f"{steps}, of held-out problems pass@1 {found['pass_at_1']:.1%}, pass@{attempts} {found['pass_at_k']:.1%}, "
        f"answers of {found['length']:.1f} tokens."
    )
