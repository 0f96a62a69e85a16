"""All figures of a program compiled ahead of time, from one call."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_jax.aot.child import Job
from deepseek_jax.aot.memory import HLO, Memory, read_memory
from deepseek_jax.aot.process import built


@dataclass(frozen=True)
class Report:
    """``job``: what was compiled. ``out_of_memory``: the compiler's sentence where it does not fit."""

    job: Job
    memory: Memory
    seconds: dict[str, float]
    out_of_memory: str | None

    def as_dict(self, largest: int) -> dict:
        """Plain values for JSON, with that many of the largest buffers."""
        job, memory = self.job, asdict(self.memory)
        program = asdict(job.program)
        program["options"] = {name: str(value) for name, value in program["options"].items()}
        return {
            "model": job.cfg.name,
            "topology": job.topology.name,
            "mesh": job.sizes,
            "layout": job.layout,
            "program": program,
            "flags": job.flags,
            "seconds": self.seconds,
            "out_of_memory": self.out_of_memory,
            "memory": memory | {"total": self.memory.total, "largest": memory["largest"][:largest]},
        }


def report(job: Job, quick: bool, say: Callable[[str], Any] = lambda text: None, keep: Path | None = None) -> Report:
    """Compiles and reads off all figures; ``keep``: where the compiler's scheduled program is copied to.

    Raises TopologyError, CompileError, LayoutError, OSError.
    """
    with built(job, quick, say) as found:
        if keep is not None:
            shutil.copy(next(found.dump.glob(f"*.{HLO}")), keep)
        return Report(
            job=job,
            memory=read_memory(found.dump),
            seconds={"lower": found.lower_seconds, "compile": found.compile_seconds},
            out_of_memory=found.out_of_memory,
        )
