"""What a run of reinforcement learning measures: pass@1, pass@k and maj@k on problems that it never learns from."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.rl.improve import HELD_OUT, Writing, seed_of
from deepseek_jax.rl.rewards import answer_of
from deepseek_jax.rl.tasks import scored


def measure(model: Transformer, writing: Writing) -> dict[str, Any]:
    """Figures of ``recipe.attempts`` answers to each held-out problem, drawn as rollouts are, with the same random
    numbers every time.

    "pass_at_1": the share of answers that are right; "wrong": 1 less it. "pass_at_k": of problems with a right answer
    among all. "maj_at_k": of problems whose commonest answer is right, the first of equally common ones. "format",
    "graded", and "language" where the task has languages: the means of these rewards; "length": tokens an answer;
    "truncated": the share that met their limit.
    """
    problems, size = writing.problems, writing.recipe.attempts
    task, texts, lengths, reasons = problems.task, [], [], []
    for found in _rollouts(model, writing):
        texts += writing.texts(found)
        lengths += map(len, found.answers)
        reasons += found.info.finish_reason
    rows = len(problems.held_out) * size
    asked = [problem for problem in problems.held_out for _ in range(size)]
    columns = scored(task, asked, texts[:rows], problems.opened)
    right = columns["accuracy"].reshape(-1, size)
    common = []
    for i, problem in enumerate(problems.held_out):
        said = [answer_of(text, problems.opened) for text in texts[i * size : (i + 1) * size]]
        votes = Counter(answer for answer in said if answer is not None).most_common(1)
        common.append(bool(votes) and task.right(problem, votes[0][0]) > 0)
    return {
        "pass_at_1": right.mean(),
        "wrong": 1 - right.mean(),
        "pass_at_k": (right > 0).any(1).mean(),
        "maj_at_k": np.mean(common),
        "format": columns["format"].mean(),
        **{name: columns[name].mean() for name in ("graded", "language") if name in columns},
        "length": np.mean(lengths[:rows]),
        "truncated": np.mean([reason == "length" for reason in reasons[:rows]]),
    }


def _rollouts(model: Transformer, writing: Writing) -> Iterator:
    """In calls of as many rows as a step's rollout has, where they divide: the same compiled program. The last call is
    filled up with the first problems."""
    prompts, recipe = writing.problems.held_out_prompts, writing.recipe
    count = max(1, recipe.rows // recipe.attempts)
    for number, first in enumerate(range(0, len(prompts), count)):
        asked = [prompts[i % len(prompts)] for i in range(first, first + count)]
        yield writing.rollout(model, asked, recipe.attempts, seed_of(recipe.seed, HELD_OUT, number))
