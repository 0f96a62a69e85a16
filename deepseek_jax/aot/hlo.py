"""A compiled program's text (HLO) as computations of instructions in the order of the schedule."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Memory spaces of a layout, S(n): the chip's vector memory, and the host's.
HBM, VMEM, HOST = 0, 1, 5

_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "f8e8m0fnu": 8, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\) -> .*)? \{$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"^\s*(ROOT )?%?([^\s=]+) = ")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations|"
                     r"true_computation|false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))")  # fmt: skip
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Array:
    """``dims``: as the program sees them. ``order``: axes from the fastest to the slowest. ``tile``: to multiples of
    which the fastest axes are padded in memory, the last number for the fastest axis."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        return (_BITS[self.dtype] if self.dtype in _BITS else int(re.sub(r"\D", "", self.dtype))) / 8

    @property
    def nbytes(self) -> int:
        """Bytes of the values, padding left out: what a collective sends."""
        return int(self.size * self.itemsize)

    @property
    def stored(self) -> int:
        """Bytes in memory."""
        dims = [self.dims[axis] for axis in self.order] if len(self.order) == len(self.dims) else list(self.dims[::-1])
        for i, tile in enumerate(reversed(self.tile[-len(dims) :] if dims else ())):
            dims[i] = -(-dims[i] // tile) * tile
        return int(math.prod(dims) * self.itemsize)


@dataclass(frozen=True)
class Instruction:
    """``arrays``: of the result, a tuple's one after another. ``operands``: names. ``text``: what follows them."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool
    literal: str

    @cached_property
    def source(self) -> str:
        """The JAX operation that it stems from; empty where there is none."""
        found = _SOURCE.search(self.text)
        return found[1] if found else ""

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Role ("body", "calls", ...) -> names of computations."""
        return {
            role: tuple(name.strip().removeprefix("%") for name in (several or one).split(","))
            for role, several, one in _CALLED.findall(self.text)
        }

    def attribute(self, name: str) -> str | None:
        """The text of ``name=...`` up to the next comma outside braces; None where there is none."""
        match = re.search(rf"(?:^|[ ,]){name}=", self.text)
        return _balanced(self.text, match.end(), ",") if match else None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for name in instruction.operands:
                found.setdefault(name, []).append(instruction)
        return found

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> Iterator[Computation]:
        for names in instruction.called.values():
            yield from (self.computations[name] for name in names if name in self.computations)

    def within(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Every instruction of the computations that an instruction calls, and of those that they call."""
        for computation in self.called(instruction):
            for inner in computation.instructions:
                yield computation, inner
                yield from self.within(inner)

    def trips(self, loop: Instruction, where: Computation) -> int | None:
        """How often a while loop runs; None where the program does not say."""
        known = re.search(r"known_trip_count\D+(\d+)", loop.text)
        if known:
            return int(known[1])
        return self._counted(loop, where)

    def _counted(self, loop: Instruction, where: Computation) -> int | None:
        """The trips of a loop whose condition compares a counter, raised by a constant, with a constant."""
        condition = self.computations[loop.called["condition"][0]]
        body = self.computations[loop.called["body"][0]]
        test, index = _comparison(condition)
        if test is None:
            return None
        limit, below = test
        step = _step(body, index)
        start = _initial(where, loop, index)
        if step is None or start is None or step <= 0:
            return None
        return max(0, -(-(limit + (not below) - start) // step))


def parse(text: str) -> Module:
    """The module of an HLO text, as `compiled.as_text()` and the compilers' dumps write it."""
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, lines = match[2], []
                entry = name if match[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            instructions = (i for i in map(_instruction, lines) if i is not None)
            computations[name], name = Computation(name, tuple(instructions)), None
        elif line.startswith("  "):
            lines.append(line)
        elif lines:
            # An attribute may hold line breaks.
            lines[-1] += line
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation.")
    return Module(computations, computations[entry])


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    shape = _balanced(line, match.end(), " ")
    at = match.end() + len(shape) + 1
    opening = line.index("(", at)
    inside = _balanced(line, opening + 1, ")")
    rest = line[opening + 1 + len(inside) + 1 :]
    names = tuple(re.findall(r"%([\w.\-]+)", inside))
    arrays = tuple(_array(*found) for found in _ARRAY.findall(shape))
    return Instruction(match[2], line[at:opening], arrays, names, rest, bool(match[1]), "" if names else inside)


def _balanced(text: str, start: int, end: str) -> str:
    """``text`` from ``start`` to the first ``end`` outside of brackets."""
    depth, at, quoted = 0, start, False
    while at < len(text):
        c = text[at]
        if c == '"':
            quoted = not quoted
        elif not quoted:
            if depth == 0 and (c == end or c in ")}]"):
                break
            depth += (c in "({[") - (c in ")}]")
        at += 1
    return text[start:at]


def _array(dtype: str, dims: str, layout: str) -> Array:
    order, _, extra = layout.partition(":")
    tile = re.search(r"T\(([\d,*]+)\)", extra)
    space = re.search(r"S\((\d+)\)", extra)
    return Array(
        dtype,
        tuple(int(n) for n in dims.split(",") if n),
        tuple(int(n) for n in order.split(",") if n.isdigit()),
        tuple(int(n) for n in tile[1].split(",") if n.isdigit()) if tile else (),
        int(space[1]) if space else HBM,
    )


# --- Loops whose length follows from their condition ---------------------------------------------------------------


def _through(where: Computation, instruction: Instruction) -> Instruction:
    """What a value is a copy of."""
    while instruction.opcode in ("copy", "bitcast", "convert", "reshape") and instruction.operands:
        instruction = where.by_name[instruction.operands[0]]
    return instruction


def _comparison(condition: Computation) -> tuple[tuple[int, bool] | None, int]:
    """((limit, whether the counter stays below it), index of the counter in the loop's state)."""
    root = _through(condition, condition.root)
    if root.opcode != "compare" or root.attribute("direction") not in ("LT", "LE"):
        return None, 0
    counter, limit = (_through(condition, i) for i in condition.operands(root))
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant" or not limit.literal.isdigit():
        return None, 0
    return (int(limit.literal), root.attribute("direction") == "LT"), int(counter.attribute("index"))


def _step(body: Computation, index: int) -> int | None:
    root = body.root
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    new = _through(body, body.by_name[root.operands[index]])
    if new.opcode != "add":
        return None
    operands = [_through(body, i) for i in body.operands(new)]
    constants = [int(i.literal) for i in operands if i.opcode == "constant" and i.literal.isdigit()]
    counters = [i for i in operands if i.opcode == "get-tuple-element" and int(i.attribute("index")) == index]
    return constants[0] if constants and counters else None


def _initial(where: Computation, loop: Instruction, index: int) -> int | None:
    state = where.by_name[loop.operands[0]]
    if state.opcode != "tuple":
        return None
    value = _through(where, where.by_name[state.operands[index]])
    return int(value.literal) if value.opcode == "constant" and value.literal.isdigit() else None
