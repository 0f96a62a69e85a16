"""Rejection sampling: a model's own right answers, as chats to fine-tune on (R1 2501.12948 §2.3.3)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert.files import check_free, new_folder
from deepseek_jax.convert.load import load_pretrained
from deepseek_jax.core.context import DEFAULT, Context
from deepseek_jax.rl.improve import ROLLOUTS, Writing, seed_of
from deepseek_jax.rl.problems import Problems
from deepseek_jax.rl.recipe import RlRecipe
from deepseek_jax.rl.rewards import THINK
from deepseek_jax.rl.tasks import Exercise, Problem, scored
from deepseek_jax.rl.traces import CHATS, TOKENIZER, record
from deepseek_jax.rl.variants import Grpo
from deepseek_jax.runs.run_folder import write_whole
from deepseek_jax.text.files import copy_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer


def chosen(
    task: Exercise, problems: Sequence[Problem], texts: Sequence[str], keep: int, opened: bool = False
) -> list[tuple[Problem, str]]:
    """Of each problem the shortest ``keep`` different texts that are right, which only texts of the right form are, and
    whose thoughts are in one language, the wanted one, where the task has several (R1 §2.3.3); in the problems' order,
    the earlier of equally long ones.

    Raises ValueError for ``keep`` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}.")
    columns = scored(task, problems, texts, opened)
    right = (columns["accuracy"] > 0) & (columns.get("language", np.ones(len(texts))) == 1)
    found: dict[str, tuple[Problem, list[str]]] = {}
    for problem, text, good in zip(problems, texts, right, strict=True):
        kept = found.setdefault(problem.prompt, (problem, []))[1]
        if good and text not in kept:
            kept.append(text)
    return [(problem, text) for problem, kept in found.values() for text in sorted(kept, key=len)[:keep]]


def reject(
    source: Path, task: Exercise, folder: Path, recipe: RlRecipe, keep: int = 1, ctx: Context = DEFAULT
) -> tuple[int, int, int]:
    """Lets the checkpoint answer ``recipe.steps`` times ``recipe.prompts`` training problems, ``recipe.group`` times
    each, and writes what is `chosen` into ``folder`` as `traces.write_traces` writes a task's own solutions, with the
    checkpoint's tokenizer. Returns the problems, those with a right answer, and the answers that were kept.

    Raises FileExistsError where something is in the folder, and ValueError where no answer is right; nothing is written
    then.
    """
    check_free(folder)
    words = load_tokenizer(source)
    problems = Problems.of(task, words, recipe.form, held_out=1)
    how = replace(ctx, dtype=jnp.dtype(recipe.rollout_dtype or recipe.dtype))
    writing, model = Writing(problems, words, recipe, Grpo(), how), load_pretrained(source, dtype=jnp.float32, ctx=how)
    asked, texts = [], []
    for step in range(recipe.steps):
        numbers = (step * recipe.prompts + np.arange(recipe.prompts)) % len(problems.prompts)
        prompts = [problems.prompts[number] for number in numbers]
        texts += writing.texts(writing.rollout(model, prompts, recipe.group, seed_of(recipe.seed, ROLLOUTS, step)))
        asked += [problems.training[number] for number in np.repeat(numbers, recipe.group)]
    kept = chosen(task, asked, texts, keep, problems.opened)
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {len(texts)} answers of {source} are kept, too few to learn from: ask more often "
            "(--steps, --group), or train it further first."
        )
    opening = THINK[0] if problems.opened else ""
    with new_folder(folder) as new:
        (new / TOKENIZER).mkdir()
        copy_tokenizer(source, new / TOKENIZER)
        write_whole(new / CHATS, "".join(record(problem, opening + text) for problem, text in kept))
    solved = {problem.prompt for problem, _ in kept}
    return len({problem.prompt for problem in asked}), len(solved), len(kept)
