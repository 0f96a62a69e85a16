"""The collectives of a program: what each moves, between whom, and how long it takes the slice's links alone."""

import re

import numpy as np

from deepseek_jax.aot.estimates import Slice, Transfer
from deepseek_jax.aot.hlo import COLLECTIVES, Computation, Instruction, Module
from deepseek_jax.aot.torus import axes_of, pairs_of, replica_groups

# The names of async operations begin so in every form that XLA has.
START = "-start"


class Links:
    """The links of a slice, asked about the collectives of a module."""

    def __init__(self, module: Module, on: Slice):
        self.module, self.on, self.torus = module, on, on.torus
        self.known: dict[tuple[str, bytes], tuple[float, float]] = {}

    def collective(self, instruction: Instruction, where: Computation) -> tuple[Computation, Instruction] | None:
        """The collective that an instruction is, starts or contains, and where that stands; None for another."""
        if instruction.opcode.removesuffix(START) in COLLECTIVES:
            return where, instruction
        if instruction.opcode not in ("async-start", "fusion", "custom-call"):
            return None
        within = self.module.within(instruction)
        return next(((c, i) for c, i in within if i.opcode.removesuffix(START) in COLLECTIVES), None)

    def transfer(self, instruction: Instruction, place: Computation, inner: Instruction, started: bool) -> Transfer:
        kind = inner.opcode.removesuffix(START)
        taken = [a for i in place.operands(inner) for a in i.arrays]
        if kind == "all-gather":
            # Started, the result is a tuple of operands and results.
            results = inner.arrays[len(taken) :] if inner.opcode.endswith(START) else inner.arrays
            nbytes = sum(a.nbytes for a in results)
        elif kind == "ragged-all-to-all":
            # One side's array is a buffer that balanced routing does not fill.
            nbytes = min(taken[0].nbytes, taken[1].nbytes)
        else:
            nbytes = sum(a.nbytes for a in taken)
        groups, axes = self._groups(inner, kind)
        seconds = self._seconds(kind, groups, nbytes)
        source = instruction.source or inner.source
        return Transfer(instruction.name, kind, axes, source, nbytes, seconds, started)

    def _groups(self, instruction: Instruction, kind: str) -> tuple[np.ndarray, str]:
        if kind == "collective-permute":
            pairs = np.array(pairs_of(instruction.attribute("source_target_pairs") or ""))
            return pairs, axes_of(pairs[:1], self.on.sizes)
        groups = replica_groups(_group_text(instruction.text), len(self.on.coordinates))
        return groups, axes_of(groups, self.on.sizes)

    def _seconds(self, kind: str, groups: np.ndarray, nbytes: float) -> float:
        """From two sizes, for the time is a constant and a part in proportion to the bytes."""
        key = kind, groups.tobytes()
        if key not in self.known:
            places = self.on.coordinates[groups]
            none, some = (self.torus.seconds(kind, places, n) for n in (0.0, 1e9))
            self.known[key] = none, (some - none) / 1e9
        constant, slope = self.known[key]
        return constant + slope * nbytes


def _group_text(text: str) -> str:
    """The value of ``replica_groups``, which may hold commas and spaces outside of brackets."""
    match = re.search(r"replica_groups=(mesh\[.*?\](?:,? ?device_ids=\([^)]*\)+)? *\{[^}]*\}|\[[\d,]*\]<=\[[\d,]*\]"
                      r"(?:T\([\d,]*\))?|\{\{.*?\}\}|\{\})", text)  # fmt: skip
    if match is None:
        raise ValueError(f"no replica_groups are known in {text[:120]!r}.")
    return match[1]
