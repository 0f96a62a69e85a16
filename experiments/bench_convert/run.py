"""Speed and memory of `deepseek-jax convert` on real DeepSeek-V3 tensor shapes.

Makes a synthetic published checkpoint that holds the embedding, the head, one dense and one MoE layer of V3 in
FP8 with scales (random bytes, 16 GB with all 256 experts), converts it to Orbax and back, each direction in a
process of its own, and compares every tensor with the source. Prints and stores GB/s, the peak resident memory
of each process, the disk's own speed measured beside it (a plain copy of the same bytes, flushed to the disk),
and what follows for the 688.6 GB of the whole model. Memory is compared with the largest matrix, the embedding.

    python experiments/bench_convert/run.py --folder /a/disk/with/60GB
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.manifest import of_release
from deepseek_jax.convert.names import SCALE, layout
from deepseek_jax.convert.safetensors import DTYPES, Checkpoint, Writer
from deepseek_jax.convert.save import index_json, split_files, write_json
from deepseek_jax.version import __version__

HERE = Path(__file__).parent
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Bench:
    """Measure conversion to Orbax and back."""

    folder: Path
    """Where to work; needs three times the checkpoint's size, and is emptied afterwards."""
    experts: int = 256
    """Routed experts of the MoE layer; V3 has 256."""
    results: Path = HERE / "results.json"
    """Where the figures go."""

    def run(self) -> None:
        work = self.folder / "bench_convert"
        work.mkdir(parents=True)
        try:
            record = self._measure(work)
        finally:
            shutil.rmtree(work)
        self.results.write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record, indent=2))

    def _measure(self, work: Path) -> dict:
        nbytes = make(work / "source", self.experts)
        largest = max(entry.nbytes for entry in Checkpoint(work / "source").entries.values())
        record = {
            "deepseek_jax": __version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seed": 0,
            "platform": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "experts": self.experts,
            "bytes": nbytes,
            "largest_tensor_bytes": largest,
            "copy_GB_per_s": nbytes / 1e9 / copy(work / "source", work / "copy"),
        }
        whole = of_release("deepseek-v3").bytes
        for name, source, destination in (("to_orbax", "source", "orbax"), ("to_published", "orbax", "back")):
            seconds, peak = timed(work / source, work / destination)
            record[name] = {
                "seconds": seconds,
                "GB_per_s": nbytes / 1e9 / seconds,
                "peak_resident_bytes": peak,
                "peak_over_largest_tensor": peak / largest,
                "minutes_for_deepseek_v3": whole / nbytes * seconds / 60,
            }
        expected, found = digests(work / "source"), digests(work / "back")
        if expected != found:
            raise AssertionError("the round trip changed a tensor")
        record["tensors_byte_equal"] = len(expected)
        return record


def make(folder: Path, experts: int) -> int:
    """Writes the source; returns its tensors' bytes."""
    cfg = zoo("deepseek-v3")
    moe = replace(cfg.moe, n_experts=experts)
    cfg = replace(cfg, n_layers=2, n_dense_layers=1, mtp_depth=0, moe=moe)
    specs = {}
    for tensor in layout(cfg)[0]:
        bias = tensor.name.endswith("bias")
        specs[tensor.name] = (DTYPES["F8_E4M3" if tensor.fp8 else "F32" if bias else "BF16"], tensor.shape)
        if tensor.fp8:
            specs[tensor.name + SCALE] = (DTYPES["F32"], tuple(-(-n // 128) for n in tensor.shape))
    folder.mkdir()
    files = split_files(specs)
    rng = np.random.default_rng(0)
    for file, names in files.items():
        with Writer(folder / file, {name: specs[name] for name in names}) as writer:
            for name in names:
                dtype, shape = specs[name]
                raw = rng.integers(0, 0x7F, (*shape, dtype.itemsize), dtype=np.uint8)
                raw[..., -1] %= 0x3F if dtype.itemsize > 1 else 0x7F  # finite in every dtype
                writer.write(name, raw.view(dtype)[..., 0])
    write_json(folder / INDEX, index_json(specs, files))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write_json(folder / "config.json", config_to_json(cfg, quantization))
    return sum(entry.nbytes for entry in Checkpoint(folder).entries.values())


def copy(source: Path, destination: Path) -> float:
    """Seconds that a plain copy takes, until it is on the disk."""
    start = time.monotonic()
    shutil.copytree(source, destination)
    os.sync()
    seconds = time.monotonic() - start
    shutil.rmtree(destination)
    return seconds


def timed(source: Path, destination: Path) -> tuple[float, int]:
    """Seconds until the result is on the disk, and peak resident bytes, of a conversion in its own process."""
    program = (
        "import resource, sys; from deepseek_jax.cli.main import main; code = main(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); raise SystemExit(code)"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", program, "convert", str(source), str(destination)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    os.sync()
    return time.monotonic() - start, int(result.stdout.split()[-1])


def digests(folder: Path) -> dict[str, str]:
    checkpoint = Checkpoint(folder)
    return {
        name: hashlib.sha256(repr((entry.dtype, entry.shape)).encode() + entry.read().tobytes()).hexdigest()
        for name, entry in checkpoint.entries.items()
    }


if __name__ == "__main__":
    tyro.cli(Bench).run()
