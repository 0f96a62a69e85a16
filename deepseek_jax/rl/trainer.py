"""A run of reinforcement learning with verifiable rewards, by the machinery that pre-training and fine-tuning have."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from deepseek_jax.convert.config_file import read_config
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.processes import from_first, is_first, wait_for_all
from deepseek_jax.rl.distill import ReverseKl, check_teacher, teacher_logits
from deepseek_jax.rl.held_out import measure
from deepseek_jax.rl.improve import Improve, Writing, policy_state
from deepseek_jax.rl.policy import Policy, logprobs
from deepseek_jax.rl.problems import Problems, Prompts
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.tasks import Exercise
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.runs.course import Course, Step
from deepseek_jax.runs.journal import Progress
from deepseek_jax.runs.metrics import Reporter, Reporters
from deepseek_jax.runs.options import Options
from deepseek_jax.runs.prepare import check_fit, open_run
from deepseek_jax.runs.run import Result, Work, carry_out
from deepseek_jax.runs.run_folder import RunFolder
from deepseek_jax.runs.tuned import Tuned, adapters, fingerprint, keep_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer
from deepseek_jax.train.begin import begin
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.step import State
from deepseek_jax.train.tuning import LoRA


def improve(
    source: Path,
    task: Exercise,
    folder: Path,
    *,
    recipe: RlRecipe | None = None,
    grpo: Grpo | None = None,
    teacher: Path | None = None,
    patterns: Sequence[str] = (),
    lora: LoRA | None = None,
    options: Options | None = None,
    resume: bool = False,
    view: Reporter | None = None,
    planned: Callable[[Recipe], None] = lambda recipe: None,
    ctx: Context = DEFAULT,
    began: float | None = None,
    command: str | None = None,
    arguments: list[str] | None = None,
) -> Result:
    """Trains a checkpoint on ``task`` by GRPO and exports it into ``folder``.

    ``recipe``: rollouts and steps. ``grpo``: the objective's form; its KL, where it has one, is to the checkpoint.
    ``teacher``: a checkpoint of the same tokens, to which the reverse KL is made small in place of ``grpo``
    (`distill.ReverseKl`), on what the student writes; rewards are told all the same.
    ``patterns``, ``lora``: what is trained, as `runs.finetune.fine_tune` has it. ``resume``: go on with the run in
    ``folder`` from its newest whole checkpoint, bit for bit as if it had never stopped, rollouts included: their random
    numbers follow from the step's number. More steps than it was begun with extend it. ``planned``: is told the run's
    recipe, of which a row is a prompt and its answer. The other arguments, and what Ctrl-C and SIGTERM do, are those of
    `runs.pretrain.train`.

    Rollouts and training share one copy of the weights, unless ``recipe.stale`` asks for older ones.

    Raises ValueError, FileExistsError or FileNotFoundError for settings that do not fit each other, the checkpoint or
    the folder; nothing is written then.
    """
    options, source, recipe, grpo = options or Options(), Path(source), recipe or RlRecipe(), grpo or Grpo()
    began = time.monotonic() if began is None else began
    cfg, words = read_config(source), load_tokenizer(source)
    words.check_fits(cfg.vocab_size)
    if not cfg.eos_ids:
        raise ValueError(f"{source} names no token that ends an answer: its config has no eos_token_id.")
    if recipe.rewards.language and not task.languages:
        raise ValueError(f"the thoughts of the task {task.name} are in no language: take --rewards.language away.")
    if teacher is not None:
        check_teacher(teacher, source, cfg)
    problems = Problems.of(task, words, recipe.form, recipe.held_out)
    rollouts = replace(ctx, dtype=jnp.dtype(recipe.rollout_dtype or recipe.dtype))
    # What a teacher says needs no record of what was drawn.
    writing = Writing(problems, words, recipe, grpo if teacher is None else Grpo(), rollouts)
    training = recipe.training(writing.length)
    check_fit(cfg, training, options, ctx)
    tuned = Tuned(source, cfg, training, options, ctx, tuple(patterns), adapters(lora))
    planned(training)
    settings = {
        "from": str(source),
        "weights": fingerprint(source),
        "task": task.spelled,
        "rl": asdict(recipe),
        **({"grpo": asdict(grpo)} if teacher is None else {"teacher": str(teacher), "taught": fingerprint(teacher)}),
        "train": list(patterns),
        "lora": None if tuned.lora is None else asdict(tuned.lora),
    }
    view = Reporters([view] if view is not None and is_first() else [])
    with open_run(folder, settings, resume, command, arguments) as run:
        from_first(lambda: keep_tokenizer(source, run), "copying the tokenizer")
        told = f"task {task.spelled}; objective {asdict(grpo) if teacher is None else f'reverse KL to {teacher}'}"
        work = Work(cfg, training, Practice(writing, tuned, teacher), tuned.make, told=told)
        return carry_out(run, work, options=options, view=view, ctx=ctx, began=began)


@dataclass(frozen=True)
class Practice:
    """A `course.Source` of problems. ``teacher``: as `improve` has it."""

    writing: Writing
    tuned: Tuned
    teacher: Path | None = None

    def open(self, run: RunFolder, recipe: Recipe, options: Options, ctx: Context) -> Course:
        prompts = Prompts(self.writing.problems, recipe.pass_rows, self.writing.recipe.group)
        run.describe(data=self.writing.problems.record())

        def found(state: State, progress: Progress) -> dict[str, Any]:
            return measure(state.model, self.writing)

        def export(state: State) -> None:
            with run.exporting() as folder:
                self.tuned.write(state.model, folder)
            wait_for_all("exporting")

        return Course(prompts, found, "wrong", export, self._begin)

    def _begin(self, model: Transformer) -> tuple[State, Step]:
        tuned, recipe, grpo = self.tuned, self.writing.recipe, self.writing.grpo
        ctx = replace(tuned.ctx, dtype=jnp.dtype(recipe.dtype))
        objective = Policy(grpo, recipe.temperature) if self.teacher is None else ReverseKl(recipe.temperature)
        state, update = begin(model, tuned.recipe, ctx, tuned.trained, objective)
        beside = None
        if self.teacher is not None:
            other = load_pretrained(self.teacher, dtype=jnp.float32, ctx=ctx)
            beside = lambda part: {"teacher": teacher_logits(other, part, ctx)}  # noqa: E731
        elif grpo.beta:
            # A second copy of the weights: of those that are trained none is left after the first update.
            dtype = None if tuned.lora is not None or tuned.patterns else jnp.float32
            other = load_pretrained(tuned.source, dtype=dtype, ctx=ctx)
            beside = lambda part: {"reference": logprobs(other, part, recipe.temperature, ctx)}  # noqa: E731
        return policy_state(state, recipe.stale), Improve(update, self.writing, beside, ctx)
