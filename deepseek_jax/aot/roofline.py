"""Time of a program on a TPU slice, by playing its schedule through: what bounds each operation, what waits for what.

A chip's core runs the scheduled operations one after another. Each takes the longer of its matrix products at
`MATRIX_RATE` of the peak and its bytes at `HBM_RATE` of HBM's bandwidth; grouped matmul and attention kernels take what
measurements of them say (`aot.rates`). Three things go on beside it:

- copies and gathers that were started and not yet waited for take what HBM bandwidth the operations leave over;
- collectives use the slice's links, one collective after another; what is waited for and not yet done is exposed, and
  so is all of a collective that is not started in advance;
- copies to and from the host use its bus, one after another.

Loops run as often as the program says, or where the data decides it as the caller says. Kernels whose rows depend on
the routing count the rows of balanced routing.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from deepseek_jax.aot.costs import Cost, Costs, Kernel
from deepseek_jax.aot.estimates import Estimate, Slice, Transfer
from deepseek_jax.aot.hlo import Computation, Instruction, Module
from deepseek_jax.aot.kernels import Timed
from deepseek_jax.aot.links import START, Links

# What the TPU compiler's own estimates reach of the peaks, for products and for copies that nothing else bounds.
MATRIX_RATE = 0.86
HBM_RATE = 0.85
# The wait for what was started; the names of async operations end so in every form that XLA has.
DONE = "-done"
# Rounds of a loop that are played; the others take as long as the last of them.
PLAYED = 3


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


# (source, number among such loops of a computation) -> how often a loop runs whose length the data decides.
Trips = Callable[[str, int], int]


def estimate(module: Module, kernel: Kernel, on: Slice, trips: Trips = lambda source, number: 0) -> Estimate:
    """Plays a scheduled program through on a slice.

    ``kernel``: FLOPs of custom calls, as `costs.Costs` takes it. ``trips``: of loops whose length the data decides.
    """
    return _Player(module, kernel, on, trips).play()


class _Player:
    def __init__(self, module: Module, kernel: Kernel, on: Slice, trips: Trips):
        self.module, self.trips = module, trips
        self.links = Links(module, on)
        self.costs = Costs(module, kernel)
        self.chip = on.topology.chip
        self.rate = self.chip.hbm_rate * HBM_RATE
        self.clock = Clock()
        self.transfers: dict[str, Transfer] = {}
        self.timed: dict[str, Timed] = {}
        self.sources: dict[str, str] = {}
        self.loops: dict[str, str] = {}
        self.plans: dict[str, list] = {}
        self.spread: set[str] = set()
        self.undecided: Counter = Counter()

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
            kernels=tuple((call, round(totals["runs", name])) for name, call in self.timed.items()),
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
            called = list(self.module.called(instruction))
            return lambda: self._run(max(called, key=lambda c: len(c.instructions)))
        if op.endswith(DONE) or op == "async-update":
            return (lambda: self._move(instruction)) if op == "async-update" else lambda: self._wait(instruction)
        self.sources[name] = source or name
        inner = self.links.collective(instruction, where)
        if inner is not None:
            return self._collective_plan(instruction, where, *inner)
        cost = self.costs.of(instruction, where)
        if op.endswith(START):
            return lambda: self._start(name, cost)
        if cost.host:
            return lambda: (self._start(name, cost), self._until(name))
        if not cost.passes and not cost.hbm and cost.timed is None:
            return None
        if cost.timed is not None:
            self.timed[name] = cost.timed
        return lambda: self._compute(name, cost)

    def _collective_plan(self, instruction: Instruction, where: Computation, place: Computation, inner: Instruction):
        """A collective by itself, started, or fused with products that run beside it.

        Some compilers spread one over several fusions: a first, which starts it, others with a part of it each, and a
        last, which waits; some of them may stand in a loop between the two.
        """
        fused = instruction.opcode == "fusion"
        cost = self.costs.of(instruction, where) if fused else Cost()
        targets = {i.attribute("custom_call_target") for _, i in self.module.within(instruction)} if fused else set()
        job = f"channel {inner.attribute('channel_id')}"
        if '"AsyncCollectiveDone"' in targets:
            return lambda: self._until(job)
        if fused and job in self.spread:
            return lambda: self._compute(instruction.name, cost)
        starts = instruction.opcode.endswith(START) or '"AsyncCollectiveStart"' in targets
        if fused and starts:
            self.spread.add(job)
            self.sources[job] = instruction.source or inner.source
        else:
            job = instruction.name
        transfer = self.links.transfer(instruction, place, inner, starts or fused)
        self.transfers[job] = transfer
        return lambda: self._collective(job, transfer, cost, starts)

    def _loop(self, instruction: Instruction, where: Computation):
        trips = self.module.trips(instruction, where)
        body = self.module.computations[instruction.called["body"][0]]
        if trips is None:
            source = instruction.source or instruction.name
            trips = self.trips(source, self.undecided[where.name])
            self.undecided[where.name] += 1
            if not trips:
                self.loops[instruction.name] = source
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
        if cost.timed is not None:
            matrix += cost.timed.seconds
            self._add("runs", name, 1)
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

    def _collective(self, job: str, transfer: Transfer, cost: Cost, started: bool) -> None:
        clock = self.clock
        what = f"{transfer.kind} over {transfer.axes}"
        self._add("sent", what, transfer.nbytes)
        self._add("links", "", transfer.seconds)
        self._add("runs", job, 1)
        self._add("hbm_bytes", "", 2 * transfer.nbytes)
        clock.queued += 2 * transfer.nbytes
        clock.links = max(clock.now, clock.links) + transfer.seconds
        clock.jobs[job] = ("links", clock.links, what)
        if cost.passes or cost.hbm:
            self._compute(transfer.name, cost)
        if not started:
            self._until(job)

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
