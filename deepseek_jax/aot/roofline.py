"""Time of a program on a TPU slice, by playing its schedule through: what bounds each operation, what waits for what.

A chip's core runs the scheduled operations one after another. Each takes the longer of its matrix products at
`MATRIX_RATE` of the peak and its bytes at `HBM_RATE` of HBM's bandwidth. Three things go on beside it:

- copies and gathers that were started and not yet waited for take what HBM bandwidth the operations leave over;
- collectives use the slice's links, one collective after another; what is waited for and not yet done is exposed, and
  so is all of a collective that is not started in advance;
- copies to and from the host use its bus, one after another.

Loops run as often as the program says. Those of unknown length are taken not to run: the experts' further rounds,
which balanced routing does not need. Kernels whose rows depend on the routing count the rows of balanced routing.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from deepseek_jax.aot.costs import Cost, Costs, Kernel
from deepseek_jax.aot.hlo import COLLECTIVES, Computation, Instruction, Module
from deepseek_jax.aot.topology import Topology
from deepseek_jax.aot.torus import Torus, axes_of, pairs_of, replica_groups

# What the TPU compiler's own estimates reach of the peaks, for products and for copies that nothing else bounds.
MATRIX_RATE = 0.86
HBM_RATE = 0.85
# A copy that is started and its wait; the names of async operations end so in every form that XLA has.
START, DONE = "-start", "-done"
# Rounds of a loop that are played; the others take as long as the last of them.
PLAYED = 3


@dataclass(frozen=True)
class Transfer:
    """A collective of the program: ``nbytes`` and ``seconds`` of one execution."""

    name: str
    kind: str
    axes: str
    source: str
    nbytes: float
    seconds: float
    started: bool


@dataclass(frozen=True)
class Slice:
    """The slice and the mesh on it. ``coordinates``: of the mesh's devices, in its order. ``sizes``: of its axes."""

    topology: Topology
    coordinates: np.ndarray
    sizes: dict[str, int]

    @property
    def torus(self) -> Torus:
        chip, shape = self.topology.chip, self.topology.shape
        return Torus(shape, tuple(n % chip.ring == 0 for n in shape), chip.link)


@dataclass
class Clock:
    """The state of the simulation: seconds, except ``queued`` and ``drained``, in bytes of HBM beside the core."""

    now: float = 0.0
    links: float = 0.0
    bus: float = 0.0
    queued: float = 0.0
    drained: float = 0.0
    totals: Counter = field(default_factory=Counter)
    jobs: dict[str, tuple[str, float, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A step's time and what it is made of.

    ``seconds``: of the whole. ``matrix``: in which the core multiplies. ``hbm``: more, in which it waits for HBM.
    ``exposed``: collective kind and axes -> more, in which it waits for that. ``host``: in which it waits for the bus.
    ``flops``: matrix FLOPs done. ``hbm_bytes``, ``host_bytes``. ``sent``: collective -> bytes. ``links``: seconds in
    which the links are busy. ``transfers``: collectives, with how often each runs. ``operations``: (seconds, name,
    source) of what takes longest. ``loops``: of unknown length. ``unknown``: kernels of which no FLOPs are known.
    """

    seconds: float
    matrix: float
    hbm: float
    exposed: dict[str, float]
    host: float
    flops: float
    hbm_bytes: float
    host_bytes: float
    sent: dict[str, float]
    links: float
    transfers: tuple[tuple[Transfer, int], ...]
    operations: tuple[tuple[float, str, str], ...]
    loops: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def synchronous(self) -> tuple[tuple[Transfer, int], ...]:
        """The collectives that nothing runs beside."""
        return tuple((t, n) for t, n in self.transfers if not t.started)

    @property
    def binds(self) -> str:
        """What takes most of the time."""
        parts = {"matrix products": self.matrix, "HBM": self.hbm, "the host's bus": self.host}
        parts |= {"collectives": sum(self.exposed.values())}
        return max(parts, key=parts.get)


def estimate(module: Module, kernel: Kernel, on: Slice) -> Estimate:
    """Plays a scheduled program through on a slice; ``kernel``: FLOPs of custom calls, as `costs.Costs` takes it."""
    return _Player(module, kernel, on).play()


class _Player:
    def __init__(self, module: Module, kernel: Kernel, on: Slice):
        self.module, self.on, self.torus = module, on, on.torus
        self.costs = Costs(module, kernel)
        self.chip = on.topology.chip
        self.rate = self.chip.hbm_rate * HBM_RATE
        self.clock = Clock()
        self.transfers: dict[str, Transfer] = {}
        self.sources: dict[str, str] = {}
        self.loops: dict[str, str] = {}
        self.known: dict[tuple[str, str], float] = {}
        self.plans: dict[str, list] = {}

    def play(self) -> Estimate:
        self._run(self.module.entry)
        clock, totals = self.clock, self.clock.totals

        def part(prefix: str) -> dict[str, float]:
            return {name[1]: value for name, value in totals.items() if name[0] == prefix}

        longest = sorted(part("operation").items(), key=lambda item: -item[1])
        return Estimate(
            seconds=clock.now,
            matrix=totals["matrix", ""],
            hbm=totals["hbm", ""],
            exposed=part("exposed"),
            host=totals["host", ""],
            flops=totals["flops", ""],
            hbm_bytes=totals["hbm_bytes", ""],
            host_bytes=totals["host_bytes", ""],
            sent=part("sent"),
            links=totals["links", ""],
            transfers=tuple((t, round(totals["runs", name])) for name, t in self.transfers.items()),
            operations=tuple((seconds, name, self.sources[name]) for name, seconds in longest),
            loops=tuple(self.loops.values()),
            unknown=tuple(f"{name} {source}" for name, source in self.costs.unknown.items()),
        )

    # --- The schedule ---------------------------------------------------------------------------------------------

    def _run(self, computation: Computation) -> None:
        if computation.name not in self.plans:
            self.plans[computation.name] = [s for i in computation.instructions if (s := self._plan(i, computation))]
        for step in self.plans[computation.name]:
            step()

    def _plan(self, instruction: Instruction, where: Computation):
        """What an instruction does when its turn comes; None for nothing."""
        op, name, source = instruction.opcode, instruction.name, instruction.source
        if op == "while":
            return self._loop(instruction, where)
        if op in ("call", "conditional"):
            called = [c for c in self.module.called(instruction)]
            return lambda: self._run(max(called, key=lambda c: len(c.instructions)))
        if op.endswith(DONE) or op == "async-update":
            return (lambda: self._move(instruction)) if op == "async-update" else lambda: self._wait(instruction)
        self.sources[name] = source or name
        transfer = self._transfer(instruction, where)
        if transfer is not None:
            self.transfers[name] = transfer
            cost = self.costs.of(instruction, where) if op == "fusion" else Cost()
            return lambda: self._collective(transfer, cost, op.endswith(START))
        cost = self.costs.of(instruction, where)
        if op.endswith(START):
            return lambda: self._start(name, cost)
        if not cost.passes and not cost.hbm:
            return None
        return lambda: self._compute(name, cost)

    def _loop(self, instruction: Instruction, where: Computation):
        trips = self.module.trips(instruction, where)
        body = self.module.computations[instruction.called["body"][0]]
        if trips is None:
            self.loops[instruction.name] = instruction.source or instruction.name
            return None

        def run():
            for _ in range(min(trips, PLAYED)):
                before = Clock(**{**vars(self.clock), "totals": Counter(self.clock.totals)})
                self._run(body)
            if trips > PLAYED:
                self._repeat(before, trips - PLAYED)

        return run

    def _repeat(self, before: Clock, times: int) -> None:
        """What has happened since ``before``, that many times more."""
        clock = self.clock
        for name in ("queued", "drained"):
            setattr(clock, name, getattr(clock, name) + times * (getattr(clock, name) - getattr(before, name)))
        passed = times * (clock.now - before.now)
        clock.now, clock.links, clock.bus = clock.now + passed, clock.links + passed, clock.bus + passed
        for name, value in clock.totals.items():
            clock.totals[name] += times * (value - before.totals[name])

    # --- What operations take ------------------------------------------------------------------------------------

    def _compute(self, name: str, cost: Cost) -> None:
        matrix = cost.passes / (self.chip.flops * MATRIX_RATE)
        taken = max(matrix, cost.hbm / self.rate)
        self._count(cost)
        self._add("matrix", "", matrix)
        self._add("hbm", "", taken - matrix)
        self._add("operation", name, taken)
        self._pass(taken, cost.hbm)

    def _pass(self, seconds: float, used: float) -> None:
        """Time goes by, of whose HBM bandwidth the core uses ``used`` bytes and copies beside it the rest."""
        clock = self.clock
        clock.now += seconds
        clock.drained += min(max(seconds * self.rate - used, 0.0), clock.queued - clock.drained)

    def _start(self, name: str, cost: Cost) -> None:
        clock = self.clock
        self._count(cost)
        clock.queued += cost.hbm
        if cost.host:
            rate = self.chip.host_rate
            clock.bus = max(clock.now, clock.bus) + cost.host / rate
            clock.jobs[name] = ("bus", clock.bus, "")
        else:
            clock.jobs[name] = ("hbm", clock.queued, "")

    def _collective(self, transfer: Transfer, cost: Cost, started: bool) -> None:
        clock = self.clock
        what = f"{transfer.kind} over {transfer.axes}"
        self._add("sent", what, transfer.nbytes)
        self._add("links", "", transfer.seconds)
        self._add("runs", transfer.name, 1)
        self._add("hbm_bytes", "", 2 * transfer.nbytes)
        clock.queued += 2 * transfer.nbytes
        clock.links = max(clock.now, clock.links) + transfer.seconds
        clock.jobs[transfer.name] = ("links", clock.links, what)
        if cost.passes or cost.hbm:
            self._compute(transfer.name, cost)
        if not started:
            self._until(transfer.name)

    def _wait(self, instruction: Instruction) -> None:
        for name in instruction.operands:
            self._until(name)

    def _move(self, instruction: Instruction) -> None:
        for name in instruction.operands:
            if name in self.clock.jobs:
                self.clock.jobs[instruction.name] = self.clock.jobs.pop(name)
                self.sources.setdefault(instruction.name, self.sources.get(name, name))

    def _until(self, name: str) -> None:
        clock = self.clock
        if name not in clock.jobs:
            return
        where, until, what = clock.jobs.pop(name)
        if where == "hbm":
            seconds = max(0.0, until - clock.drained) / self.rate
        else:
            seconds = max(0.0, until - clock.now)
        if seconds:
            self._add({"hbm": "hbm", "links": "exposed", "bus": "host"}[where], what, seconds)
            self._add("operation", name, seconds)
            self._pass(seconds, 0.0)

    def _count(self, cost: Cost) -> None:
        self._add("flops", "", cost.flops)
        self._add("hbm_bytes", "", cost.hbm)
        self._add("host_bytes", "", cost.host)

    def _add(self, kind: str, name: str, value: float) -> None:
        if value:
            self.clock.totals[kind, name] += value

    # --- Collectives ---------------------------------------------------------------------------------------------

    def _transfer(self, instruction: Instruction, where: Computation) -> Transfer | None:
        """The collective that an instruction is, starts or contains; None for another."""
        kind = instruction.opcode.removesuffix(START)
        if kind in COLLECTIVES:
            place, inner = where, instruction
        elif instruction.opcode in ("async-start", "fusion", "custom-call"):
            found = [(c, i) for c, i in self.module.within(instruction) if i.opcode.removesuffix(START) in COLLECTIVES]
            if not found:
                return None
            place, inner = found[0]
            kind = inner.opcode.removesuffix(START)
        else:
            return None
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
        # Products fused with the collective that brings their operands run beside it.
        started = instruction.opcode.endswith(START) or instruction.opcode == "fusion"
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
