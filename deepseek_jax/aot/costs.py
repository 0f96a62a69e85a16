"""What one instruction of a scheduled program does: matrix FLOPs, bytes of HBM, bytes to and from the host.

Only multiplications on the matrix unit count as FLOPs; all else is taken to be bound by memory. A multiplication and
an addition are two.
"""

import math
import re
from dataclasses import dataclass, field

import numpy as np

from deepseek_jax.aot.hlo import COLLECTIVES, HBM, HOST, Array, Computation, Instruction, Module
from deepseek_jax.aot.kernels import Kernel, Timed

# Passes of bfloat16 products that a float32 product of that precision takes.
PASSES = {"highest": 6, "high": 3}
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "iota", "add-dependency",
}  # fmt: skip
# Copies between memories, and results of them; they are counted where they start.
WAITS = {"copy-done", "async-done", "async-update", "all-gather-done", "all-reduce-done", "collective-permute-done"}
SLICES = {"dynamic-slice", "slice", "gather"}
# Done in place, with the number of the operand that is new.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
FORMS = {"bitcast", "convert", "copy", "reshape", "transpose"}
# What a fusion hands through, and collectives within one: their bytes are those of the links.
PASSED = {"tuple", *COLLECTIVES}
# Calls into the compiler that move nothing.
MARKERS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "Sharding", "ConcatBitcast",
    "AsyncCollectiveStart", "AsyncCollectiveDone",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """``flops``: on the matrix unit. ``passes``: the same with each product as often as its precision needs, without
    the kernel ``timed``. ``read``, ``written``: bytes of HBM. ``host``: bytes that cross to or from the host."""

    flops: float = 0.0
    passes: float = 0.0
    read: int = 0
    written: int = 0
    host: int = 0
    timed: Timed | None = None

    @property
    def hbm(self) -> int:
        return self.read + self.written


@dataclass
class Costs:
    """Costs of a module's instructions. ``kernel``: FLOPs of a custom call from its operands, or the call with its
    time; None where it is unknown.

    ``unknown``: custom calls of which nothing says what they compute, name -> source.
    """

    module: Module
    kernel: Kernel
    unknown: dict[str, str] = field(default_factory=dict)

    def of(self, instruction: Instruction, where: Computation) -> Cost:
        """The cost of an instruction that runs by itself or, started, beside others; loops and calls are not."""
        op = instruction.opcode
        if op in FREE or op in WAITS or instruction.attribute("custom_call_target") in _quoted(MARKERS):
            return Cost()
        flops, passes, timed = self._flops(instruction, where)
        if op == "copy-start":
            return self._copied(instruction.arrays[1], instruction.arrays[0])
        if op == "copy":
            return self._copied(where.operands(instruction)[0].arrays[0], instruction.arrays[0])
        read = sum(self._read(instruction, index, where) for index in range(len(instruction.operands)))
        return Cost(flops, passes, read, self._written(instruction, where), self._host(instruction, where), timed)

    @staticmethod
    def _copied(source: Array, target: Array) -> Cost:
        if HOST in (source.space, target.space):
            return Cost(read=_in_hbm(source), written=_in_hbm(target), host=source.stored)
        return Cost(read=_in_hbm(source), written=_in_hbm(target))

    def _host(self, instruction: Instruction, where: Computation) -> int:
        """Bytes that cross the bus: of arrays in the host's memory what is cut out or written anew."""
        if instruction.opcode == "async-start":
            inner = next(iter(self.module.called(instruction)))
            return self._host(inner.root, inner)
        operands = where.operands(instruction)
        there = [any(a.space == HOST for a in i.arrays) for i in (*operands[:1], instruction)]
        if instruction.opcode in UPDATES and there[-1]:
            moved = operands[UPDATES[instruction.opcode]]
        elif instruction.opcode in SLICES and there[0] and not there[-1]:
            moved = instruction
        else:
            return 0
        return sum(a.stored for a in moved.arrays)

    # --- FLOPs --------------------------------------------------------------------------------------------------

    def _flops(self, instruction: Instruction, where: Computation) -> tuple[float, float, Timed | None]:
        total, passes, timed = 0.0, 0.0, None
        for place, inner in [(where, instruction), *self.module.within(instruction)]:
            if inner.opcode not in ("dot", "convolution", "custom-call", "ragged-dot"):
                continue
            flops = self._product(inner, place)
            if isinstance(flops, Timed):
                total, timed = total + flops.flops, flops
                continue
            precision = re.findall(r"highest|high", inner.attribute("operand_precision") or "")
            total += flops
            passes += flops * max((PASSES[p] for p in precision), default=1)
        return total, passes, timed

    def _product(self, instruction: Instruction, where: Computation) -> float | Timed:
        operands = [a for i in where.operands(instruction) for a in i.arrays]
        if instruction.opcode == "dot":
            contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
            return 2.0 * instruction.arrays[0].size * math.prod(operands[0].dims[int(d)] for d in contracted)
        if instruction.opcode == "convolution":
            return convolution_flops(instruction, *operands[:2])
        if instruction.opcode == "ragged-dot":
            # Each row meets one group's matrix.
            return 2.0 * operands[0].size * instruction.arrays[0].dims[-1]
        if (
            instruction.attribute("custom_call_target") in _quoted(MARKERS)
            or "called_computations" in instruction.called
        ):
            return 0.0
        flops = self.kernel(instruction, operands)
        if flops is None:
            self.unknown[instruction.name] = instruction.source
        return flops or 0.0

    # --- Bytes --------------------------------------------------------------------------------------------------

    def _read(self, instruction: Instruction, index: int, where: Computation) -> int:
        """Bytes of HBM that an instruction reads of one operand: of slices only what is cut out."""
        operand = where.by_name.get(instruction.operands[index])
        if operand is None:
            return 0
        if instruction.opcode in SLICES:
            return _stored_like(operand, instruction) if index == 0 else 0
        if instruction.opcode in UPDATES:
            return _stored_like(operand, operand) if index == UPDATES[instruction.opcode] else 0
        inner = [c for c in self.module.called(instruction) if index in c.parameters]
        if instruction.opcode not in ("fusion", "async-start") or not inner:
            return sum(map(_in_hbm, operand.arrays))
        if not any(a.space == HBM for a in operand.arrays):
            return 0
        return min(sum(map(_in_hbm, operand.arrays)), self._used(inner[0], inner[0].parameters[index].name))

    def _used(self, where: Computation, name: str) -> int:
        """Bytes of a fusion's parameter that its computation uses."""
        whole, total = where.by_name[name], 0
        if whole.root and whole.opcode != "parameter":
            return sum(a.stored for a in whole.arrays)
        for user in where.users.get(name, []):
            indices = [i for i, operand in enumerate(user.operands) if operand == name]
            if self._unchanged(user):
                # What is cut out of a converted array is converted alone.
                share = self._used(where, user.name) / max(1, sum(a.stored for a in user.arrays))
                total += round(share * sum(a.stored for a in whole.arrays))
            elif user.opcode in SLICES and indices == [0]:
                total += _stored_like(whole, user)
            elif (user.opcode in UPDATES and indices == [0]) or user.opcode in PASSED:
                continue
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called["calls"][0]]
                total += sum(self._used(inner, inner.parameters[i].name) for i in indices)
            else:
                return sum(a.stored for a in whole.arrays)
        return min(total, sum(a.stored for a in whole.arrays))

    def _unchanged(self, instruction: Instruction) -> bool:
        """Whether an instruction of a fusion gives its one operand in another form."""
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called["calls"][0]]
            return len(inner.parameters) == 1 and all(
                i.opcode in FORMS or i.opcode == "parameter" for i in inner.instructions
            )
        return instruction.opcode in FORMS

    def _written(self, instruction: Instruction, where: Computation) -> int:
        """Bytes of HBM that an instruction writes: of updates in place only what is new."""
        if instruction.opcode in UPDATES:
            return _stored_like(instruction, where.by_name[instruction.operands[UPDATES[instruction.opcode]]])
        if instruction.opcode == "async-start":
            inner = next(iter(self.module.called(instruction)))
            return self._written(inner.root, inner)
        if instruction.opcode != "fusion":
            return sum(map(_in_hbm, instruction.arrays))
        inner = self.module.computations[instruction.called["calls"][0]]
        roots = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
        if len(roots) != len(instruction.arrays):
            return sum(map(_in_hbm, instruction.arrays))
        return sum(self._new(inner, root) for root, a in zip(roots, instruction.arrays, strict=True) if a.space == HBM)

    def _new(self, where: Computation, root: Instruction) -> int:
        while root.opcode == "bitcast":
            root = where.by_name[root.operands[0]]
        if root.opcode in PASSED or root.opcode == "parameter":
            return 0
        if root.opcode in UPDATES:
            return _stored_like(root, where.by_name[root.operands[UPDATES[root.opcode]]])
        if root.opcode == "fusion":
            inner = self.module.computations[root.called["calls"][0]]
            if inner.root.opcode != "tuple":
                return self._new(inner, inner.root)
        return sum(a.stored for a in root.arrays)


def _quoted(names: set[str]) -> set[str]:
    return {f'"{name}"' for name in names}


def _in_hbm(a: Array) -> int:
    return a.stored if a.space == HBM else 0


def _stored_like(whole: Instruction, part: Instruction) -> int:
    """Bytes of HBM of a part, where the whole lies there."""
    return sum(a.stored for a in part.arrays) if whole.arrays and whole.arrays[0].space == HBM else 0


def convolution_flops(instruction: Instruction, lhs: Array, rhs: Array) -> float:
    """FLOPs of a convolution: products with padding and with the holes of dilation are not made.

    The TPU compiler writes every matrix product as one, batches among the spatial axes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    in_labels, kernel_labels, out_labels = labels.groups()
    window = _window(instruction.attribute("window") or "")
    out, pairs = instruction.arrays[0], 1
    spatial = sorted(c for c in kernel_labels if c.isdigit())
    for c in spatial:
        axis = int(c)
        size_in, size_out = lhs.dims[in_labels.index(c)], out.dims[out_labels.index(c)]
        pairs *= _meetings(size_in, size_out, rhs.dims[kernel_labels.index(c)], *(w[axis] for w in window))
    inputs = rhs.dims[kernel_labels.index("i")]
    batch = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * pairs * inputs * out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")] / batch


def _window(text: str) -> list["_Numbers"]:
    """Stride, padding in front, dilation of the input and of the kernel along the spatial axes."""

    def numbers(name: str, default: int) -> _Numbers:
        found = re.search(rf"\b{name}=([\d_x\-]+)", text)
        return _Numbers(default, [int(n.split("_")[0]) for n in found[1].split("x")] if found else [])

    return [numbers("stride", 1), numbers("pad", 0), numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)]


class _Numbers:
    def __init__(self, default: int, given: list[int]):
        self.default, self.given = default, given

    def __getitem__(self, axis: int) -> int:
        return self.given[axis] if axis < len(self.given) else self.default


def _meetings(size_in: int, size_out: int, kernel: int, stride: int, pad: int, dilated: int, spread: int) -> int:
    """How many pairs of a kernel's place and an output's meet an input."""
    at = np.arange(size_out)[:, None] * stride + np.arange(kernel)[None, :] * spread - pad
    return int(((at >= 0) & (at < (size_in - 1) * dilated + 1) & (at % dilated == 0)).sum())
