"""TPU topologies by name, their devices without the hardware, and the compiler flags that belong to each chip."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass

GIB = 2**30


class TopologyError(ValueError):
    """A topology that is unknown, or whose compiler is not installed."""


@dataclass(frozen=True)
class Chip:
    """One TPU chip, which is one device.

    ``accelerator``: the prefix of Google Cloud's names. ``hbm``: bytes that a program may use. ``flops``: dense
    bfloat16 a second. ``hbm_rate``: bytes a second. ``link``: bytes a second of one ICI link in one direction.
    ``host_rate``: bytes a second from or to the host. ``dims``: of the torus. ``ring``: an axis of a slice whose size
    is a multiple of this closes to a ring, any other is a line. ``cores``: TensorCores of the chip. ``flags``: compiler
    options that are set unless others are given.
    """

    accelerator: str
    hbm: int
    flops: float
    hbm_rate: float
    link: float
    host_rate: float
    dims: int
    ring: int
    cores: int = 1
    flags: tuple[tuple[str, str], ...] = ()


# Without these, parameters are gathered and their gradients scattered between a layer's computations, not beside them.
_ASYNCHRONOUS = (
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", "ENABLED"),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "ENABLED"),
    ("xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", "true"),
    ("xla_enable_async_all_gather", "ENABLED"),
)

# Memory: what libtpu 0.0.52 says is available when a program does not fit. FLOPs and HBM: Google Cloud's documentation
# of TPU v5p, v6e and v5e. It gives ICI as the sum over a chip's links (4800 Gbit/s over 6, 3584 and 1600 over 4), which
# would be 100, 112 and 50 GB/s a link and direction; what Google's "How to Scale Your Model" reckons with, 90, 90 and
# 45, is less and taken here. The host's rates are from there too.
CHIPS = {
    "v5p": Chip("v5p", int(95.73 * GIB), 459e12, 2765e9, 90e9, 16e9, 3, 4, 2, _ASYNCHRONOUS),
    "v6e": Chip("v6e", int(31.24 * GIB), 918e12, 1638e9, 90e9, 32e9, 2, 16, flags=_ASYNCHRONOUS),
    "v5e": Chip("v5litepod", int(15.75 * GIB), 197e12, 819e9, 45e9, 16e9, 2, 16),
}


@dataclass(frozen=True)
class Topology:
    """A slice: ``name`` as given, ``kind`` a key of `CHIPS`, ``shape`` the chips along each axis."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def n_chips(self) -> int:
        return math.prod(self.shape)


def topology(text: str) -> Topology:
    """The slice of a name such as ``v5p:8x8x8``, ``v6e:16x16``, ``v5e:8x8``. Raises TopologyError for another."""
    kind, _, shape = text.partition(":")
    known = kind in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
    sizes = tuple(int(n) for n in shape.split("x")) if known else ()
    if not sizes or len(sizes) != CHIPS[kind].dims:
        raise TopologyError(
            f"{text!r} is no topology: give a chip and its slice's shape, such as v5p:8x8x8, v6e:16x16 or v5e:8x8."
        )
    return Topology(text, kind, sizes)


def check_mesh(sizes: dict[str, int], wanted: Topology) -> None:
    """Raises TopologyError where a mesh's sizes, one of which may be -1, do not make up the chips."""
    fixed = math.prod(n for n in sizes.values() if n != -1)
    left = list(sizes.values()).count(-1)
    if left > 1 or wanted.n_chips % fixed or (not left and fixed != wanted.n_chips):
        described = " x ".join(f"{name}={size}" for name, size in sizes.items()) or "one device"
        raise TopologyError(f"a mesh of {described} does not make up the {wanted.n_chips} chips of {wanted.name}.")


def check_compiler() -> None:
    """Raises TopologyError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError("compiling for TPUs needs libtpu, but no TPU: pip install 'deepseek-jax[compile]'.")


def describe(wanted: Topology) -> list:
    """The slice's devices, on a host without them. Loads libtpu, whose settings are those of the environment: call it
    in a process of its own."""
    import jax

    # Cores, not chips, are what accelerator types count.
    cores = wanted.n_chips * wanted.chip.cores
    # libtpu ends the process for a flag that it does not know, which those of jaxlib's compiler for CPUs may be.
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu_")]
    os.environ.update(
        XLA_FLAGS=" ".join(flags),
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{wanted.chip.accelerator}-{cores}",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(wanted.name, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"libtpu cannot describe {wanted.name}: {str(error).splitlines()[0]}") from None
