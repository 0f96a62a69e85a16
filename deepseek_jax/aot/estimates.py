"""What `aot.roofline` finds: an estimate of a program's time, on what slice, and what moves over its links."""

from dataclasses import dataclass

import numpy as np

from deepseek_jax.aot.kernels import Timed
from deepseek_jax.aot.topology import Topology
from deepseek_jax.aot.torus import Torus


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


@dataclass(frozen=True)
class Estimate:
    """A step's time and what it is made of.

    ``seconds``: of the whole. ``matrix``: in which the core multiplies. ``hbm``: more, in which it waits for HBM.
    ``exposed``: collective kind and axes -> more, in which it waits for that. ``host``: in which it waits for the bus.
    ``flops``: matrix FLOPs done. ``hbm_bytes``, ``host_bytes``. ``sent``: collective -> bytes. ``links``: seconds in
    which the links are busy. ``transfers``: collectives, with how often each runs. ``kernels``: calls at a measured
    rate, likewise. ``operations``: (seconds, name, source) of what takes longest. ``loops``: those that were taken not
    to run. ``unknown``: kernels of which no FLOPs are known.
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
    kernels: tuple[tuple[Timed, int], ...]
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
