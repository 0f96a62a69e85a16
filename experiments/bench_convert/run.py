"""Speed and memory of `deepseek-jax convert` on real DeepSeek-V3 tensor shapes.

Makes a synthetic published checkpoint that holds the embedding, the head, one dense and one MoE layer of V3 in
FP8 with scales (random bytes; 5.2 GB with 16 experts, 16 GB with all 256), converts it to Orbax and back, each
direction in a process of its own, and compares every tensor with the source. Prints and stores medians: seconds and
GB/s of the conversion and of its whole process, the peak resident memory, the speed of a plain copy of the same
bytes, and what follows for the 688.6 GB of the whole model. Copies and conversions take turns, each flushed to the
disk and its result removed before the next begins, since on a shared machine they differ by a factor of two from one
minute to the next; what counts is their ratio. What each reads is taken out of the system's cache first, as it is for
a checkpoint larger than memory. Memory is compared with the largest matrix, the embedding. Runs on Linux.

    python experiments/bench_convert/run.py                     # about four minutes, 16 GB of disk
    python experiments/bench_convert/run.py --experts 256 --folder /a/disk/with/50GB
    python experiments/bench_convert/run.py --smoke             # the same code at toy size, in seconds
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import tyro

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.files import index_json, split_files, write_json
from deepseek_jax.convert.manifest import of_release
from deepseek_jax.convert.names import layout
from deepseek_jax.convert.safetensors import DTYPES, Writer

HERE = Path(__file__).parent
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Bench:
    """Measure conversion to Orbax and back."""

    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """Where to work; needs three times the checkpoint's size, and is emptied afterwards."""
    experts: int = 16
    """Routed experts of the MoE layer; V3 has 256."""
    repeats: int = 3
    """Copies and conversions each way, of which the medians are taken."""
    smoke: bool = False
    """The tiny V3's shapes, once each way; results go to --out only."""
    out: Path | None = None
    """Where the figures go; by default results.json beside this file."""

    def run(self) -> None:
        work = self.folder / "bench_convert"
        work.mkdir(parents=True)
        try:
            record = self._measure(work)
        finally:
            shutil.rmtree(work)
        out = self.out or (None if self.smoke else HERE / "results.json")
        if out is not None:
            out.write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record, indent=2))

    def _measure(self, work: Path) -> dict:
        cfg, repeats = (zoo("tiny-v3", mtp_depth=0), 1) if self.smoke else (shapes(self.experts), self.repeats)
        nbytes = make(work / "source", cfg)
        largest = max(entry.nbytes for entry in Checkpoint(work / "source").entries.values())
        expected = digests(work / "source")
        found: dict[str, list[tuple]] = {"copy": [], "to_orbax": [], "to_published": []}
        for _ in range(repeats):
            found["copy"].append(copy(work / "source", work / "copied"))
            found["to_orbax"].append(timed(work / "source", work / "orbax"))
            found["copy"].append(copy(work / "source", work / "copied"))
            found["to_published"].append(timed(work / "orbax", work / "back"))
            if digests(work / "back") != expected:
                raise AssertionError("the round trip changed a tensor")
            for folder in ("orbax", "back"):
                shutil.rmtree(work / folder)
        copied = median(seconds for seconds, *_ in found["copy"])
        record = {
            **provenance(),
            "seed": 0,
            "experts": cfg.moe.n_experts,
            "repeats": repeats,
            "bytes": nbytes,
            "largest_tensor_bytes": largest,
            "tensors_byte_equal": len(expected),
            "copy": {"seconds": copied, "GB_per_s": nbytes / 1e9 / copied, "runs": [s for s, *_ in found["copy"]]},
        }
        for name in ("to_orbax", "to_published"):
            process, seconds, peak = (median(column) for column in zip(*found[name], strict=True))
            record[name] = {
                "seconds": seconds,
                "GB_per_s": nbytes / 1e9 / seconds,
                "part_of_the_copy's_speed": copied / seconds,
                "process_seconds": process,
                "process_part_of_the_copy's_speed": copied / process,
                "runs": [run[0] for run in found[name]],
                "peak_resident_bytes": peak,
                "peak_over_largest_tensor": peak / largest,
                "minutes_for_deepseek_v3": of_release("deepseek-v3").bytes / nbytes * seconds / 60,
            }
        return record


def shapes(experts: int) -> ModelConfig:
    """One dense and one MoE layer of V3 between its embedding and its head."""
    cfg = zoo("deepseek-v3")
    return replace(cfg, n_layers=2, n_dense_layers=1, mtp_depth=0, moe=replace(cfg.moe, n_experts=experts))


def make(folder: Path, cfg: ModelConfig) -> int:
    """Writes the source; returns its tensors' bytes."""
    specs = {}
    for tensor in layout(cfg)[0]:
        bias = tensor.name.endswith("bias")
        specs[tensor.name] = (DTYPES["F8_E4M3" if tensor.fp8 else "F32" if bias else "BF16"], tensor.shape)
        if tensor.fp8:
            specs[tensor.scale] = (DTYPES["F32"], tuple(-(-n // 128) for n in tensor.shape))
    folder.mkdir()
    files = split_files(specs)
    rng = np.random.default_rng(0)
    for file, names in files.items():
        with Writer(folder / file, {name: specs[name] for name in names}) as writer:
            for name in names:
                dtype, shape = specs[name]
                raw = rng.integers(0, 0x100, (*shape, dtype.itemsize), dtype=np.uint8)
                raw[..., -1] &= 0x3F  # finite in every dtype
                writer.write(name, raw.view(dtype)[..., 0])
    write_json(folder / INDEX, index_json(specs, files))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write_json(folder / "config.json", config_to_json(cfg, quantization))
    return sum(entry.nbytes for entry in Checkpoint(folder).entries.values())


def copy(source: Path, destination: Path) -> tuple[float]:
    """Seconds that a plain copy takes, until it is on the disk."""
    evict(source)
    start = time.monotonic()
    shutil.copytree(source, destination)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(destination)
    return (seconds,)


def timed(source: Path, destination: Path) -> tuple[float, float, int]:
    """A conversion in a process of its own: that process's seconds until the result is on the disk, those of the
    conversion alone (without the start, of Python and its libraries), and peak resident bytes."""
    # Not getrusage: its peak includes that of the process which started this one.
    program = (
        "import re, sys; from deepseek_jax.cli.main import main; code = main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); raise SystemExit(code)"
    )
    report = destination.with_suffix(".json")
    command = [sys.executable, "-c", program, "convert", str(source), str(destination), "--json", str(report)]
    evict(source)
    start = time.monotonic()
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command[3:])} failed:\n{result.stderr[-4000:]}")
    ended = time.monotonic()
    os.sync()
    flush = time.monotonic() - ended
    conversion = json.loads(report.read_text())["conversion"]["seconds"]
    return ended + flush - start, conversion + flush, int(result.stdout.split()[-1]) * 1024


def evict(folder: Path) -> None:
    """Empties the system's cache of a folder's files, and flushes what is still to be written anywhere."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digests(folder: Path) -> dict[str, str]:
    checkpoint = Checkpoint(folder)
    return {
        name: hashlib.sha256(repr((entry.dtype, entry.shape)).encode() + entry.read().tobytes()).hexdigest()
        for name, entry in checkpoint.entries.items()
    }


if __name__ == "__main__":
    tyro.cli(Bench).run()
