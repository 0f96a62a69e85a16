"""A published figure, and how the one that this package states compares with it."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal

from deepseek_jax.analysis.counts import Counts, counts
from deepseek_jax.configs.zoo import zoo

# The length in tokens at which FLOPs a token are published.
CONTEXT = 4096
Number = int | float | Fraction
Verdict = Literal["equal", "rounds to it", "differs"]
# What a unit is worth. Money stands before its number, letters of a thousand directly after it.
UNITS = {
    "": Fraction(1),
    "K": Fraction(10**3),
    "M": Fraction(10**6),
    "B": Fraction(10**9),
    "T": Fraction(10**12),
    "%": Fraction(1, 100),
    "x": Fraction(1),
    "$": Fraction(1),
    "$K": Fraction(10**3),
    "$M": Fraction(10**6),
    "bits": Fraction(1),
    "bytes": Fraction(1),
    "KB": Fraction(10**3),
    "GiB": Fraction(2**30),
    "GFLOPs": Fraction(10**9),
    "TFLOPs": Fraction(10**12),
    "TFLOPs/s": Fraction(10**12),
    "days": Fraction(1),
    "K hours": Fraction(10**3),
    "ms": Fraction(1, 10**3),
    "us": Fraction(1, 10**6),
    "tokens/s": Fraction(1),
    "nodes": Fraction(1),
}
ATTACHED = ("", "K", "M", "B", "T", "%", "x")


@dataclass(frozen=True)
class Figure:
    """A published figure and the same one from our code.

    ``published``: the number as printed, without its ``unit`` (a key of `UNITS`). ``ours``: states it here, in base
    units: elements, bytes, FLOPs, dollars, hours, days, seconds, shares. ``digits``: how many after the point are
    meant, where that is not what is printed (-2: hundreds). ``source``: paper and place; "from" where the paper gives
    the parts and not the figure. ``note``: why the two differ, or what was assumed. ``releases``: those of the zoo
    whose ``summary`` shows it.
    """

    id: str
    name: str
    source: str
    published: str
    unit: str
    ours: Callable[[], Number]
    note: str = ""
    releases: tuple[str, ...] = ()
    digits: int | None = None

    @property
    def place(self) -> int:
        """How many digits after the point the published figure has."""
        return len(self.published.partition(".")[2]) if self.digits is None else self.digits

    @property
    def value(self) -> Fraction:
        """The published figure in base units."""
        return Fraction(self.published.replace(",", "")) * UNITS[self.unit]

    @property
    def published_text(self) -> str:
        return _with_unit(self.published, self.unit)


@dataclass(frozen=True)
class Absent:
    """A published figure that is not stated here: it was measured there. ``on``: what it was measured on."""

    id: str
    name: str
    source: str
    published: str
    on: str


@dataclass(frozen=True)
class Outcome:
    """A figure beside ours. ``ours`` is exact, in base units; ``text``: to two digits more than are published."""

    figure: Figure
    ours: Fraction
    text: str
    verdict: Verdict


def outcome(figure: Figure) -> Outcome:
    """Ours is equal to the published figure, rounds to it (a half rounds up) or differs."""
    ours, scale = Fraction(figure.ours()), UNITS[figure.unit]
    half = scale * Fraction(1, 2) / Fraction(10) ** figure.place
    if ours == figure.value:
        return Outcome(figure, ours, figure.published_text, "equal")
    text = _with_unit(f"{float(ours / scale):,.{max(0, figure.place + 2)}f}", figure.unit)
    return Outcome(figure, ours, text, "rounds to it" if -half <= ours - figure.value < half else "differs")


@cache
def counted(release: str) -> Counts:
    """The counts of a release, FLOPs at `CONTEXT`."""
    return counts(zoo(release), CONTEXT)


def _with_unit(number: str, unit: str) -> str:
    if unit.startswith("$"):
        return f"${number}{unit[1:]}"
    return f"{number}{unit}" if unit in ATTACHED else f"{number} {unit}"
