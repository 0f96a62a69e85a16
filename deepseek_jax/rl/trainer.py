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
from deepseek_jax.rl.held_out import measure
from deepseek_jax.rl.improve import Improve, Writing, policy_state
from deepseek_jax.rl.policy import Policy
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
    problems = Problems.of(task, words, recipe.form, recipe.held_out)
    rollouts = replace(ctx, dtype=jnp.dtype(recipe.rollout_dtype or recipe.dtype))
    writing = Writing(problems, words, recipe, grpo, rollouts)
    training = recipe.training(writing.length)
    check_fit(cfg, training, options, ctx)
    tuned = Tuned(source, cfg, training, options, ctx, tuple(patterns), adapters(lora))
    planned(training)
    settings = {
        "from": str(source),
        "weights": fingerprint(source),
        "task": task.spelled,
        "rl": asdict(recipe),
        "grpo": asdict(grpo),
        "train": list(patterns),
        "lora": None if tuned.lora is None else asdict(tuned.lora),
    }
    view = Reporters([view] if view is not None and is_first() else [])
    with open_run(folder, settings, resume, command, arguments) as run:
        from_first(lambda: keep_tokenizer(source, run), "copying the tokenizer")
        told = f"task {task.spelled}; objective {asdict(grpo)}"
        work = Work(cfg, training, Practice(writing, tuned), tuned.make, told=told)
        return carry_out(run, work, options=options, view=view, ctx=ctx, began=began)


@dataclass(frozen=True)
class Practice:
    """A `course.Source` of problems."""

    writing: Writing
    tuned: Tuned

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
        tuned, recipe = self.tuned, self.writing.recipe
        ctx = replace(tuned.ctx, dtype=jnp.dtype(recipe.dtype))
        grpo = self.writing.grpo
        state, update = begin(model, tuned.recipe, ctx, tuned.trained, Policy(grpo, recipe.temperature))
        reference = None
        if grpo.beta:
            # A second copy of the weights: of those that are trained none is left after the first update.
            dtype = None if tuned.lora is not None or tuned.patterns else jnp.float32
            reference = load_pretrained(tuned.source, dtype=dtype, ctx=ctx)
        return policy_state(state, recipe.stale), Improve(update, self.writing, reference, ctx)
