"""Rewards that a rule computes: is the answer right, is the form kept, is one language spoken. Loads no JAX.

Every reward is a column of its own, float64 [N] over answers: their sum alone would not say which of them rises.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

THINK, ANSWER = ("<think>", "</think>"), ("<answer>", "</answer>")
TAGS = (*THINK, *ANSWER)
BOXES = ("\\boxed", "\\fbox")
_FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
# ASCII digits: int() would read other scripts' too.
_NUMBER = re.compile(r"[+-]?[0-9]{1,1000}")
LONGEST = 100  # tokens of an expression


def parts(text: str, opened: bool = False) -> tuple[str, str] | None:
    """What is thought and what is answered, of a text that is one ``<think>...</think>`` and then one
    ``<answer>...</answer>``, whitespace around them, and nothing else: a tag more or less, or text outside, is None.
    ``opened``: the prompt ends with ``<think>``, so that the text begins inside."""
    text = THINK[0] + text if opened else text
    found = _FORM.fullmatch(text)
    if found is None or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return found[1], found[2]


def format_reward(text: str, opened: bool = False) -> float:
    """1 where `parts` finds them, else 0 (R1 2501.12948 §2.2.2)."""
    return float(parts(text, opened) is not None)


def answer_of(text: str, opened: bool = False) -> str | None:
    """What stands in ``<answer>``, of a text in `parts`' form only: what a text says elsewhere is not its answer."""
    found = parts(text, opened)
    return None if found is None else found[1].strip()


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` or ``\fbox{...}`` holds, braces inside balanced; None without one, and where the
    last is not closed."""
    start = max(text.rfind(box) for box in BOXES)
    if start < 0:
        return None
    opening = re.match(r"\\(?:boxed|fbox)\s*\{", text[start:])
    if opening is None:
        return None
    depth, first = 1, start + opening.end()
    escaped = False
    for at in range(first, len(text)):
        character = text[at]
        depth += 0 if escaped else (character == "{") - (character == "}")
        escaped = character == "\\" and not escaped
        if depth == 0:
            return text[first:at].strip()
    return None


def same_integer(answer: str | None, gold: int) -> float:
    """1 where an answer is that integer, written in digits with or without zeros before it; else 0."""
    return float(answer is not None and _NUMBER.fullmatch(answer.strip()) is not None and int(answer) == gold)


def correct_prefix(answer: str | None, gold: str) -> float:
    """The share of ``gold`` that the answer begins with: a reward that rises before an answer is right."""
    if answer is None:
        return 0.0
    same = next((i for i, (a, b) in enumerate(zip(answer, gold, strict=False)) if a != b), min(len(answer), len(gold)))
    return same / max(len(gold), len(answer), 1)


def value_of(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression of integers, ``+ - * /`` and parentheses, and the integers in it, in order; None
    for anything else, a division by zero and more than `LONGEST` tokens too."""
    tokens = re.findall(r"[0-9]+|\S", expression)
    if len(tokens) > LONGEST:
        return None
    numbers: list[int] = []
    try:
        value = _sum(tokens, numbers)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return None if tokens else (value, numbers)


def _sum(tokens: list[str], numbers: list[int]) -> Fraction:
    value = _product(tokens, numbers)
    while tokens and tokens[0] in "+-":
        value += _product(tokens, numbers) if tokens.pop(0) == "+" else -_product(tokens, numbers)
    return value


def _product(tokens: list[str], numbers: list[int]) -> Fraction:
    value = _atom(tokens, numbers)
    while tokens and tokens[0] in "*/":
        value = value * _atom(tokens, numbers) if tokens.pop(0) == "*" else value / _atom(tokens, numbers)
    return value


def _atom(tokens: list[str], numbers: list[int]) -> Fraction:
    token = tokens.pop(0)
    if token == "(":
        value = _sum(tokens, numbers)
        if tokens.pop(0) != ")":
            raise ValueError(token)
        return value
    if not re.fullmatch(r"[0-9]{1,30}", token):
        raise ValueError(token)
    numbers.append(int(token))
    return Fraction(int(token))


@dataclass(frozen=True)
class Language:
    """What letters a language has: an ``alphabet``, or a ``script`` by the beginning of its letters' Unicode names
    ("LATIN", "CJK"). ``unspaced``: each of its letters is a word."""

    alphabet: str = ""
    script: str = ""
    unspaced: bool = False

    def __post_init__(self):
        if bool(self.alphabet) == bool(self.script):
            raise ValueError(f"Language({self.alphabet!r}, {self.script!r}): give an alphabet or a script.")

    def has(self, letter: str) -> bool:
        return letter in self.alphabet if self.alphabet else unicodedata.name(letter, "").startswith(self.script)


ENGLISH, CHINESE = Language(script="LATIN"), Language(script="CJK", unspaced=True)


def language_consistency(thought: str, target: Language, others: tuple[Language, ...]) -> float:
    """The share of words in the target language (R1 §2.3.2), of the words that have a letter of any of them; 0 where
    there are none. A word with letters of two languages is not the target's."""
    languages, mine, all_ = (target, *others), 0, 0
    for chunk in thought.split():
        of_chunk = [next((i for i, language in enumerate(languages) if language.has(c)), None) for c in chunk]
        spaced = {i for i in of_chunk if i is not None and not languages[i].unspaced}
        single = [i for i in of_chunk if i is not None and languages[i].unspaced]
        all_ += bool(spaced) + len(single)
        mine += (spaced == {0}) + single.count(0)
    return mine / all_ if all_ else 0.0


def total(columns: Mapping[str, np.ndarray], weights: Mapping[str, float] | None = None) -> np.ndarray:
    """float64 [N]: the columns' weighted sum, by default with weights of 1, as R1 adds its rewards. NaN, a reward that
    could not be computed, stays NaN. Normalised is the sum, once, by `advantage.advantages`.

    Raises ValueError for weights of other names.
    """
    weights = dict.fromkeys(columns, 1.0) if weights is None else weights
    if set(weights) != set(columns):
        raise ValueError(f"weights of {sorted(weights)} for the rewards {sorted(columns)}: give one for each.")
    return sum(weights[name] * np.asarray(column, np.float64) for name, column in columns.items())
