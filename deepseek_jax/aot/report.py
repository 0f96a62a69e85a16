"""All figures of a program compiled ahead of time, from one call."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.analysis.counts import counts
from deepseek_jax.aot.child import Job
from deepseek_jax.aot.estimates import Estimate, Slice
from deepseek_jax.aot.hlo import parse
from deepseek_jax.aot.janus import useful
from deepseek_jax.aot.kernels import Kernels
from deepseek_jax.aot.memory import HLO, Memory, dumped, read_memory
from deepseek_jax.aot.process import built
from deepseek_jax.aot.programs import Program, balanced_fill, cache_bytes, expected_trips
from deepseek_jax.aot.roofline import HBM_RATE, MATRIX_RATE, estimate
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import Context


@dataclass(frozen=True)
class Rates:
    """``tokens``: a second and chip. ``useful``: convention -> (FLOPs a token, MFU: their share of the chip's peak).

    "causal": 6 for each activated parameter, and attention over half of the row, which MaxText counts too; with MTP:
    its modules too. Prefill has a third of it. Of a Janus: `janus.useful`. ``cache``: bytes that a token holds when a
    row is full, in decoding.
    """

    tokens: float
    useful: dict[str, tuple[float, float]]
    cache: float | None


@dataclass(frozen=True)
class Report:
    """``job``: what was compiled. ``sizes``: of the mesh's axes. ``out_of_memory``: the compiler's sentence where it
    does not fit. ``compiler``: its own figures of the finished program, which count loops once; None with a quick run.
    """

    job: Job
    sizes: dict[str, int]
    memory: Memory
    estimate: Estimate
    rates: Rates
    seconds: dict[str, float]
    out_of_memory: str | None
    compiler: dict[str, float] | None

    def as_dict(self, most: int) -> dict:
        """Plain values for JSON, with that many of the largest buffers and longest operations."""
        job, found = self.job, self.estimate
        program = asdict(job.program)
        program["options"] = {name: str(value) for name, value in program["options"].items()}
        time = asdict(found)
        time["operations"] = [dict(zip(("seconds", "name", "source"), o, strict=True)) for o in found.operations[:most]]
        time["kernels"] = merged(found)
        time["transfers"] = [asdict(t) | {"runs": n} for t, n in found.transfers]
        memory = asdict(self.memory)
        memory["live_by_kind"] = self.memory.live_by_kind({len(stack.numbers) for stack in job.language.stacks})
        return {
            "model": job.cfg.name,
            "topology": job.topology.name,
            "mesh": self.sizes,
            "layout": job.layout,
            "program": program,
            "flags": job.flags,
            "seconds": self.seconds,
            "out_of_memory": self.out_of_memory,
            "memory": memory | {"total": self.memory.total, "largest": memory["largest"][:most]},
            "time": time | {"binds": found.binds, "matrix_rate": MATRIX_RATE, "hbm_rate": HBM_RATE},
            "tokens_per_second_chip": self.rates.tokens,
            "flops_per_token_and_mfu": self.rates.useful,
            "cache_bytes_per_token": self.rates.cache,
            "compiler": self.compiler,
        }


def report(job: Job, quick: bool, say: Callable[[str], Any] = lambda text: None, keep: Path | None = None) -> Report:
    """Compiles and reads off all figures; ``keep``: where the compiler's scheduled program is copied to.

    Raises TopologyError, CompileError, OSError.
    """
    with built(job, quick, say) as found:
        if keep is not None:
            shutil.copy(next(found.dump.glob(f"*.{HLO}")), keep)
        say("reading the schedule")
        module = parse(dumped(found.dump, HLO))
        fill = balanced_fill(job.program, found.sizes)
        on = Slice(job.topology, np.array(found.coordinates), found.sizes)
        time = estimate(
            module, Kernels(fill, job.topology.kind, job.topology.chip.cores), on, partial(expected_trips, job.program)
        )
        return Report(
            job=job,
            sizes=found.sizes,
            memory=read_memory(found.dump),
            estimate=time,
            rates=rates(job, time.seconds),
            seconds={"lower": found.lower_seconds, "compile": found.compile_seconds},
            out_of_memory=found.out_of_memory,
            compiler=found.memory and {**found.memory, **(found.cost or {})},
        )


def merged(found: Estimate) -> list[dict]:
    """A line a kind of kernel call: what it was priced as, FLOPs and seconds of one, and how often a step has it."""
    merged: dict[tuple, dict] = {}
    for call, runs in found.kernels:
        line = merged.setdefault((call.kernel, call.product, *call.shape.values()), asdict(call) | {"runs": 0})
        line["runs"] += runs
    return list(merged.values())


def rates(job: Job, seconds: float) -> Rates:
    """Tokens and MFU of a program that takes so long."""
    program, cache = job.program, None
    if program.kind == "decode":
        cache = cache_bytes(job.language, program.context, program.options.get("cache", Context.cache))
    made, flops = useful(job.cfg, program) if isinstance(job.cfg, JanusConfig) else _useful(job.cfg, program)
    tokens, peak = made / seconds, job.topology.chip.flops
    return Rates(tokens, {name: (each, each * tokens / peak) for name, each in flops.items()}, cache)


def _useful(cfg: ModelConfig, program: Program) -> tuple[int, dict[str, int]]:
    """Tokens of a chip, and by convention the FLOPs for each."""
    if program.kind == "decode":
        return program.rows, {"absorbed attention": counts(cfg, program.context).decode_flops_per_token}
    figures = counts(cfg, program.length)
    causal = figures.flops_per_token if program.kind == "train" else figures.forward_flops_per_token
    found = {"causal": causal}
    if program.kind == "train" and program.mtp and cfg.mtp_depth:
        found["causal, with MTP"] = causal + figures.flops_per_token_mtp
    return program.rows * program.length, found
