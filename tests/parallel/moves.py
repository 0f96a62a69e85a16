"""What a compiled program moves between devices, read from its text."""

from dataclasses import dataclass

from deepseek_jax.aot.hlo import COLLECTIVES, Array, Module


@dataclass(frozen=True)
class Collective:
    """``kind``: one of `COLLECTIVES`. ``arrays``: of its results. ``loops``: while loops around it. ``source``: the JAX
    operation that it stems from."""

    kind: str
    arrays: tuple[Array, ...]
    loops: int
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes of the results on one device."""
        return sum(a.nbytes for a in self.arrays)


def collectives(module: Module) -> list[Collective]:
    """Every collective of a program, in the text's order."""
    called_by: dict[str, tuple[str, bool]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            for role, names in instruction.called.items():
                for name in names:
                    called_by.setdefault(name, (computation.name, role == "body"))

    def loops(name: str) -> int:
        depth = 0
        while name in called_by:
            name, body = called_by[name]
            depth += body
        return depth

    return [
        Collective(instruction.opcode.removesuffix("-start"), instruction.arrays, loops(where.name), instruction.source)
        for where in module.computations.values()
        for instruction in where.instructions
        if instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]
