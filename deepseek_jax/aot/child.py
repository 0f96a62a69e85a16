"""The process that compiles: libtpu prints, aborts and cannot be interrupted, so it has a process of its own."""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from deepseek_jax.aot.topology import Topology, describe
from deepseek_jax.configs.multimodal import JanusConfig

RESULT, LOG, DUMP = "result.json", "log.txt", "dump"


@dataclass(frozen=True)
class Job:
    """``cfg``, ``program``, ``sizes``, ``layout``: of `programs.lower`, or of `janus.lower`. ``flags``: the compiler's
    options by name."""

    cfg: object
    topology: Topology
    sizes: dict[str, int]
    layout: str | None
    program: object
    flags: dict[str, str]

    @property
    def language(self):
        """The language model's config: a Janus's, or ``cfg`` itself."""
        return self.cfg.language if isinstance(self.cfg, JanusConfig) else self.cfg


def compile_in(folder: str, job: Job) -> None:
    """Compiles a job; leaves the compiler's dump and ``result.json`` in ``folder``. What is printed goes to a file."""
    root = Path(folder)
    _end_with_parent(root)
    log = os.open(root / LOG, os.O_WRONLY | os.O_CREAT, 0o600)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(log, 1), os.dup2(log, 2)
    found = {}

    def note(**values):
        found.update(values)
        part = root / f"{RESULT}.part"
        part.write_text(json.dumps(found))
        part.replace(root / RESULT)

    try:
        _compile(root, job, note)
    except BaseException as error:
        traceback.print_exc()
        note(error=str(error), kind=type(error).__name__)


def _compile(root: Path, job: Job, note) -> None:
    import jax

    began = time.monotonic()
    devices = describe(job.topology)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_default_matmul_precision", None)
    from deepseek_jax.aot import janus, programs

    lower = janus.lower if isinstance(job.cfg, JanusConfig) else programs.lower
    lowered, mesh = lower(job.cfg, job.program, devices, job.sizes, job.layout)
    coordinates = [list(d.coords)[: len(job.topology.shape)] for d in mesh.devices.flat]
    note(lower_seconds=time.monotonic() - began, coordinates=coordinates, sizes=dict(mesh.shape), jax=jax.__version__)
    began = time.monotonic()
    compiled = lowered.compile(compiler_options={**job.flags, "xla_dump_to": str(root / DUMP)})
    stats = compiled.memory_analysis()
    memory = {name: getattr(stats, name) for name in dir(stats) if name.endswith("_in_bytes")}
    figures = compiled.cost_analysis() or {}
    cost = {name: figures[name] for name in ("optimal_seconds", "flops", "bytes accessed") if name in figures}
    note(compile_seconds=time.monotonic() - began, memory=memory, cost=cost)


def _end_with_parent(root: Path) -> None:
    """A parent that was killed takes this process and its files with it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait():
        parent.join()
        shutil.rmtree(root, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
