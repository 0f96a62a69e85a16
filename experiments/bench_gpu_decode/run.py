"""Decoding on one GPU beside the bandwidth of its memory: V2-Lite's real shapes with random weights in bfloat16.

What a step reads follows from the config: the weights that its tokens use, and what is cached of their rows. Over the
time of a step it is a rate, and that over the rate of a large copy on the same GPU, read and written, is the share of
the bandwidth that decoding uses; the aim is 0.6 at batch 1. Rows are decoded in the forms that "auto" takes on any GPU,
and with the kernel for Hopper where there is one (`kernels.hopper_decode`, which has not run on a card yet). A step is
the time of `NEW` more tokens, the median of five, over their number.

    python experiments/bench_gpu_decode/run.py            # some ten minutes, 40 GB; writes results.json beside itself
    python experiments/bench_gpu_decode/run.py --smoke    # the same code at toy size, on whatever device there is

Without a GPU it says so and ends.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as dsj
from deepseek_jax.analysis.peaks import decoding_bytes
from deepseek_jax.analysis.provenance import provenance

HERE = Path(__file__).parent
MODEL, ROWS, PROMPT, NEW = "deepseek-v2-lite", (1, 8, 32), 1024, 128
SMOKE = ("tiny-v3", (1, 4), 16, 8)
AIM = 0.6
COPY = 2**30  # numbers of two bytes


def clocked(f) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def bandwidth(numbers: int) -> float:
    """Bytes a second of a copy, read and written; the best of five."""
    x = jnp.ones(numbers, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    return 4 * numbers / min(clocked(lambda: copy(x).block_until_ready()) for _ in range(5))


def step_seconds(model, rows: int, prompt: int, new: int, ctx) -> float:
    prompts = np.random.default_rng(0).integers(2, model.cfg.vocab_size, (rows, prompt)).tolist()

    def generate(tokens: int) -> None:
        dsj.generate(model, prompts, max_new_tokens=tokens, stop_ids=(), cache_length=prompt + new + 1, ctx=ctx)

    for tokens in (1, new + 1):  # compiled
        generate(tokens)
    return statistics.median(clocked(lambda: generate(new + 1)) - clocked(lambda: generate(1)) for _ in range(5)) / new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy size on any device; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    given = parser.parse_args()
    device = jax.devices()[0]
    if not given.smoke and device.platform != "gpu":
        print("skipped: no GPU. This measurement needs one that JAX sees: pip install 'deepseek-jax[cuda]'.")
        return
    name, tried, prompt, new = SMOKE if given.smoke else (MODEL, ROWS, PROMPT, NEW)
    forms = ["auto"]
    if str(getattr(device, "compute_capability", "")).startswith("9."):
        forms.append("hopper")
    rate = bandwidth(2**20 if given.smoke else COPY)
    print(f"{device.device_kind}: a copy runs at {rate / 1e9:,.0f} GB/s", flush=True)
    model, records = dsj.init(dsj.zoo(name), jax.random.key(0), dtype=jnp.bfloat16), []
    for form in forms:
        for rows in tried:
            seconds = step_seconds(model, rows, prompt, new, dsj.Context(attention=form))
            read = decoding_bytes(model.cfg, rows, prompt + new // 2)
            records.append(
                {
                    "attention": form,
                    "rows": rows,
                    "step_seconds": seconds,
                    "tokens_per_second": round(rows / seconds, 1),
                    "bytes_a_step": round(read),
                    "share_of_bandwidth": round(read / seconds / rate, 3),
                }
            )
            print(
                f"attention {form}, {rows} rows: {rows / seconds:,.0f} tokens a second, "
                f"{records[-1]['share_of_bandwidth']:.0%} of the bandwidth",
                flush=True,
            )
    record = {
        **provenance(),
        "device": device.device_kind,
        "bytes_a_second": round(rate),
        "model": name,
        "prompt": prompt,
        "new": new,
        "aim_at_batch_1": AIM,
        "records": records,
    }
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
