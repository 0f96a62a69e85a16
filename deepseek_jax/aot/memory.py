"""Memory of a compiled program from the compiler's dump: what its buffers are, and which live at the peak."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

ASSIGNMENT = "after_optimizations-buffer-assignment.txt"
LIVE = "after_optimizations-live-range.txt"
HLO = "after_optimizations.txt"
# The colour of buffers in the host's memory.
HOST = 5

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?:color (\d+), )?page \d+, (.*):$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)( \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_LIVE = re.compile(r"^    (\S+): (\d+) bytes")
_SOURCE = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"')
_DIMENSIONS = re.compile(r"\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Buffer:
    """``name``: the compiler's. ``shape``: dtype and dimensions. ``source``: the JAX operation that it stems from.
    ``like_parameter``: it has an argument's dimensions, as gradients and parameters in another dtype have."""

    nbytes: int
    name: str
    shape: str
    source: str
    like_parameter: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's HBM.

    ``arguments``: by the argument's name down to its first two parts, such as ``state.opt_state``. ``donated``: of
    the arguments, those whose place outputs take. ``outputs``: the other outputs. ``host``: bytes of the host's memory
    that the program uses. ``peak``: what is used at once, without gaps between buffers. ``largest``: temporaries that
    live then, largest first.
    """

    arguments: dict[str, int]
    donated: int
    outputs: int
    temporaries: int
    constants: int
    host: int
    peak: int
    largest: tuple[Buffer, ...]

    @property
    def total(self) -> int:
        """What the program needs, its code apart."""
        return sum(self.arguments.values()) + self.outputs + self.temporaries + self.constants


def read_memory(dump: Path) -> Memory:
    """The memory of the one program in a dump. Raises FileNotFoundError when the dump is not whole."""
    sources = {m[1]: m[2] for line in dumped(dump, HLO).splitlines() if (m := _SOURCE.match(line))}
    arguments, sizes, places = _assignment(dumped(dump, ASSIGNMENT))
    live = _live(dumped(dump, LIVE))
    parameters = {shape for _, _, shape in arguments if shape.count(",") > 1}
    by_name: Counter = Counter()
    for name, size, _ in arguments:
        by_name[_group(sources.get(name, name))] += size

    colocated = defaultdict(list)
    for name, (place, _, phi) in places.items():
        if not phi:
            colocated[place].append(name)
    largest, seen = [], set()
    for name, nbytes in sorted(live.items(), key=lambda item: -item[1]):
        place, shape, _ = places.get(name, (None, "", False))
        if place is None or place in seen:
            continue
        seen.add(place)
        # What a loop carries has no source of its own: that of what was first put in its place.
        names = (re.sub(r"\{.*\}$", "", n) for n in (name, *colocated[place]))
        source = next((sources[n] for n in names if n in sources), "")
        like = bool(set(_DIMENSIONS.findall(shape)) & parameters)
        largest.append(Buffer(nbytes, name, _LAYOUT.sub("", shape), source, like))
    return Memory(dict(by_name), **sizes, peak=sum(live.values()), largest=tuple(largest))


def dumped(dump: Path, name: str) -> str:
    """The text of the dump's file of that name, of the largest program. Raises FileNotFoundError."""
    files = sorted(dump.glob(f"*.{name}"), key=lambda file: file.stat().st_size)
    if not files:
        raise FileNotFoundError(2, "the compiler left no such file", str(dump / name))
    return files[-1].read_text(encoding="utf-8")


def _group(source: str) -> str:
    return ".".join(re.split(r"[.\[]", source)[:2])


def _assignment(text: str):
    """Arguments (name, bytes, dimensions); sizes by kind; of temporaries: name -> ((offset, size), shape, phi)."""
    sizes = dict.fromkeys(("donated", "outputs", "temporaries", "constants", "host"), 0)
    arguments, places, size, kind = [], {}, 0, ""
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            size, kind = int(match[1]), _kind(int(match[2] or 0), match[3])
            if kind in sizes:
                sizes[kind] += size
            sizes["donated"] += size * (kind == "argument" and "maybe-live-out" in match[3])
        elif match := _VALUE.match(line):
            name, phi, nbytes, offset, shape = match.groups()
            if kind == "argument":
                arguments.append((name, size, "".join(_DIMENSIONS.findall(shape)[:1])))
                kind = "argument's further values"
            elif kind == "temporaries":
                places[name.removesuffix("{}")] = ((int(offset), int(nbytes)), shape, bool(phi))
    return arguments, sizes, places


def _kind(color: int, what: str) -> str:
    if "thread-local" in what or color not in (0, HOST):
        return ""
    if color == HOST:
        return "host"
    if what.startswith("parameter"):
        return "argument"
    if "maybe-live-out" in what:
        return "outputs"
    return "temporaries" if what.startswith("preallocated-temp") else "constants"


def _live(text: str) -> dict[str, int]:
    """Name -> bytes of what lives at the peak."""
    found, inside = {}, False
    for line in text.splitlines():
        match = _LIVE.match(line) if inside else None
        if match:
            found[match[1].removesuffix("{}")] = int(match[2])
        elif inside:
            break
        inside = inside or line.startswith("  Live ranges at")
    return found
