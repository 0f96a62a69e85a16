"""Memory of a compiled program from the compiler's dump: what its buffers are, and which live at the peak."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ASSIGNMENT = "after_optimizations-buffer-assignment.txt"
LIVE = "after_optimizations-live-range.txt"
HLO = "after_optimizations.txt"
# The colour of buffers in the host's memory.
HOST = 5

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?:color (\d+), )?page \d+, (.*):$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)( \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_LIVE = re.compile(r"^    (\S+):(\d+)-(\d+)$")
_SOURCE = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"')
_PARAMETER = re.compile(r"^  %?(\S+) = .*? parameter\((\d+)\)", re.MULTILINE)
_ARGUMENT = re.compile(r"parameter (\d+), shape \|([^|]*)\|")
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
    that the program uses. ``live``: temporaries that live at once when most do; their places have gaps between them.
    ``largest``: these, largest first.
    """

    arguments: dict[str, int]
    donated: int
    outputs: int
    temporaries: int
    constants: int
    host: int
    live: int
    largest: tuple[Buffer, ...]

    @property
    def total(self) -> int:
        """What the program needs, its code apart."""
        return sum(self.arguments.values()) + self.outputs + self.temporaries + self.constants

    def live_by_kind(self, stacks: Collection[int]) -> dict[str, int]:
        """Bytes of the temporaries that live at once; ``stacks``: the lengths of the model's runs of equal layers.

        An array over all layers of a run is what the backward pass finds of each of them.
        """
        kinds = dict.fromkeys(("kept activations of all layers", "gradients, weights cast", "at work"), 0)
        for buffer in self.largest:
            dims = _DIMENSIONS.search(buffer.shape)
            first = dims and dims[1].split(",")[0]
            if buffer.like_parameter:
                kinds["gradients, weights cast"] += buffer.nbytes
            elif first and int(first) in stacks:
                kinds["kept activations of all layers"] += buffer.nbytes
            else:
                kinds["at work"] += buffer.nbytes
        return kinds


def read_memory(dump: Path) -> Memory:
    """The memory of the one program in a dump. Raises FileNotFoundError when the dump is not whole."""
    text = dumped(dump, HLO)
    sources = {m[1]: m[2] for line in text.splitlines() if (m := _SOURCE.match(line))}
    names = {m[2]: m[1] for m in _PARAMETER.finditer(text, text.index("\nENTRY "))}
    arguments, sizes, places = _assignment(dumped(dump, ASSIGNMENT))
    parameters = {shape for _, _, shape in arguments if shape.count(",") > 1}
    by_name: Counter = Counter()
    for number, size, _ in arguments:
        by_name[_group(sources.get(names[number], names[number]))] += size

    colocated = defaultdict(list)
    for name, (place, _, phi) in places.items():
        if not phi:
            colocated[place].append(name)
    largest = []
    for name in _live(dumped(dump, LIVE), places):
        place, shape, _ = places[name]
        # What a loop carries has no source of its own: that of what was first put in its place.
        names = (re.sub(r"\{.*\}$", "", n) for n in (name, *colocated[place]))
        source = next((sources[n] for n in names if n in sources), "")
        like = bool(set(_DIMENSIONS.findall(shape)) & parameters)
        largest.append(Buffer(place[1], name, _LAYOUT.sub("", shape), source, like))
    largest.sort(key=lambda buffer: -buffer.nbytes)
    return Memory(dict(by_name), **sizes, live=sum(b.nbytes for b in largest), largest=tuple(largest))


def dumped(dump: Path, name: str) -> str:
    """The text of the dump's file of that name, of the largest program. Raises FileNotFoundError."""
    files = sorted(dump.glob(f"*.{name}"), key=lambda file: file.stat().st_size)
    if not files:
        raise FileNotFoundError(2, "the compiler left no such file", str(dump / name))
    return files[-1].read_text(encoding="utf-8")


def _group(source: str) -> str:
    return ".".join(re.findall(r"\w+", source)[:2])


def _assignment(text: str):
    """Arguments (number, bytes, dimensions); sizes by kind; of temporaries: name -> ((offset, size), shape, phi)."""
    sizes = dict.fromkeys(("donated", "outputs", "temporaries", "constants", "host"), 0)
    arguments, places, kind = [], {}, ""
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            size, kind = int(match[1]), _kind(int(match[2] or 0), match[3])
            if kind in sizes:
                sizes[kind] += size
            elif kind == "argument":
                number, shape = _ARGUMENT.match(match[3]).groups()
                arguments.append((number, size, "".join(_DIMENSIONS.findall(shape)[:1])))
                sizes["donated"] += size * ("maybe-live-out" in match[3])
        elif kind == "temporaries" and (match := _VALUE.match(line)):
            name, phi, nbytes, offset, shape = match.groups()
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


def _live(text: str, places: dict) -> list[str]:
    """The temporaries that live when most of them do, one for each place."""
    spans = defaultdict(list)
    for line in text.splitlines():
        match = _LIVE.match(line)
        name = match and match[1].removesuffix("{}")
        if name in places:
            spans[places[name][0]].append((int(match[2]), int(match[3]), name))
    events: Counter = Counter()
    for (_, nbytes), found in spans.items():
        for start, end in _joined(found):
            events[start] += nbytes
            events[end + 1] -= nbytes
    live, most, peak = 0, 0, 0
    for time, change in sorted(events.items()):
        live += change
        if live > most:
            most, peak = live, time
    return [
        next(name for start, end, name in found if start <= peak <= end)
        for found in spans.values()
        if any(start <= peak <= end for start, end, _ in found)
    ]


def _joined(spans: list[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """Overlapping spans of time as one: a loop's state and what it began as are one buffer."""
    joined: list[tuple[int, int]] = []
    for start, end, _ in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
