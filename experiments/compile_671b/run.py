"""DeepSeek-V3 and its relatives at full size, compiled for TPU slices without one: do they fit, and how fast?

Every configuration is one call of ``deepseek-jax compile``: the real training step (V3's recipe: AdamW with float32
weights and moments, bfloat16 compute, MTP, nothing dropped), or a decoding step from quantised leaves. README.md says
how memory and time are found.

    python experiments/compile_671b/run.py                  # all of CONFIGURATIONS, a minute or two each
    python experiments/compile_671b/run.py train-r4 ...     # these alone; the others' results stay
    python experiments/compile_671b/run.py --full train-r4  # code generated too, 5 to 10 minutes each
    python experiments/compile_671b/run.py --table          # results.json as a table
    python experiments/compile_671b/run.py --smoke          # the tiny V3 for four chips instead

Results are written to results.json after each configuration. Needs the extra ``deepseek-jax[compile]``.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.aot.report import report
from deepseek_jax.cli.compile import Compile
from deepseek_jax.cli.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
V3, FLASH = "deepseek-v3", "deepseek-v4-flash"
POD, EP8, EP64 = "v5p:8x8x8", "fsdp=64,expert=8", "fsdp=8,expert=64"
SERVE = {"topology": "v5e:8x8", "mesh": "expert=64", "layout": "decode", "program": "decode", "context": 4096}
# The flags of the recipe of MaxText's measured run (`MAXTEXT`), but for those that are ours as well.
RECIPE = """
    xla_tpu_enable_async_collective_fusion_fuse_all_gather=false
    xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false
    xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false
    xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
    xla_tpu_enable_all_experimental_scheduler_features=true
    xla_tpu_enable_scheduler_memory_pressure_tracking=true
    xla_tpu_host_transfer_overlap_limit=24
    xla_tpu_aggressive_opt_barrier_removal=ENABLED
    xla_lhs_prioritize_async_depth_over_stall=ENABLED
    xla_tpu_enable_ag_backward_pipelining=true
    xla_should_allow_loop_variant_parameter_in_chain=ENABLED
    xla_should_add_loop_invariant_op_in_chain=ENABLED
    xla_max_concurrent_host_send_recv=100
    xla_tpu_scheduler_percent_shared_memory_limit=100
    xla_latency_hiding_scheduler_rerun=2
    xla_tpu_use_minor_sharding_for_major_trivial_input=true
    xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1
    xla_tpu_assign_all_reduce_scatter_layout=true
    xla_tpu_enable_data_parallel_all_reduce_opt=true
    xla_tpu_data_parallel_opt_different_sized_ops=true
    xla_tpu_scoped_vmem_limit_kib=81920
    xla_tpu_megacore_fusion_allow_ags=false
    xla_enable_async_collective_permute=true
"""
# What that run measured: AI-Hypercomputer/tpu-recipes, training/v5p/DeepSeek3-671B-MaxText: "completed step: 11,
# seconds: 90.668, TFLOP/s/device: 152.415, Tokens/s/device: 542.108". "maxtext" below is our program laid out so.
MAXTEXT = {"seconds": 90.668, "tokens_per_second_chip": 542.108}


def chunks(number: int) -> dict:
    return {"set": (f"expert_chunks={number}",)}


CONFIGURATIONS = {
    "train-r1": Compile(V3, POD, EP64, rows=1, **chunks(2)),
    "train-r4": Compile(V3, POD, EP64, rows=4, **chunks(4)),
    "train-r4-ep8": Compile(V3, POD, EP8, rows=4, **chunks(4)),
    "train-r4-fsdp512": Compile(V3, POD, "fsdp=512", rows=4, **chunks(4)),
    "maxtext": Compile(
        V3,
        POD,
        "fsdp=512",
        rows=6,
        length=8192,
        mtp=False,
        remat="offload_attention",
        set=("experts=kernel",),
        xla=tuple(RECIPE.split()),
    ),
    "train-r4-ep8-plain": Compile(V3, POD, EP8, rows=4, mtp=False),
    "train-r4-without-mtp": Compile(V3, POD, EP64, rows=4, mtp=False, **chunks(4)),
    "train-r8": Compile(V3, POD, EP64, rows=8, **chunks(8)),
    "train-r8-ep8": Compile(V3, POD, EP8, rows=8, **chunks(4)),
    "train-r8-offload": Compile(V3, POD, EP64, rows=8, remat="offload", **chunks(8)),
    "train-r16-ep8-offload": Compile(V3, POD, EP8, rows=16, remat="offload", **chunks(8)),
    "train-r4-1024": Compile(V3, "v5p:8x8x16", "data=2,fsdp=8,expert=64", rows=4, **chunks(4)),
    "kimi-k2-r2-1024": Compile("kimi-k2", "v5p:8x8x16", "data=2,fsdp=8,expert=64", rows=2, **chunks(2)),
    "moonlight-r4-64": Compile("moonlight-16b", "v5p:4x4x4", "fsdp=8,expert=8", rows=4),
    "prefill-fp8": Compile(V3, POD, EP64, program="prefill", rows=1, weights="fp8"),
    "decode-int8": Compile(V3, rows=8, weights="int8", **SERVE),
    "decode-fp8": Compile(V3, rows=8, weights="fp8", **SERVE),
    "v4-flash-train-r4-256": Compile(FLASH, "v5p:8x8x4", "fsdp=32,expert=8", rows=4),
    "v4-flash-decode-1m": Compile(FLASH, "v5p:4x4x4", "expert=64", program="decode", rows=1, context=1 << 20),
    "v4-flash-decode-1m-served": Compile(
        FLASH, "v5p:4x4x4", "expert=64", program="decode", rows=1, context=1 << 20, set=("cache=served",)
    ),
}
SMOKE = {"smoke": Compile("tiny-v3", "v5e:2x2", "fsdp=2,expert=2", length=128, mtp=False, loss_chunk=64)}
LARGEST = 12


def run(name: str, job: Compile, full: bool) -> dict:
    """One configuration's figures, or why it cannot be compiled."""
    began = time.monotonic()
    say = lambda text: print(f"{name}: {text}", flush=True)  # noqa: E731
    try:
        found = report(job.job(), quick=not full, say=say).as_dict(LARGEST)
    except ValueError as error:
        return {"error": str(error)}
    # Nearly all of the text, and of no use once the sums are made.
    found["time"].pop("transfers")
    return found | {"seconds": found["seconds"] | {"all": round(time.monotonic() - began, 1)}}


def table(results: dict) -> str:
    """Markdown: a line a configuration."""
    columns = [
        "configuration",
        "GB",
        "temporaries",
        "host GB",
        "step, s",
        "tokens/s/chip",
        "causal MFU",
        "exposed",
        "binds",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"| {name} | {r['error']} |||||||| ")
            continue
        memory, spent = r["memory"], r["time"]
        sizes = (f"{memory[what] / 1e9:.1f}" for what in ("total", "temporaries", "host"))
        mfu = r["flops_per_token_and_mfu"].get("causal", (0, None))[1]
        exposed = sum(spent["exposed"].values()) / spent["seconds"]
        fits = " (does not fit)" if r["out_of_memory"] else ""
        cells = [name + fits, *sizes, f"{spent['seconds']:.3g}", f"{r['tokens_per_second_chip']:.0f}"]
        cells += ["" if mfu is None else f"{mfu:.1%}", f"{exposed:.0%}", spent["binds"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CONFIGURATION", help=", ".join(CONFIGURATIONS))
    parser.add_argument("--full", action="store_true", help="generate code too")
    parser.add_argument("--table", action="store_true", help="print results.json as a table and end")
    parser.add_argument("--smoke", action="store_true", help="the tiny V3; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    arguments = parser.parse_args()
    known, out = (SMOKE, arguments.out) if arguments.smoke else (CONFIGURATIONS, arguments.out or RESULTS)
    results = json.loads(out.read_text())["configurations"] if out and out.exists() else {}
    if arguments.table:
        print(table(results))
        return 0
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"there is no configuration {', '.join(unknown)}; choose among {', '.join(known)}")
    for name in arguments.names or known:
        results[name] = run(name, known[name], arguments.full) | {"compiled_with": provenance()}
        ordered = {n: results[n] for n in known if n in results}
        if out is not None:
            write_json(out, {"configurations": ordered})
        print(table({name: results[name]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
