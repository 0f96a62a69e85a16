"""Several processes that run one program: how they find each other, and what they agree on.

Every process makes the same calls in the same order. The first one (index 0) alone writes files and speaks.
"""

import itertools
import json
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Of all processes for one: tokenising a large text takes hours.
PATIENCE_SECONDS = 7 * 24 * 3600
# At its end a process waits so long for the others; after an error they may be stuck in a collective.
SHUTDOWN_SECONDS = 60
# A text is sent in a power of two of bytes, from this on, so that few programs are compiled.
FEWEST_BYTES = 4096
# Launchers whose tasks JAX finds by itself, by the variables that count them.
LAUNCHERS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")

T = TypeVar("T")
_numbers = itertools.count()


class ProcessError(ValueError):
    """What another process failed at, or processes that do not find each other."""


def join(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several, before anything else touches a device; does nothing where it is alone.

    ``coordinator``: HOST:PORT at which process 0 listens; "auto" for whatever cluster `jax.distributed` detects;
    "none" to stay alone. None: JAX_COORDINATOR_ADDRESS, else "auto" under Slurm or Open MPI with several tasks and on
    machines with TPUs, else alone. ``processes``, ``index``: how many there are, and which one this is, from 0; None:
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, else what is detected.

    Raises ProcessError for settings that do not make up a cluster, and where the others are not found in 5 minutes.
    """
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    index = _number("JAX_PROCESS_ID") if index is None else index
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    detected = coordinator is None and _launched()
    if coordinator == "none" or (coordinator is None and not detected and (processes, index) == (None, None)):
        return
    if jax.distributed.is_initialized():
        return
    address = None if coordinator in (None, "auto") else coordinator
    # SIGTERM is the training loop's: it saves first.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(address, processes, index, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (ValueError, RuntimeError) as error:
        if detected and "coordinator_address should be defined" in str(error):
            return  # a machine with TPUs that is no part of a cluster
        raise ProcessError(
            f"the processes do not find each other: {error} Give --coordinator HOST:PORT, --processes and "
            "--process-index to each, or --coordinator none to run this one alone."
        ) from error


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ProcessError(f"{name}={text!r} is not a number of processes.")
    return None if text is None else int(text)


def _launched() -> bool:
    for present, count in LAUNCHERS.items():
        if present in os.environ:
            return int(os.environ.get(count, "1")) > 1
    return any(os.path.exists(path) for path in TPU_DEVICES)  # noqa: PTH110 (no Path is made for a look)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when all processes have called it; ``what``: a name, for messages of those that do not come."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        # Not a collective: devices give up on each other after minutes.
        key = f"deepseek_jax.{next(_numbers)}.{what}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * PATIENCE_SECONDS)


def from_first(make: Callable[[], T], what: str) -> T:
    """What ``make`` returns on the first process, plain values for JSON, on all; the others wait for it.

    Raises on the first process what ``make`` raises, on the others a ProcessError with its message.
    """
    if jax.process_count() == 1:
        return make()
    value, failure = None, None
    if is_first():
        try:
            value = make()
        except Exception as error:
            failure = error
    told = {"value": value, "error": None if failure is None else str(failure) or type(failure).__name__}
    wait_for_all(what)
    told = json.loads(_sent(json.dumps(told)))
    if failure is not None:
        raise failure
    if told["error"] is not None:
        raise ProcessError(f"process 0, {what}: {told['error']}")
    return value if is_first() else told["value"]


def first_then_all(make: Callable[[], T], what: str) -> T:
    """What ``make`` returns, called on the first process, and when it is done there on the others, which find what it
    wrote. Raises as `from_first`."""
    made = []
    from_first(lambda: made.append(make()), what)
    return made[0] if made else make()


def _sent(text: str) -> str:
    data = text.encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    room = max(FEWEST_BYTES, 1 << (size - 1).bit_length())
    padded = np.frombuffer(data.ljust(room, b" "), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))[:size].decode()


class Agreement:
    """The largest of the numbers that the processes name, without waiting for them: each call of `exchange` returns
    what all had named in the call before, 0 in the first one."""

    def __init__(self):
        self._mesh = Mesh(np.array(jax.devices()), ("devices",))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._largest = jax.jit(lambda a: a.max(), out_shardings=self._everywhere)
        self._under_way: jax.Array | None = None

    def exchange(self, number: int) -> int:
        found = 0 if self._under_way is None else int(self._under_way)
        apart = NamedSharding(self._mesh, PartitionSpec("devices"))
        shape = (self._mesh.size,)
        named = jax.make_array_from_callback(shape, apart, lambda index: np.full(1, number, np.int32))
        self._under_way = self._largest(named)
        return found
