"""Generated tasks with exact answers, as sources of text and as items to score. Loads no JAX.

An item follows from its number and its task's settings alone, `documents` apart. Each is on one side by a hash of what
it asks, whatever the seed: a held-out item (`Task.held_out`) is never a training document (`Task.training`). The
formats, all of them ASCII, answers in brackets, which the text does not have:

- passkey (2305.16300): filler, with a line somewhere in it that says the key, and ``What is the pass key? The pass key
  is [5][8][3][0][1].``
- recall, of several pairs by their keys (2312.04927): ``ab4 kz7 cq2``, a newline, ``kz[7] cq[2] ab[4]``
- copy: ``qwert|[q][w][e][r][t]``
- addition: ``12+95=[1][0][7]``, with its steps (2112.00114), from the last digit on with what is carried:
  ``12+95=[2][+][5][+][0][=][0][7][ ][1][+][9][+][0][=][1][0][ ][1][0][7]``
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

HELD_OUT = 16  # one in so many of what a task can ask
DRAWS = 1000  # for an item of one side that there is not yet; a task that has none left is too small
HEAD = "There is a pass key hidden in this text. Remember it.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "\nWhat is the pass key? The pass key is "


class Answer(NamedTuple):
    """The characters ``start`` to ``stop`` of a text, which follow from what is before them. ``source``: the character
    at which what they repeat stands; None where they repeat nothing."""

    start: int
    stop: int
    source: int | None = None


@dataclass(frozen=True)
class Item:
    """A text with its answers in order. ``asked``: what decides whether it is held out."""

    text: str
    answers: tuple[Answer, ...]
    asked: str

    @property
    def given(self) -> str:
        """What no two held-out items have alike."""
        return self.text

    @property
    def is_held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.asked.encode()).digest()[:8], "big") % HELD_OUT == 0


@dataclass(frozen=True)
class Task(ABC):
    """``documents``: how many a source of it has; ``seed``: of its items."""

    documents: int = 20_000
    seed: int = 0

    def __post_init__(self):
        self._at_least(2, "documents")
        self._at_least(0, "seed")

    @abstractmethod
    def draw(self, rng: Random) -> Item:
        """An item of either side. Of ``rng`` only ``random()`` keeps its numbers in every Python."""

    def training(self) -> Iterator[str]:
        """The texts to train on, ``documents`` of them; some may be equal."""
        return (item.text for item in self.training_items())

    def training_items(self) -> Iterator[Item]:
        """What they were made of."""
        for number in range(self.documents):
            yield self._item(number, False, set())

    def held_out(self, count: int) -> tuple[Item, ...]:
        """The first ``count`` items to score, all different.

        Raises ValueError where the task has not so many.
        """
        found: dict[str, Item] = {}
        for number in range(count):
            item = self._item(number, True, found)
            found[item.given] = item
        return tuple(found.values())

    def _item(self, number: int, held_out: bool, known) -> Item:
        rng = Random(f"{self._settings('documents')}:{'held out' if held_out else 'training'}:{number}")
        for _ in range(DRAWS):
            item = self.draw(rng)
            if item.is_held_out == held_out and item.given not in known:
                return item
        side = "held-out" if held_out else "training"
        raise ValueError(f"task:{self.spelled} has no more than {number} {side} items that differ: make it larger.")

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def spelled(self) -> str:
        """As it is written after ``task:``, every setting named."""
        return self._settings()

    def _settings(self, *but: str) -> str:
        values = (f"{f.name}={str(getattr(self, f.name)).lower()}" for f in fields(self) if f.name not in but)
        return ",".join((self.name, *values))

    def _at_least(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} of the task {self.name} must be an integer of at least {low}, not {value!r}.")


@dataclass(frozen=True)
class Passkey(Task):
    """``length``: most characters of a text; ``digits`` of the key."""

    length: int = 1024
    digits: int = 5

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "digits")
        least = len(HEAD) + len(FILLER) + len(NEEDLE.format(key="0" * self.digits)) + len(QUESTION) + self.digits + 1
        self._at_least(least, "length")

    def draw(self, rng: Random) -> Item:
        key = some("0123456789", self.digits, rng)
        needle, ending = NEEDLE.format(key=key), f"{QUESTION}{key}."
        fillers = (self.length - len(HEAD) - len(needle) - len(ending)) // len(FILLER)
        before = below(fillers + 1, rng)
        text = HEAD + FILLER * before + needle + FILLER * (fillers - before) + ending
        first, source = len(text) - 1 - self.digits, len(HEAD) + len(FILLER) * before + needle.index(key)
        return Item(text, tuple(Answer(first + i, first + i + 1, source + i) for i in range(self.digits)), key)


@dataclass(frozen=True)
class Recall(Task):
    """``pairs`` of a key and a value, of which ``queries`` are asked for."""

    pairs: int = 16
    queries: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "pairs", "queries")
        if not self.queries <= self.pairs <= len(ascii_lowercase) ** 2:
            raise ValueError(
                f"the task recall asks for each of its pairs once, and has 676 keys: queries={self.queries} of "
                f"pairs={self.pairs} cannot be."
            )

    def draw(self, rng: Random) -> Item:
        keys = [a + b for a in ascii_lowercase for b in ascii_lowercase]
        keys = shuffled(keys, self.pairs, rng)
        values = some("0123456789", self.pairs, rng)
        told = " ".join(map("".join, zip(keys, values, strict=True)))
        text, answers = told + "\n", []
        for number, pair in enumerate(shuffled(range(self.pairs), self.queries, rng)):
            text += (" " if number else "") + keys[pair]
            answers.append(Answer(len(text), len(text) + 1, 4 * pair + 2))
            text += values[pair]
        return Item(text, tuple(answers), told)


@dataclass(frozen=True)
class Copy(Task):
    """``symbols``: letters to copy."""

    symbols: int = 16

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "symbols")

    def draw(self, rng: Random) -> Item:
        letters = some(ascii_lowercase, self.symbols, rng)
        first = self.symbols + 1
        answers = tuple(Answer(first + i, first + i + 1, i) for i in range(self.symbols))
        return Item(f"{letters}|{letters}", answers, letters)


@dataclass(frozen=True)
class Addition(Task):
    """Of two numbers of ``digits`` digits; ``steps``: worked before the sum. 12+95 and 95+12 are on the same side."""

    digits: int = 3
    steps: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._at_least(1, "digits")
        if not isinstance(self.steps, bool):
            raise ValueError(f"steps of the task addition must be True or False, not {self.steps!r}.")

    def draw(self, rng: Random) -> Item:
        a, b = (some("0123456789", self.digits, rng) for _ in range(2))
        asked, answer, carried = f"{a}+{b}=", "", 0
        if self.steps:
            for one, other in zip(reversed(a), reversed(b), strict=True):
                total = int(one) + int(other) + carried
                answer += f"{one}+{other}+{carried}={total:02} "
                carried = total // 10
        answer += f"{int(a) + int(b):0{self.digits + 1}}"
        answers = tuple(Answer(len(asked) + i, len(asked) + i + 1) for i in range(len(answer)))
        return Item(asked + answer, answers, "+".join(sorted((a, b))))


TASKS = {kind.__name__.lower(): kind for kind in (Passkey, Recall, Copy, Addition)}


def parse_task(spelled: str, tasks: Mapping[str, type[Task]] = TASKS) -> Task:
    """Reads ``NAME`` or ``NAME,FIELD=VALUE,...``. ``tasks``: those that there are.

    Raises ValueError for a task or a field that there is not, and for a value that cannot be.
    """
    name, *settings = spelled.split(",")
    if name not in tasks:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(tasks)}.")
    kind, given = tasks[name], {}
    kinds = {f.name: f.type for f in fields(kind)}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if field not in kinds or not equals:
            raise ValueError(f"the task {name} has no {setting!r}; it has {', '.join(f'{k}=' for k in kinds)}.")
        known = {"true": True, "false": False} if kinds[field] is bool else None
        try:
            given[field] = int(value) if known is None else known[value]
        except (ValueError, KeyError):
            wanted = "an integer" if known is None else "true or false"
            raise ValueError(f"{field} of the task {name} must be {wanted}, not {value!r}.") from None
    return kind(**given)


def below(n: int, rng: Random) -> int:
    return int(rng.random() * n)


def some(alphabet: str, count: int, rng: Random) -> str:
    return "".join(alphabet[below(len(alphabet), rng)] for _ in range(count))


def shuffled(things, count: int, rng: Random) -> list:
    """``count`` of the things, each once, in random order."""
    left = list(things)
    return [left.pop(below(len(left), rng)) for _ in range(count)]
