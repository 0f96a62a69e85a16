"""Generated problems with exact answers, for models of a million parameters: from a smoke test to a search.

On `data.tasks.Task`: an item follows from its number and settings, and a held-out problem is never a training one. A
text is a problem and its solution, ``<think>...</think><answer>...</answer>``, to begin with by fine-tuning; for RL its
prompt is given, and what the model writes is scored. Loads no JAX. In order of difficulty:

- tags: ``bjqa:`` and the four tags, mostly in a wrong order. Only the form counts.
- sort, reverse: ``sort 52831=``, answer ``12358``
- carry: ``12+95=``, thought ``2+5+0=07 1+9+0=10``, answer ``107`` (`data.tasks.Addition`, with its held-out side)
- mixed: carry whose thoughts mix two languages, digits and the letters a to j: ``2+5+0=07 b+j+a=ba``
- parity: ``10110=``, thought, in few texts, the parity so far after each bit; in all others nothing
- countdown: ``3 7 9>30``, thought the steps, answer ``(7*3)+9``, of each number once
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import numpy as np

from deepseek_jax.data.tasks import DRAWS, Addition, Answer, Item, Task, below, parse_task, shuffled, some
from deepseek_jax.rl.rewards import (
    ANSWER,
    TAGS,
    THINK,
    Language,
    answer_of,
    correct_prefix,
    format_reward,
    language_consistency,
    parts,
    same_integer,
    value_of,
)


@dataclass(frozen=True)
class Problem(Item):
    """``prompt``: how the text begins. ``gold``: the answer; "" where only the form counts."""

    prompt: str = ""
    gold: str = ""

    @property
    def given(self) -> str:
        return self.prompt

    @property
    def solution(self) -> str:
        return self.text[len(self.prompt) :]


class Exercise(Task):
    """A task of problems. `training_items` and `held_out` have `Problem` in place of `Item`. ``languages``: of its
    thoughts, the one that is wanted first; () where they have none."""

    languages: ClassVar[tuple[Language, ...]] = ()

    @abstractmethod
    def draw(self, rng: Random) -> Problem: ...

    def right(self, problem: Problem, answer: str | None) -> float:
        """1 where what stands in ``<answer>`` is right, else 0; None where nothing does."""
        return float(answer is not None and answer == problem.gold)

    def graded(self, problem: Problem, answer: str | None) -> float:
        """A reward in [0, 1] that rises before the answer is right, and is 1 just where it is: for a start without
        fine-tuning."""
        return self.right(problem, answer)


def solved(prompt: str, thought: str, gold: str, asked: str) -> Problem:
    return _problem(prompt, f"{THINK[0]}{thought}{THINK[1]}{ANSWER[0]}{gold}{ANSWER[1]}", gold, asked)


def _problem(prompt: str, solution: str, gold: str, asked: str) -> Problem:
    text = prompt + solution
    return Problem(text, (Answer(len(prompt), len(text)),), asked, prompt, gold)


@dataclass(frozen=True)
class Tags(Exercise):
    """``symbols``: letters of a prompt. ``ordered``: texts in a hundred whose tags stand in order."""

    symbols: int = 4
    ordered: int = 10

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "symbols")
        _percent(self, "ordered")

    def draw(self, rng: Random) -> Problem:
        letters = some("abcdefghij", self.symbols, rng)
        tags = TAGS
        if below(100, rng) >= self.ordered:
            while tags == TAGS:
                tags = tuple(shuffled(TAGS, 4, rng))
        return _problem(f"{letters}:", "".join(tags), "", letters)

    def right(self, problem: Problem, answer: str | None) -> float:
        """Of the form alone: 1 where `rewards.parts` finds an answer, be it empty."""
        return float(answer is not None)


@dataclass(frozen=True)
class _Rearranged(Exercise):
    symbols: int = 5

    def __post_init__(self):
        super().__post_init__()
        self._at_least(2, "symbols")

    def graded(self, problem: Problem, answer: str | None) -> float:
        return correct_prefix(answer, problem.gold)


@dataclass(frozen=True)
class Sort(_Rearranged):
    """``symbols``: digits to sort. All orders of the same digits are on the same side."""

    def draw(self, rng: Random) -> Problem:
        digits = some("0123456789", self.symbols, rng)
        gold = "".join(sorted(digits))
        return solved(f"sort {digits}=", "", gold, gold)


@dataclass(frozen=True)
class Reverse(_Rearranged):
    """``symbols``: letters to write backwards. A word and its reverse are on the same side."""

    def draw(self, rng: Random) -> Problem:
        letters = some("abcdefghij", self.symbols, rng)
        gold = letters[::-1]
        return solved(f"reverse {letters}=", "", gold, min(letters, gold))


@dataclass(frozen=True)
class Carry(Exercise):
    """Addition of two numbers of ``digits`` digits, from the last digit on with what is carried."""

    digits: int = 2

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "digits")

    def draw(self, rng: Random) -> Problem:
        item = Addition(digits=self.digits, steps=True).draw(rng)
        prompt, rest = item.text[: item.answers[0].start], item.text[item.answers[0].start :]
        thought, _, total = rest.rpartition(" ")
        return solved(prompt, thought, str(int(total)), item.asked)

    def right(self, problem: Problem, answer: str | None) -> float:
        return same_integer(answer, int(problem.gold))


@dataclass(frozen=True)
class Mixed(Carry):
    """`Carry` by texts that mix languages. ``foreign``: steps in a hundred that are written in letters."""

    foreign: int = 50
    languages: ClassVar[tuple[Language, ...]] = (Language("0123456789"), Language("abcdefghij"))

    def __post_init__(self):
        super().__post_init__()
        _percent(self, "foreign")

    def draw(self, rng: Random) -> Problem:
        problem = super().draw(rng)
        letters = str.maketrans("0123456789", "abcdefghij")
        steps = parts(problem.solution)[0].split()
        said = [step.translate(letters) if below(100, rng) < self.foreign else step for step in steps]
        return solved(problem.prompt, " ".join(said), problem.gold, problem.asked)


@dataclass(frozen=True)
class Parity(Exercise):
    """Whether ``bits`` bits hold an odd number of ones. ``long``: texts in a hundred that reason; above about 33
    training on the texts alone solves it (2510.11495)."""

    bits: int = 16
    long: int = 20

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "bits")
        _percent(self, "long")

    def draw(self, rng: Random) -> Problem:
        bits, thought = some("01", self.bits, rng), ""
        if below(100, rng) < self.long:
            thought = "".join(str(bits[: i + 1].count("1") % 2) for i in range(self.bits))
        return solved(f"{bits}=", thought, str(bits.count("1") % 2), bits)


@dataclass(frozen=True)
class Countdown(Exercise):
    """``numbers`` numbers of 1..``largest``, each to be used once, with + - * to a target of 1..``target``."""

    numbers: int = 3
    largest: int = 9
    target: int = 99

    def __post_init__(self):
        super().__post_init__()
        self._at_least(2, "numbers")
        self._at_least(1, "largest", "target")

    def draw(self, rng: Random) -> Problem:
        for _ in range(DRAWS):
            given = [1 + below(self.largest, rng) for _ in range(self.numbers)]
            (first, *rest), steps = shuffled(given, self.numbers, rng), []
            value, expression = first, str(first)
            for number in rest:
                sign = "+-*"[below(3, rng)]
                new = {"+": value + number, "-": value - number, "*": value * number}[sign]
                steps.append(f"{value}{sign}{number}={new}")
                # The last operation needs no parentheses around it.
                expression = f"({expression})" if expression != str(first) else expression
                value, expression = new, f"{expression}{sign}{number}"
            # Without negative numbers in between, which a text would have to write in parentheses.
            if 1 <= value <= self.target and not any("=-" in step for step in steps):
                prompt = f"{' '.join(map(str, given))}>{value}="
                asked = f"{' '.join(map(str, sorted(given)))}>{value}"
                return solved(prompt, " ".join(steps), expression, asked)
        raise ValueError(f"task:{self.spelled} is too rarely solvable: raise target, or lower largest.")

    def right(self, problem: Problem, answer: str | None) -> float:
        """Any expression of exactly these numbers with the target's value is right."""
        given, _, target = problem.prompt.removesuffix("=").partition(">")
        found = None if answer is None else value_of(answer)
        return float(
            found is not None and found[0] == int(target) and sorted(found[1]) == sorted(map(int, given.split()))
        )


EXERCISES: dict[str, type[Exercise]] = {
    kind.__name__.lower(): kind for kind in (Tags, Sort, Reverse, Carry, Mixed, Parity, Countdown)
}


def parse_exercise(spelled: str) -> Exercise:
    """As `data.tasks.parse_task`, of `EXERCISES`."""
    return parse_task(spelled, EXERCISES)


def scored(
    task: Exercise, problems: Sequence[Problem], texts: Sequence[str], opened: bool = False
) -> dict[str, np.ndarray]:
    """Each text's rewards, float64 [N] a column: "accuracy", of what stands in its ``<answer>``, "format", and
    "graded", the accuracy by degrees; "language", the share of a thought in the language that is wanted, 0 without the
    form, where the task has languages. ``opened``: as `rewards.parts`."""
    answers = [answer_of(text, opened) for text in texts]
    columns = {
        "accuracy": np.array([task.right(problem, answer) for problem, answer in zip(problems, answers, strict=True)]),
        "format": np.array([format_reward(text, opened) for text in texts]),
        "graded": np.array([task.graded(problem, answer) for problem, answer in zip(problems, answers, strict=True)]),
    }
    if task.languages:
        target, *others = task.languages
        thoughts = [(parts(text, opened) or ("", ""))[0] for text in texts]
        columns["language"] = np.array([language_consistency(thought, target, tuple(others)) for thought in thoughts])
    return columns


def _percent(task: Exercise, name: str) -> None:
    task._at_least(0, name)
    if getattr(task, name) > 100:
        raise ValueError(f"{name} of the task {task.name} must be at most 100, not {getattr(task, name)!r}.")
