"""A task's problems as tokens: what a run draws from, and what it is measured on. Loads no JAX.

Suffixes: P prompts, W tokens of the longest.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from deepseek_jax.rl.prompts import encode
from deepseek_jax.rl.tasks import Exercise, Problem
from deepseek_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Problems:
    """``training``, ``held_out``: problems, with ``prompts`` and ``held_out_prompts``, their ids. ``opened``: whether
    prompts end with ``<think>``. ``width``: tokens of the longest prompt."""

    task: Exercise
    form: str
    training: Sequence[Problem] = field(repr=False)
    held_out: Sequence[Problem] = field(repr=False)
    prompts: list[list[int]] = field(repr=False)
    held_out_prompts: list[list[int]] = field(repr=False)
    opened: bool = False

    @classmethod
    def of(cls, task: Exercise, words: Tokenizer, form: str, held_out: int) -> "Problems":
        """All of a task's training problems, and the first of those held out, of which none is a training one.

        Raises ValueError for a task that has not so many, and for a form that the checkpoint cannot write.
        """
        training, others = list(task.training_items()), list(task.held_out(held_out))
        ids, opened = encode(words, [*training, *others], form)
        return cls(task, form, training, others, ids[: len(training)], ids[len(training) :], opened)

    @property
    def width(self) -> int:
        return max(map(len, (*self.prompts, *self.held_out_prompts)))

    def record(self) -> dict:
        return {"task": self.task.spelled, "form": self.form, "problems": len(self.training)}


class Prompts(Iterator[dict[str, np.ndarray]]):
    """Training prompts in their order, again and again, as a run's batches: "tokens" and "segments" [P, W] and
    "problem" [P, 1], each prompt's number. Every process gets all of them.

    ``rows``: answers of a micro-batch, ``group`` to each prompt; the state counts answers, as a run's rows are.
    """

    def __init__(self, problems: Problems, rows: int, group: int):
        self.problems, self.count, self.group, self.taken = problems, rows // group, group, 0

    def __next__(self) -> dict[str, np.ndarray]:
        number_P = (self.taken + np.arange(self.count)) % len(self.problems.prompts)
        tokens_PW = np.zeros((self.count, self.problems.width), np.int32)
        segments_PW = np.zeros_like(tokens_PW)
        for row, number in enumerate(number_P):
            ids = self.problems.prompts[number]
            tokens_PW[row, : len(ids)], segments_PW[row, : len(ids)] = ids, 1
        self.taken += self.count
        return {"tokens": tokens_PW, "segments": segments_PW, "problem": number_P[:, None].astype(np.int32)}

    def get_state(self) -> dict:
        return {"rows": self.taken * self.group, **json.loads(json.dumps(self.problems.record()))}

    def set_state(self, state: dict) -> None:
        """Raises ValueError for a state of other problems."""
        different = [name for name, value in self.problems.record().items() if state.get(name) != value]
        if found := ", ".join(different) or self.damage(state):
            raise ValueError(f"The problems cannot go on from the saved state: {found}.")
        self.taken = state["rows"] // self.group

    def damage(self, state) -> str | None:
        if not isinstance(state, dict):
            return f"the problems' state is {state!r}"
        missing = [name for name in self.get_state() if name not in state]
        if missing:
            return f"the problems' state has no {', '.join(missing)}"
        rows = state["rows"]
        return None if type(rows) is int and rows >= 0 and rows % self.group == 0 else f"rows is {rows!r}"

    def passes(self, rows: int) -> dict[str, float]:
        return {self.problems.task.name: rows / self.group / len(self.problems.prompts)}

    def close(self) -> None:
        """There is nothing to end."""
