"""Writes the figures of README and its relatives from the results that lie here, each with the commit it belongs to.

    python experiments/figures.py            # rewrites every block of figures
    python experiments/figures.py --check    # names the files whose blocks are not what the results say, and fails

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``. `BLOCKS` makes each from committed
results and nothing else, so that text and results cannot differ. Results name their commit, date and machine
(`deepseek_jax.analysis.provenance`); for those from before they did, `EARLIER` has the commit that brought them.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
TEXTS = (
    "README.md",
    "experiments/README.md",
    "experiments/bench_cpu/README.md",
    "experiments/compile_671b/README.md",
    "deepseek_jax/convert/README.md",
    "deepseek_jax/runs/README.md",
)
# From the history of each file.
EARLIER = {
    "bench_convert": ("5da5900", "2026-11-22"),
    "bench_cpu": ("fe39146", "2026-11-21"),
    "bench_data": ("a440a6b", "2026-11-21"),
    "bench_step": ("c555a01", "2026-11-21"),
    "bench_train": ("2454505", "2026-11-21"),
    "compile_671b": ("a439bff", "2026-11-22"),
}
TASKS = {
    "train": "training step, 8 x 256, AdamW",
    "prefill": "prefill, 8 x 512",
    "decode-1": "decoding, batch 1",
    "decode-8": "decoding, batch 8",
}
# Rows of the README's table of pods: configuration -> what it is.
PODS = {
    "train-r4": "512 v5p, 4 rows a chip",
    "train-r8": "512 v5p, 8 rows",
    "train-r8-offload": "512 v5p, 8 rows, layer inputs on the host",
    "train-r16-ep8-offload": "512 v5p, 16 rows, layer inputs on the host",
    "train-r4-1024": "1024 v5p, 4 rows",
    "decode-int8": "64 v5e, decoding 512 rows of 4096 tokens from int8",
}
STEPS = (200, 800, 1000, 1400, 1600, 2000)


def results(stem: str) -> dict:
    return json.loads((HERE / stem / "results.json").read_text(encoding="utf-8"))


def origin(stem: str, record: dict) -> str:
    """Commit, date, processor and cores, as far as a record knows them."""
    known = EARLIER.get(stem, (None, None))
    commit, date = record.get("commit") or known[0], record.get("date") or known[1]
    machine = record.get("machine") or {"cores": record.get("cores") or record.get("cpus")}
    name = f", {machine['processor']}" if machine.get("processor") else ""
    return f"commit {commit}, {date}{name}, {machine['cores']} cores"


def measured(stem: str) -> str:
    return f"Measured at {origin(stem, results(stem))}. Later code may be faster or slower."


def rows(header: str, lines: list[list[str]]) -> str:
    return "\n".join([header, "|---" * (header.count("|") - 1) + "|", *(f"| {' | '.join(line)} |" for line in lines)])


def elsewhere() -> list[dict]:
    return json.loads((HERE / "bench_cpu" / "elsewhere.json").read_text(encoding="utf-8"))


def speed() -> str:
    record, others = results("bench_cpu"), elsewhere()
    lines = []
    for prefix, found in (("", record["results"]), ("dense: ", record["dense"]["results"])):
        for task, what in TASKS.items():
            r = found[task]
            rates = r["tokens_a_second"]
            native, stored = (
                f"{r[name]:.2f}" if name in r else "" for name in ("times_as_fast_native", "times_as_fast_stored")
            )
            ratios = "" if prefix else ", ".join(f"{o['times_as_fast'][task]:.2f}" for o in others)
            natively = (
                ""
                if prefix
                else ", ".join(f"{o['times_as_fast_native'][task]:.2f}" for o in others if "times_as_fast_native" in o)
            )
            shown = [f"{n:.0f}" for n in (rates["jax"], rates[r["torch_at_its_best"]])]
            line = [
                prefix + what,
                *shown,
                f"**{r['times_as_fast']:.2f}**",
                ratios,
                native,
                natively,
                stored,
                str(r.get("aim", "")),
            ]
            lines.append([*line, f"{r['limit']:.0f}"])
    columns = ["task", "tokens a second", "PyTorch at its best", "ratio", "elsewhere", "native", "native, elsewhere"]
    header = f"| {' | '.join([*columns, 'native, as stored', 'aim', 'limit'])} |"
    other = "Elsewhere: " + "; ".join(f"{o['machine']}, {o['about']}" for o in others)
    dense = f"The dense model: {origin('bench_cpu', record['dense'])}"
    return f"{rows(header, lines)}\n\n{measured('bench_cpu')} {dense}. {other}."


def speed_parts() -> str:
    record = results("bench_cpu")["results"]
    step = sorted(record["train"]["seconds"]["jax"])[len(record["train"]["seconds"]["jax"]) // 2]
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in record["parts"].items())
    matmul = "; ".join(
        f"{name.split('-')[1]} experts: {r['forward']} times, backward {r['backward']} times"
        for name, r in record.items()
        if name.startswith("grouped")
    )
    natively = "; ".join(
        f"{name.split('-')[1]} experts: {r['native']['forward']} times, backward {r['native']['backward']} times"
        for name, r in record.items()
        if name.startswith("grouped")
    )
    lines = [
        f"A training step takes {step:.2f} s; its parts, each alone: {parts}.",
        f"The grouped matmul beside a dense product of the same FLOPs, {matmul}; natively, {natively}.",
        measured("bench_cpu"),
    ]
    for other in elsewhere():
        took = other["train_step"]
        used = took["cpu_seconds"] / took["wall_seconds"]
        lines.append(
            f"On {other['machine']}, a training step took {took['wall_seconds']} s at "
            f"{took['cpu_seconds']} s of CPU time: {used:.1f} cores."
        )
    return "\n".join(lines)


def conversion() -> str:
    record = results("bench_convert")
    lines = []
    for name, what in (("to_orbax", "`convert`, to Orbax"), ("to_published", "`convert`, back")):
        r = record[name]
        time = f"{r['minutes_for_deepseek_v3']:.0f} minutes at {r['GB_per_s']:.2f} GB/s"
        lines.append([what, "the source and 688.6 GB", f"{r['peak_resident_bytes'] / 1e9:.1f} GB", time])
    lines.append(
        ["`verify --layers 4`", "the files of these layers", "60 GB: the cut in float32, one side after the other", ""]
    )
    lines.append(["`verify`", "the source", "2.7 TB: the model in float32, likewise", ""])
    speeds = [record["bytes"] / 1e9 / seconds for seconds in record["copy"]["runs"]]
    copies = f"plain copies ran at {record['copy']['GB_per_s']:.2f} GB/s ({min(speeds):.2f} to {max(speeds):.2f})"
    return f"{rows('| | disk | memory | time |', lines)}\n\n{measured('bench_convert')} The {copies} beside it."


def pods() -> str:
    found = results("compile_671b")["configurations"]
    lines = []
    for name, what in PODS.items():
        r = found[name]
        rate = f"{r['tokens_per_second_chip']:.0f}"
        rate += "" if r["program"]["kind"] == "train" else f", {1e3 * r['time']['seconds']:.0f} ms a step"
        causal = r["flops_per_token_and_mfu"].get("causal", (0, None))[1]
        rate += f" (causal MFU {causal:.0%})" if name == "train-r8" else ""
        lines.append([what, f"{r['memory']['total'] / 1e9:.1f}", rate])
    header = "| V3, 4096 tokens a row, nothing dropped, MTP | GB a chip | tokens/s/chip, estimated |"
    return f"{rows(header, lines)}\n\n{compiled(found['train-r8'])}"


def compiled(configuration: dict) -> str:
    head = configuration["compiled_with"]
    versions = head.get("versions", head)
    about = ", ".join(f"{name} {versions[name]}" for name in ("jax", "libtpu"))
    return f"Compiled at {origin('compile_671b', head)}, {about}."


def all_pods() -> str:
    found = results("compile_671b")["configurations"]
    return f"{_run('compile_671b').table(found)}\n\n{compiled(found['train-r8'])}"


def shipped() -> list[dict]:
    """The evaluations of the shipped model's run."""
    text = (ROOT / "checkpoints" / "tiny-v3" / "training" / "metrics.jsonl").read_text(encoding="utf-8")
    return [record for record in map(json.loads, text.splitlines()) if record["kind"] == "evaluation"]


def shipped_line() -> str:
    last = shipped()[-1]
    bits, trigram, tokens = last["bits_per_byte"], last["trigram_bits_per_byte"], last["tokens"] / 1e6
    return (
        f"It measures {bits:.3f} bits per byte of held-out files after {tokens:.1f} million tokens, against "
        f"{trigram:.3f}\nof a trigram counted on the same tokens; its MTP module's best token is the model's own in "
        f"{last['draft_agreement']:.0%} of places."
    )


def shipped_table() -> str:
    found = shipped()
    chosen = [r for r in found if r["step"] in STEPS] + found[-1:]
    crossing = {
        what: next((r["step"] for r in found if r[what] < r["trigram_bits_per_byte"]), None)
        for what in ("ema_bits_per_byte", "bits_per_byte")
    }
    lines = []
    for r in chosen:
        name = f"{r['step']} steps"
        if r["step"] == crossing["ema_bits_per_byte"]:
            name = f"**{name}: the average crosses**"
        if r["step"] == crossing["bits_per_byte"]:
            name = f"**{name}: the model crosses**"
        figures = (r["bits_per_byte"], r["ema_bits_per_byte"], r["trigram_bits_per_byte"])
        cells = [f"{r['tokens'] / 1e6:.2f}M", *(f"{v:.3f}" for v in figures), f"{r['draft_agreement']:.0%}"]
        lines.append([name, *cells])
    header = "| after | tokens | model, bits per byte | its moving average | trigram, same tokens | drafts agree |"
    return rows(header, lines)


def ledger() -> str:
    """The measurements, a line each; those of a GPU have no results."""
    cpu, convert, data, step, train = (results(f"bench_{name}") for name in ("cpu", "convert", "data", "step", "train"))
    ratio = [f"{cpu['results'][task]['times_as_fast']:.2f}" for task in TASKS]
    other = [f"{elsewhere()[0]['times_as_fast'][task]:.2f}" for task in TASKS]
    drawn = [batch for source in data["sources"] for batch in source["batches"]]
    slowest, longest = (f([b[n] for b in drawn]) for f, n in ((min, "tokens_per_second"), (max, "longest_wait_s")))
    orbax, back = convert["to_orbax"], convert["to_published"]
    shares = sorted(step["shares_of_a_step"].items(), key=lambda item: -item[1])
    last = train["evaluations"][-1]
    reading, before = results("bench_reading"), json.loads((HERE / "bench_reading" / "baseline.json").read_text())
    read, was = (record["totals"]["loss"] for record in (reading, before))
    found = {
        "bench_convert": (
            f"speed and memory of `deepseek-jax convert` on V3's real shapes, {convert['bytes'] / 1e9:.1f} GB",
            f"{orbax['GB_per_s']:.2f} GB/s to Orbax, {back['GB_per_s']:.2f} GB/s back, in "
            f"{orbax['peak_resident_bytes'] / 1e9:.1f} GB of memory; plain flushed copies ran at "
            f"{convert['copy']['GB_per_s']:.2f} GB/s",
        ),
        "bench_cpu": (
            f"training step, prefill and decoding of a {cpu['parameters'] / 1e6:.0f}M-parameter V3 beside PyTorch "
            "transformers; grouped matmul beside a dense product; cores used",
            f"times as fast in training, in prefill, in decoding at batch 1 and 8: {', '.join(ratio)}; on another "
            f"machine {', '.join(other)}",
        ),
        "bench_data": (
            "tokens a second of the input pipeline, from token files to batches, FIM at 0.1, with and without masks",
            f"at least {slowest / 1e6:.1f}M a second in every setting; the longest wait, at the start of an epoch, "
            f"{longest:.1f} s",
        ),
        "bench_reading": (
            "what is to be read for a forward pass of V3, configuration, cache and loss included; the goal is "
            f"{reading['goal_code']:,} lines of code",
            f"{read['files']} files, {read['lines']:,} lines, {read['code']:,} of code, {read['called']:,} without the "
            f"functions that are never called; at commit {before['commit']} {was['files']}, {was['lines']:,}, "
            f"{was['code']:,}, {was['called']:,}",
        ),
        "bench_step": (
            "where the time of a training step of the tiny V3 goes, in CPU time",
            ", ".join(f"{name} {share:.0%}" for name, share in shares),
        ),
        "bench_train": (
            "how soon a tiny V3 beats a Kneser-Ney trigram counted on the same tokens, held-out bits per byte",
            f"after {train['crossed_at_minute']:.1f} minutes; {last['bits_per_byte']:.3f} against "
            f"{last['trigram_bits_per_byte']:.3f} after {last['minutes']:.1f} (aim: {train['aim_minutes']}); one seed",
        ),
    }
    loading = results("bench_load")
    made, torch = loading["generate"], loading["torch"]
    found["bench_load"] = (
        f"loading {loading['model']}'s real shapes in bfloat16 on a CPU, and decoding beside PyTorch transformers",
        f"loading takes {loading['load']['times_the_weights']:.2f} times the weights' bytes (aim: {loading['aim']}); "
        f"{made['tokens_a_second']:.1f} tokens a second in {made['peak_bytes'] / 1e9:.1f} GB, the first after "
        f"{made['first_token_seconds']:.1f} s; PyTorch {torch['tokens_a_second']:.1f}, after "
        f"{torch['first_token_seconds']:.1f} s; one run, one side after the other",
    )
    support = results("bench_support")
    worst = max(errors["logits"] for errors in support["measured"].values())
    found["bench_support"] = (
        f"errors of {len(support['measured'])} architectures against the reference, by their tests; a step of each "
        "compiled at full size",
        f"logits within {worst:.0e} of the largest; README has the table",
    )
    contexts = results("bench_long_context")["results"]
    of_v3 = (
        f"at {int(length) // 1024}k "
        + ", ".join(
            f"{name.replace('v', 'V')} {found['step_over_v3']:.2f} and {found['cache_over_v3']:.2f}"
            for name, found in models.items()
            if name != "v3"
        )
        for length, models in contexts.items()
    )
    found["bench_long_context"] = (
        "decoding one row of a long context on the CPU: a step of V3.2 and V4 beside V3's, in miniature",
        f"of V3's time and cache bytes: {'; '.join(of_v3)}",
    )
    serving = results("bench_serve")
    faster = {pair: each["tokens_a_second_ratio"] for pair, each in serving["ratios"].items()}
    sooner = {pair: each["first_token_p50_ratio"] for pair, each in serving["ratios"].items()}
    beside, drafting = "slots / static", "slots, drafts / static, drafts"
    sharing = "one beginning, shared / one beginning, fed whole"
    found["bench_serve"] = (
        f"{serving['requests']} clients, texts of mixed lengths, in {serving['slots']} slots that come and go, beside "
        "static batches and PyTorch transformers",
        f"{faster[beside]:.2f} times the tokens a second, {sooner[beside]:.2f} times the median time to a first token; "
        f"with drafts on both sides {faster[drafting]:.2f} and {sooner[drafting]:.2f}; slots with drafts over slots "
        f"without {faster['slots, drafts / slots']:.2f} ({serving['accepted_share']:.0%} of drafts accepted), with one "
        f"grammar {faster['slots, one grammar / slots']:.2f}; sharing a common beginning {faster[sharing]:.2f} and "
        f"{sooner[sharing]:.2f}"
        + "".join(
            f"; {words} {faster[pair]:.2f} and {sooner[pair]:.2f}"
            for pair, words in (
                ("slots, over HTTP / slots", "asked over HTTP"),
                ("distill, slots / distill, transformers", "a dense model beside transformers' continuous batching"),
            )
            if pair in faster
        ),
    )
    lines = [[f"`{stem}`", *what, origin(stem, results(stem))] for stem, what in found.items()]
    on_gpu = {
        "bench_gpu": "a training step of a 4.8B-parameter V3 (1.1B activated) in bfloat16 beside PyTorch transformers",
        "bench_gpu_decode": "decoding of V2-Lite's real shapes in bfloat16, beside the bandwidth of the GPU's memory",
    }
    unrun = "not run yet, for want of a GPU; its code is tested at toy size on a CPU"
    lines += [[f"`{stem}`", f"{what}, on one GPU", unrun, ""] for stem, what in on_gpu.items()]
    pod = results("compile_671b")["configurations"]["train-r8"]["compiled_with"]
    about = "DeepSeek-V3 at full size compiled for TPU slices: memory a chip, and a time estimated from the schedule"
    lines.append(["`compile_671b`", about, "see its README", origin("compile_671b", pod)])
    return rows("| stem | what is measured | outcome | commit, date, machine |", lines)


def support() -> str:
    """A row an architecture: what is byte-equal, the largest relative error of each kind, a compiled step's memory."""
    record = results("bench_support")
    v3 = results("compile_671b")["configurations"]["train-r4"]
    record["compiled"]["tiny-v3"] = {"release": "deepseek-v3", "topology": "v5p:8x8x8", "bytes": v3["memory"]["total"]}
    header = "| release | load, export | logits | routing | gradients | decode | MTP | mesh | compiled, GB a chip |"
    at = ", ".join(sorted({f"{commit}" for commit in record["at"].values()}))
    return f"{rows(header, _run('bench_support').table(record))}\n\nMeasured at commit {at}, {record['date']}."


def studies() -> str:
    """The ledger of the workbench: a row a claim, its verdict computed from the committed runs."""
    from deepseek_jax.lab.records import Runs
    from deepseek_jax.lab.study import load, stems

    made = Runs(HERE / "runs")
    return verdicts((study, made.of(study)) for study in (load(HERE, stem) for stem in stems(HERE)))


def drills() -> str:
    """The same of the studies of reinforcement learning."""
    from deepseek_jax.lab.practice import runs
    from deepseek_jax.lab.study import defined

    found = [(drill, path.parent) for path in sorted(HERE.glob("*/run.py")) if (drill := defined(path, "DRILL"))]
    return verdicts((drill, runs(drill, folder / "results")) for drill, folder in found)


def verdicts(studies: Iterable) -> str:
    from deepseek_jax.lab.verdicts import ledger

    return rows("| stem | claim | what it says, with its source | verdict | rests on |", ledger(studies))


BLOCKS: dict[str, Callable[[], str]] = {
    "support": support,
    "speed": speed,
    "speed-parts": speed_parts,
    "conversion": conversion,
    "pods": pods,
    "all-pods": all_pods,
    "shipped-line": shipped_line,
    "shipped-table": shipped_table,
    "studies": studies,
    "drills": drills,
    "ledger": ledger,
}


def _run(stem: str):
    """An experiment's script as a module."""
    spec = importlib.util.spec_from_file_location(stem, HERE / stem / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def renewed(text: str) -> str:
    """A text with all its blocks as the results say. Raises KeyError for a block that nothing makes."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a block is not current")
    check, stale = parser.parse_args().check, []
    for name in TEXTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if renewed(text) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(renewed(text), encoding="utf-8")
    print(*(f"{'not current' if check else 'rewritten'}: {name}" for name in stale), sep="\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
