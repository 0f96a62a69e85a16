"""Training speed on one GPU beside PyTorch transformers: tokens a second, MFU and peak memory of a ~1B-activated MoE.

The model is V3's architecture at 2/7 of its width: 4.8B parameters, 1.1B of them activated. Query latents, dense and
expert networks shrink with the width (to multiples of 64); head sizes (128 + 64 rotary) and the latents of keys and
values stay; a token has one shared expert and 8 routed ones, of 64 in 8 groups of which 4 are used. Both sides run the
same weights, from one checkpoint, and the same tokens: forward, backward, clipping and AdamW, with parameters,
gradients and moments in bfloat16. The first loss of each is recorded: that they agree shows that they compute the same.

Each choice of rows, recomputation, experts and attention is a process of its own, so that an exhausted memory ends
that choice alone, and each side is taken at its best. PyTorch: SDPA attention, fused AdamW, `grouped_mm` and `eager`
experts, with and without gradient checkpointing. This package: `train_step` with and without remat, in the forms that
"auto" takes on any GPU and in those for Hopper, together and one by one (these have not run on a card yet); at its best
choice also with float32 master weights, as recipes train. Means over steps that follow each other, after three to warm
up.

    python experiments/bench_gpu/run.py            # some two hours; writes results.json beside itself
    python experiments/bench_gpu/run.py --smoke    # the same code at toy size, on whatever device there is; a minute

Needs the extra ``deepseek-jax[verify]``; PyTorch's side needs a PyTorch with CUDA. Without a GPU it says so and ends.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.schema import MLA, ModelConfig, MoE

HERE = Path(__file__).parent
CFG = ModelConfig(
    name="bench-gpu",
    vocab_size=65536,
    dim=2048,
    n_layers=18,
    n_dense_layers=1,
    ffn_dim=5376,
    attention=MLA(n_heads=16, q_rank=448, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
    moe=MoE(n_experts=64, top_k=8, expert_dim=640, n_shared=1, n_groups=8, top_groups=4, scale=2.5),
    max_length=4096,
    init_std=0.006,
)
LENGTH, ROWS, STEPS, WARM = 4096, (1, 2, 4, 8, 16), 10, 3
SMOKE = replace(
    CFG,
    name="bench-gpu-smoke",
    vocab_size=512,
    dim=64,
    n_layers=3,
    ffn_dim=160,
    attention=MLA(n_heads=4, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, v_dim=16),
    moe=replace(CFG.moe, n_experts=16, top_k=2, expert_dim=32),
    max_length=64,
    init_std=0.1,
)
SMOKE_LENGTH, SMOKE_ROWS, SMOKE_STEPS = 64, (2,), 2
RATE, CLIP, DECAY = 1e-5, 1.0, 0.1
# side -> the choices that are tried: recomputation, and the implementations of experts and of attention.
CHOICES = {
    "jax": [
        *((remat, "auto", "auto") for remat in ("none", "sublayers", "full")),
        *((remat, "hopper", "hopper") for remat in ("none", "sublayers", "full")),
        ("sublayers", "hopper", "auto"),
        ("sublayers", "auto", "hopper"),
    ],
    "torch": [(remat, experts, "sdpa") for experts in ("grouped_mm", "eager") for remat in ("none", "full")],
}
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def batches(vocab_size: int, rows: int, length: int, steps: int):
    import numpy as np

    return np.random.default_rng(0).integers(2, vocab_size, (steps, rows, length))


def make(folder: str, smoke: bool) -> dict:
    """Writes the weights that both sides read."""
    import jax
    import jax.numpy as jnp

    import deepseek_jax as dsj

    model = dsj.init(SMOKE if smoke else CFG, jax.random.key(0), dtype=jnp.bfloat16)
    dsj.save_pretrained(model, folder)
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    return {"device": device.device_kind, "capability": capability, "jax": jax.__version__}


def run_jax(
    folder: str, rows: int, length: int, steps: int, remat: str, experts: str, attention: str, storage: str
) -> dict:
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np

    import deepseek_jax as dsj
    from deepseek_jax.core.partition import partition
    from deepseek_jax.train import optim
    from deepseek_jax.train.objective import Knobs, NextToken
    from deepseek_jax.train.recipe import Optimizer
    from deepseek_jax.train.step import start, train_step
    from deepseek_jax.train.weights import LossWeights

    model = dsj.load_pretrained(folder, dtype=storage)
    optimizer = optim.make(Optimizer(weight_decay=DECAY, moments=storage), partition(model)[0])
    ctx = dsj.Context(dtype=jnp.bfloat16, remat=remat, experts=experts, attention=attention)
    objective = NextToken(LossWeights(mtp=0.0, balance=0.0), model.cfg.mtp_depth)
    step = partial(train_step, optimizer=optimizer, objective=objective, ctx=ctx, clip=CLIP)
    state = start(model, optimizer)
    knobs = Knobs(np.float32(RATE), np.float32(0), np.float32(0), np.int32(1))
    data = batches(model.cfg.vocab_size, rows, length, steps + WARM)
    data = [{"tokens": jnp.asarray(part[None], jnp.int32)} for part in data]
    del model
    step = jax.jit(step, donate_argnums=0).lower(state, data[0], knobs).compile()
    for turn, batch in enumerate(data):
        if turn == WARM:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = step(state, batch, knobs)
        if turn == 0:
            first = float(metrics["main"])
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    memory = jax.devices()[0].memory_stats() or {}
    return {"seconds": seconds / steps, "first_loss": first, "peak_bytes": memory.get("peak_bytes_in_use")}


def run_torch(
    folder: str, rows: int, length: int, steps: int, remat: str, experts: str, attention: str, storage: str
) -> dict:
    import torch
    from transformers import DeepseekV3ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, storage), attn_implementation=attention)
    model = model.to(device).train()
    model.set_experts_implementation(experts)
    if remat == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=DECAY, fused=True)
    data = torch.as_tensor(batches(model.config.vocab_size, rows, length, steps + WARM), device=device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for turn, batch in enumerate(data):
        if turn == WARM:
            wait()
            began = time.perf_counter()
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if turn == 0:
            first = float(loss.detach())
    wait()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds / steps, "first_loss": first, "peak_bytes": peak}


def call(side: str, *arguments) -> dict | None:
    """What a process of its own measured; None where it ran out of memory."""
    command = [sys.executable, __file__, "--worker", side, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if found.returncode == 0:
        return json.loads(found.stdout.splitlines()[-1])
    if any(sign in found.stderr for sign in ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory")):
        return None
    raise SystemExit(f"{side} {arguments} failed:\n{found.stderr[-4000:]}")


def work(side: str, arguments: list[str]) -> None:
    if side == "probe":
        print(json.dumps({"gpu": torch_gpu() if arguments == ["torch"] else jax_gpu()}))
    elif side == "make":
        print(json.dumps(make(arguments[0], arguments[1] == "True")))
    else:
        folder, rows, length, steps, *choice = arguments
        run = {"jax": run_jax, "torch": run_torch}[side]
        print(json.dumps(run(folder, int(rows), int(length), int(steps), *choice)))


def jax_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def torch_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measure(side: str, folder: str, size: tuple, storage: str, choices, flops: int, peak: float | None) -> list[dict]:
    """Every choice, with more rows until the memory is exhausted."""
    length, rows_tried, steps = size
    records = []
    for remat, experts, attention in choices:
        for rows in rows_tried:
            found = call(side, folder, rows, length, steps, remat, experts, attention, storage)
            record = {"side": side, "rows": rows, "remat": remat, "experts": experts, "attention": attention}
            record["storage"] = storage
            what = f"{side:6}{rows:3} rows, remat {remat}, experts {experts}, attention {attention}, {storage}"
            if found is None:
                records.append(record | {"out_of_memory": True})
                print(f"{what}: out of memory", flush=True)
                break
            rate = rows * length / found["seconds"]
            record |= {
                "tokens_per_second": round(rate, 1),
                "mfu": None if peak is None else round(rate * flops / peak, 4),
                "step_seconds": round(found["seconds"], 5),
                "peak_gigabytes": None if found["peak_bytes"] is None else round(found["peak_bytes"] / 1e9, 2),
                "first_loss": round(found["first_loss"], 5),
            }
            records.append(record)
            mfu = "" if record["mfu"] is None else f", MFU {record['mfu']:.1%}"
            memory = "" if record["peak_gigabytes"] is None else f", {record['peak_gigabytes']:.1f} GB"
            print(f"{what}: {rate:,.0f} tokens a second{mfu}{memory}, first loss {record['first_loss']}", flush=True)
    return records


def best(records: list[dict]) -> dict | None:
    return max((r for r in records if "tokens_per_second" in r), key=lambda r: r["tokens_per_second"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy size on any device; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.worker[0], given.worker[1:])
    if not given.smoke and not call("probe", "jax")["gpu"]:
        print("skipped: no GPU. This measurement needs one that JAX sees: pip install 'deepseek-jax[cuda]'.")
        return None

    from deepseek_jax.analysis.counts import counts
    from deepseek_jax.analysis.peaks import peak_of, training_flops

    cfg, size = (SMOKE, (SMOKE_LENGTH, SMOKE_ROWS, SMOKE_STEPS)) if given.smoke else (CFG, (LENGTH, ROWS, STEPS))
    figures, flops = counts(cfg, size[0]), training_flops(cfg, size[0], mtp=False)
    choices = {side: found[:1] if given.smoke else found for side, found in CHOICES.items()}
    sides = ["jax", "torch"]
    if not given.smoke and not call("probe", "torch")["gpu"]:
        print("PyTorch sees no GPU: its side is left out. Install a PyTorch with CUDA to compare.")
        sides = ["jax"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(Path(temporary) / "checkpoint")
        machine = call("make", folder, given.smoke)
        if not given.smoke and not str(machine["capability"]).startswith("9."):
            choices["jax"] = [choice for choice in choices["jax"] if "hopper" not in choice]
            print(f"the forms for Hopper are left out: this is of compute capability {machine['capability']}")
        known = peak_of(machine["device"])
        peak = None if known is None else known.flops
        print(f"{machine['device']}: {figures.total:,} parameters, {figures.activated:,} activated", flush=True)
        records = {}
        for side in sides:
            records[side] = measure(side, folder, size, "bfloat16", choices[side], flops, peak)
        fastest = best(records["jax"])
        masters = []
        if fastest is not None:
            choice = [(fastest["remat"], fastest["experts"], fastest["attention"])]
            masters = measure("jax", folder, (size[0], (fastest["rows"],), size[2]), "float32", choice, flops, peak)
    winners = {side: best(found) for side, found in records.items()}
    ratio = None
    if all(winners.get(side) for side in CHOICES):
        ratio = round(winners["jax"]["tokens_per_second"] / winners["torch"]["tokens_per_second"], 3)
        print(f"{ratio} x as fast as PyTorch transformers at its best")
    record = {
        **provenance(),
        "device": machine["device"],
        "peak_flops": peak,
        "peak_source": None if known is None else known.source,
        "parameters": figures.total,
        "activated": figures.activated,
        "training_flops_per_token": flops,
        "length": size[0],
        "times_as_fast": ratio,
        "best": winners,
        "float32_master_weights": masters,
        "records": [r for found in records.values() for r in found],
    }
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
