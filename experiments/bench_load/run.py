"""Memory and speed of a user's first real model: R1-Distill-Qwen-1.5B in bfloat16 on a CPU, random weights.

Writes a published folder of the release's real shapes (3.55 GB, random bfloat16 values), then, each in a process of
its own: loads it and compares the peak of resident memory with the weights' bytes; generates, and measures the time to
the first token, tokens a second and the peak; and does the same with PyTorch transformers on the same files. Memory is
that of the whole process beyond what it took before loading, with JAX or PyTorch imported. Runs on Linux.

    python experiments/bench_load/run.py            # about two minutes, 4 GB of disk, 12 GB of memory
    python experiments/bench_load/run.py --smoke    # the tiny twin's shapes, in seconds

Needs the extra ``deepseek-jax[verify]`` for PyTorch's side.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import zoo
from deepseek_jax.convert.files import write_json
from deepseek_jax.convert.names import layout
from deepseek_jax.convert.safetensors import Writer

HERE = Path(__file__).parent
PROMPT, NEW = 32, 32
# What loading may take at most, in bytes of the weights.
AIM = 1.2


def make(folder: Path, cfg: ModelConfig) -> int:
    """A published folder of the model's shapes in bfloat16; returns the bytes of its tensors."""
    import ml_dtypes

    rng, kind, total = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16), 0
    tensors = [t for t in layout(cfg)[0] if t.written]
    pool = (rng.standard_normal(1 << 22, np.float32) * cfg.init_std).astype(kind)
    folder.mkdir()
    write_json(folder / "config.json", config_to_json(cfg))
    with Writer(folder / "model.safetensors", {t.name: (kind, t.shape) for t in tensors}) as writer:
        for t in tensors:
            value = np.roll(pool, rng.integers(pool.size)) if len(t.shape) > 1 else np.ones(t.shape, kind)
            writer.write(t.name, np.resize(value, t.shape))
            total += kind.itemsize * math.prod(t.shape)
    return total


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: str) -> dict:
    import jax
    import jax.numpy as jnp

    import deepseek_jax as dsj

    jax.devices()
    before, begin = peak(), time.perf_counter()
    model = jax.block_until_ready(dsj.load_pretrained(folder, dtype=jnp.bfloat16))
    size = sum(a.nbytes for a in jax.tree.leaves(model))
    return {"seconds": time.perf_counter() - begin, "peak_bytes": peak() - before, "weights_bytes": size}


def generate(folder: str) -> dict:
    import jax
    import jax.numpy as jnp

    import deepseek_jax as dsj

    jax.devices()
    before = peak()
    model = dsj.load_pretrained(folder, dtype=jnp.bfloat16)
    return timed(
        lambda new: dsj.generate(model, [prompt(model.cfg.vocab_size)], max_new_tokens=new, stop_ids=()), before
    )


def torch(folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    before = peak()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([prompt(model.config.vocab_size)])

    def run(new):
        limits = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **limits)

    return timed(run, before)


def prompt(vocab_size: int) -> list[int]:
    return np.random.default_rng(1).integers(2, vocab_size, PROMPT).tolist()


def timed(run, before: int) -> dict:
    """The second call with one new token and with many: compilation is in the first."""

    def seconds(new: int) -> float:
        run(new)
        begin = time.perf_counter()
        run(new)
        return time.perf_counter() - begin

    first, all_ = seconds(1), seconds(1 + NEW)
    return {
        "first_token_seconds": round(first, 3),
        "tokens_a_second": round(NEW / (all_ - first), 2),
        "peak_bytes": peak() - before,
    }


SIDES = {"load": load, "generate": generate, "torch": torch}


def child(side: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--side", side, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="r1-distill-qwen-1.5b", help="a release of the zoo")
    parser.add_argument("--smoke", action="store_true", help="the tiny twin; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(SIDES[given.side[0]](given.side[1])))
        return
    cfg = zoo("tiny-distill-qwen" if given.smoke else given.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        made = make(folder, cfg)
        record = {"model": cfg.name, "bytes": made, **{side: child(side, folder) for side in SIDES}}
    record["load"]["times_the_weights"] = round(record["load"]["peak_bytes"] / record["load"]["weights_bytes"], 3)
    record["aim"] = AIM
    record |= provenance()
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
