"""Speed on a CPU beside PyTorch transformers: a training step, prefill and decoding of a 34M-parameter V3 and of a
dense model of R1-Distill-Qwen's kind.

Both sides run the same weights and shapes in processes of their own that take turns, so that whatever else the
machine does meets both; figures are medians. The weights are stored in bfloat16, as published ones are, and both
sides compute in float32. PyTorch is taken at its best: the fastest of one and two threads and of its `eager` and
`grouped_mm` experts, each task for itself. Times vary from machine to machine; the ratios are the result. Both sides
run with malloc told to keep its memory, which spares each of them page faults. The cores that each side used are its
CPU time over its wall time. This package runs up to three times: as it is, with float32 parameters; where there is a
C++ compiler to build it, with `Context(experts="native", attention="native", linear="native", unrolled=True)`; and,
but for training, natively with the parameters as stored and `Context(dtype=jnp.float32)`, which computes the same of
half the bytes.

Beside them stands what the machine could do: useful FLOPs over the rate of a large product, and the bytes of the
weights and cached keys that a decoding step reads, in float32, over the rate at which all cores read memory together,
the slower of the two. A cache of the processor that holds a part of the weights may do better.

    python experiments/bench_cpu/run.py            # about 20 minutes on 2 cores; writes results.json beside itself
    python experiments/bench_cpu/run.py --only dense  # one of the models; the other's figures stay
    python experiments/bench_cpu/run.py --smoke    # the same code at toy size, in seconds

Needs the extra ``deepseek-jax[verify]``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import deepseek_jax as dsj
from deepseek_jax.analysis.counts import counts
from deepseek_jax.analysis.peaks import decoding_bytes
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.schema import GQA, MLA, ModelConfig, MoE
from deepseek_jax.kernels.native.library import compiler

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """What is run: a model, [rows, length] of the batches, tokens of a prompt and new ones, shapes of grouped matmuls
    (rows, inputs, outputs, experts), and the choices of (threads, experts' form) that PyTorch is tried with."""

    cfg: ModelConfig
    train: tuple[int, int]
    prefill: tuple[int, int]
    prompt: int
    new: int
    grouped: dict[str, tuple[int, int, int, int]]
    torch: tuple[tuple[int, str], ...]


CFG = ModelConfig(
    name="bench-cpu",
    vocab_size=4096,
    dim=320,
    n_layers=8,
    n_dense_layers=1,
    ffn_dim=640,
    attention=MLA(n_heads=8, q_rank=160, kv_rank=96, nope_dim=32, rope_dim=16, v_dim=32),
    moe=MoE(n_experts=32, top_k=4, expert_dim=128, n_shared=1, scale=2.5),
    max_length=4096,
    init_std=0.02,
)
FULL = Size(
    CFG,
    train=(8, 256),
    prefill=(8, 512),
    prompt=32,
    new=64,
    grouped={"grouped-32": (8192, 256, 256, 32), "grouped-64": (8192, 512, 256, 64)},
    torch=tuple((threads, experts) for threads in (1, 2) for experts in ("grouped_mm", "eager")),
)
DENSE = replace(
    FULL,
    cfg=ModelConfig(
        name="bench-cpu-dense",
        vocab_size=4096,
        dim=512,
        n_layers=8,
        n_dense_layers=8,
        ffn_dim=1792,
        attention=GQA(n_heads=8, n_kv_heads=2, head_dim=64, bias=True),
        moe=None,
        max_length=4096,
        init_std=0.02,
        model_type="qwen2",
    ),
    grouped={},
    torch=((1, "none"), (2, "none")),
)
SMALL = Size(
    replace(
        CFG,
        vocab_size=64,
        dim=32,
        n_layers=2,
        ffn_dim=32,
        attention=replace(CFG.attention, n_heads=2, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8),
        moe=replace(CFG.moe, n_experts=4, top_k=2, expert_dim=16),
        max_length=64,
    ),
    train=(2, 16),
    prefill=(2, 16),
    prompt=8,
    new=4,
    grouped={"grouped-4": (64, 16, 16, 4)},
    torch=((2, "grouped_mm"),),
)
SMALL_DENSE = replace(
    SMALL,
    cfg=replace(
        DENSE.cfg,
        vocab_size=64,
        dim=32,
        n_layers=2,
        n_dense_layers=2,
        ffn_dim=32,
        attention=replace(DENSE.cfg.attention, n_heads=2, n_kv_heads=1, head_dim=8),
        max_length=64,
    ),
    grouped={},
    torch=((2, "none"),),
)
MODELS = {"moe": (FULL, SMALL), "dense": (DENSE, SMALL_DENSE)}
TASKS = ("train", "prefill", "decode-1", "decode-8")
GROUPED_AIM = 2.5
AIMS = {"train": 1.5, "prefill": 2.0, "decode-1": 6.0, "decode-8": 6.0}
# How this package runs beside "auto", and under which name a task's figures have its ratio.
FORMS = {"native": "times_as_fast_native", "stored": "times_as_fast_stored"}
# Takes no part in training and in grouped matmuls, whose operands are float32.
STORED = "jax, stored"
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def machine(edge: int = 2048, numbers: int = 2**26) -> dict[str, float]:
    """FLOPs a second of a float32 product of square matrices and bytes a second that all cores read together, by NumPy,
    the best of five."""
    import numpy as np

    square = np.random.default_rng(0).normal(size=(edge, edge)).astype(np.float32)
    product = min(clocked(lambda: square @ square)[0] for _ in range(5))
    lists = np.ones((os.cpu_count(), numbers), np.float32)
    with ThreadPoolExecutor(len(lists)) as pool:
        read = min(clocked(lambda: list(pool.map(lambda a: a @ a, lists)))[0] for _ in range(5))
    return {"flops_a_second": round(2 * edge**3 / product), "bytes_a_second": round(lists.nbytes / read)}


def limit(size: Size, task: str, rates: dict[str, float]) -> float:
    """Tokens a second of a task at the machine's rates: see the head of this file."""
    cfg = size.cfg
    rows, length = {"train": size.train, "prefill": size.prefill}.get(task) or (int(task[-1]), 1)
    figures = counts(cfg, length if task in ("train", "prefill") else size.prompt + size.new // 2)
    if task == "train":
        return rates["flops_a_second"] / figures.flops_per_token
    if task == "prefill":
        # Of the last token alone the logits.
        return rates["flops_a_second"] / (figures.forward_flops_per_token - 2 * cfg.dim * cfg.vocab_size)
    read = decoding_bytes(cfg, rows, size.prompt + size.new // 2, width=4) / rates["bytes_a_second"]
    seconds = max(rows * figures.decode_flops_per_token / rates["flops_a_second"], read)
    return rows / seconds


def tokens(size: Size, batch: int, length: int):
    import numpy as np

    return np.random.default_rng(0).integers(2, size.cfg.vocab_size, (batch, length))


def clocked(f) -> tuple[float, float]:
    """Wall seconds and CPU seconds, of all threads, that a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def more(f, few: int, many: int) -> tuple[float, float]:
    """What f(many) takes more than f(few): a prompt's and a start's share cancels."""
    return tuple(b - a for a, b in zip(clocked(partial(f, few)), clocked(partial(f, many)), strict=True))


def jax_tasks(folder: str, size: Size, form: str) -> dict:
    """Task -> a function that runs it once and returns wall and CPU seconds. ``form``: "auto" or one of `FORMS`."""
    import jax
    import jax.numpy as jnp
    import optax

    model = dsj.load_pretrained(folder, dtype=jnp.float32)
    stored, form = form == "stored", "native" if form in FORMS else form
    ctx = dsj.Context(dtype=jnp.float32, experts=form, attention=form, linear=form, unrolled=form == "native")
    params, rest = dsj.partition(model)
    optimizer = optax.adamw(1e-4, 0.9, 0.95, weight_decay=0.1)
    state = [params, jax.jit(optimizer.init)(params)]
    weights = dsj.LossWeights(mtp=0.0, balance=0.0)

    def step(params, opt_state, batch):
        loss, gradient = jax.value_and_grad(lambda p: dsj.loss(dsj.combine(p, rest), batch, weights, ctx)[0])(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    batch = {"tokens": jnp.asarray(tokens(size, *size.train), jnp.int32)}
    prompt = jnp.asarray(tokens(size, *size.prefill), jnp.int32)
    # A model of its own: training donates the parameters it was given.
    reader = dsj.load_pretrained(folder, dtype=None if stored else jnp.float32)

    @jax.jit
    def forward(model, tokens, cache):
        # Logits and cache, as PyTorch returns: what else this package reports is not computed then.
        out = model(tokens, cache=cache, logits="last", ctx=ctx)
        return out.logits, out.cache

    def train():
        *state[:], loss = step(*state, batch)
        loss.block_until_ready()

    def prefill():
        cache = jax.block_until_ready(reader.init_cache(*size.prefill, ctx=ctx))
        return clocked(lambda: jax.block_until_ready(forward(reader, prompt, cache)))

    def decode(rows):
        prompts = tokens(size, rows, size.prompt).tolist()
        generate = lambda new: dsj.generate(reader, prompts, max_new_tokens=new, stop_ids=(), ctx=ctx)  # noqa: E731
        return partial(more, generate, 1, size.new + 1)

    tasks = {"train": partial(clocked, train), "prefill": prefill, "decode-1": decode(1), "decode-8": decode(8)}
    if size.cfg.moe is None:
        return tasks
    tasks |= {name: partial(grouped, form, *shape) for name, shape in size.grouped.items()}
    return tasks | {"parts": lambda: parts(reader, size)}


def seconds(f, *arguments) -> float:
    """The median of five runs after one that compiles."""
    import jax

    values = []
    for turn in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        if turn:
            values.append(time.perf_counter() - begin)
    return statistics.median(values)


def grouped(form: str, rows: int, inputs: int, outputs: int, experts: int) -> dict[str, float]:
    """Times of the grouped matmul over one dense product of the same FLOPs, with uneven loads."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from deepseek_jax.kernels.grouped import grouped_matmul, grouped_outer

    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float32) for n in (inputs, outputs))
    w = jnp.asarray(rng.normal(size=(experts, inputs, outputs)), jnp.float32)
    sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(experts, 2.0))), jnp.int32)
    forward = jax.jit(lambda x, w: grouped_matmul(x, w, sizes, form))
    backward = jax.jit(
        lambda x, y, w: (grouped_matmul(y, w, sizes, form, True), grouped_outer(x, y, sizes, form, w.dtype))
    )
    dense_forward = jax.jit(lambda x, w: x @ w)
    dense_backward = jax.jit(lambda x, y, w: (y @ w.T, x.T @ y))
    return {
        "forward": seconds(forward, x, w) / seconds(dense_forward, x, w[0]),
        "backward": seconds(backward, x, y, w) / seconds(dense_backward, x, y, w[0]),
    }


def parts(model, size: Size) -> dict[str, float]:
    """Seconds of a training step's parts, forward and backward, each alone and times its number of layers."""
    import jax
    import jax.numpy as jnp
    import optax

    from deepseek_jax.core.context import DEFAULT
    from deepseek_jax.core.params import unstack
    from deepseek_jax.model.tokens import make_tokens
    from deepseek_jax.train.loss import cross_entropy

    cfg, batch = size.cfg, jnp.asarray(tokens(size, *size.train), jnp.int32)
    x = jax.random.normal(jax.random.key(1), (*size.train, cfg.dim))
    position = jnp.broadcast_to(jnp.arange(size.train[1]), size.train)
    seen = make_tokens(cfg, position, jnp.ones(size.train, jnp.int32), causal=True, alike=True, uniform=True)
    layer = unstack(model.stacks[1], 0)

    def gradient(f, module):
        params, rest = dsj.partition(module)
        return seconds(jax.jit(jax.grad(lambda p, x: f(dsj.combine(p, rest), x).sum(), argnums=(0, 1))), params, x)

    params, _ = dsj.partition(model)
    optimizer = optax.adamw(1e-4, 0.9, 0.95, weight_decay=0.1)
    state = jax.jit(optimizer.init)(params)
    head = model.head.get_value()
    loss = jax.jit(jax.grad(lambda w, x: cross_entropy(jnp.einsum("BTD,DV->BTV", x, w), batch)[0], argnums=(0, 1)))
    return {
        "attention": cfg.n_layers * gradient(lambda m, x: m(x, seen, DEFAULT)[0], layer.attn),
        "MoE networks": cfg.n_moe_layers * gradient(lambda m, x: m(x, seen, DEFAULT)[0], layer.ffn),
        "of these, shared experts": cfg.n_moe_layers * gradient(lambda m, x: m(x, DEFAULT), layer.ffn.shared),
        "dense network": gradient(lambda m, x: m(x, DEFAULT), unstack(model.stacks[0], 0).ffn),
        "head and loss": seconds(loss, head, x),
        "optimizer": seconds(jax.jit(optimizer.update), params, state, params),
    }


def torch_tasks(folder: str, size: Size, threads: int, experts: str) -> dict:
    import torch

    from deepseek_jax.convert.verify import reference_model

    torch.set_num_threads(threads)
    model = reference_model(folder).main
    if size.cfg.moe is not None:
        model.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.1)
    batch, prompt = (torch.as_tensor(tokens(size, *shape)) for shape in (size.train, size.prefill))

    def train():
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def prefill():
        model(prompt, use_cache=True, logits_to_keep=1)

    def decode(rows):
        prompts = torch.as_tensor(tokens(size, rows, size.prompt))
        mask, limits = torch.ones_like(prompts), {"do_sample": False, "pad_token_id": 1}

        def generate(new):
            model.generate(prompts, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, **limits)

        return partial(more, generate, 1, size.new + 1)

    tasks = {name: partial(clocked, f) for name, f in (("train", train), ("prefill", prefill))}
    return tasks | {"decode-1": decode(1), "decode-8": decode(8)}


def work(side: str, folder: str, size: Size, threads: int, experts: str) -> None:
    """A side's process: reads a task a line, answers with what it took."""
    tasks = jax_tasks(folder, size, experts) if side == "jax" else torch_tasks(folder, size, threads, experts)
    for line in sys.stdin:
        print(json.dumps(tasks[line.strip()]()), flush=True)


class Side:
    def __init__(self, name: str, folder: str, model: str, smoke: bool, threads: int = 2, experts: str = "auto"):
        self.name, self.label = name, name
        if name == "jax":
            self.label += f", {experts}" * (experts != "auto")
        else:
            self.label += f", {threads} threads" + (f", {experts}" if experts != "none" else "")
        command = [sys.executable, __file__, *["--smoke"] * smoke, "--only", model]
        command += ["--side", name, folder, str(threads), experts]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=os.environ | MALLOC, **pipes)

    def run(self, task: str):
        print(task, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label} ended at {task}; its error stands above.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, size: Size, repeats: int, smoke: bool, folder: str, rates: dict[str, float]) -> dict:
    """The figures of one model, both sides on the weights in ``folder``; ``rates`` are `machine`'s."""
    forms = ["auto", *FORMS] if compiler() else ["auto"]
    if len(forms) == 1:
        print("there is no C++ compiler here: native forms are left out", flush=True)
    sides = [Side("jax", folder, name, smoke, experts=form) for form in forms]
    sides += [*(Side("torch", folder, name, smoke, *c) for c in size.torch)]
    results = {}
    for task in TASKS:
        able = [side for side in sides if task != "train" or side.label != STORED]
        seconds = {side.label: [] for side in able}
        for turn in range(repeats + 1):
            for side in able:
                value = side.run(task)
                if turn:
                    seconds[side.label].append(value)
        medians = {label: statistics.median(wall for wall, _ in values) for label, values in seconds.items()}
        cores = {label: statistics.median(cpu / wall for wall, cpu in v) for label, v in seconds.items()}
        best = min((label for label in medians if label.startswith("torch")), key=medians.get)
        ratio = medians[best] / medians["jax"]
        others = {
            name: medians[best] / medians[f"jax, {form}"] for form, name in FORMS.items() if f"jax, {form}" in medians
        }
        rows, length = {"train": size.train, "prefill": size.prefill}.get(task) or (int(task[-1]), size.new)
        results[task] = {
            "times_as_fast": round(ratio, 3),
            **{name: round(other, 3) for name, other in others.items()},
            **({"aim": AIMS[task]} if name == "moe" else {}),
            "torch_at_its_best": best,
            "limit": round(limit(size, task, rates), 1),
            "tokens_a_second": {k: round(rows * length / v, 1) for k, v in medians.items()},
            "cores_used": {k: round(v, 2) for k, v in cores.items()},
            "seconds": {k: [round(wall, 4) for wall, _ in v] for k, v in seconds.items()},
        }
        print(f"{name} {task:9} {ratio:5.2f} x torch at its best ({best})", flush=True)
        print(f"          {'what the machine could do':28} {results[task]['limit']:9.0f} tokens a second", flush=True)
        for label, median in medians.items():
            rate = f"{rows * length / median:9.0f} tokens a second on {cores[label]:.2f} cores"
            print(f"          {label:28} {rate}", flush=True)
    for shape in size.grouped:
        results[shape] = {"aim": GROUPED_AIM}
        for side in (side for side in sides[: len(forms)] if side.label != STORED):
            found = {way: round(value, 2) for way, value in side.run(shape).items()}
            results[shape] |= found if side.label == "jax" else {"native": found}
            times = ", ".join(f"{way} {value:.2f} x" for way, value in found.items())
            print(f"{shape:10} {side.label:12} {times} one dense product's time; aim {GROUPED_AIM} x", flush=True)
    if size.cfg.moe is not None:
        results["parts"] = {part: round(value, 4) for part, value in sides[0].run("parts").items()}
        print("where a training step's time goes, each part alone, in seconds:")
        for part, value in results["parts"].items():
            print(f"          {part:28} {value:9.3f}")
    for side in sides:
        side.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs a task and side, after one to warm up")
    parser.add_argument("--only", choices=MODELS, help="this model alone; the results file keeps the other's figures")
    parser.add_argument("--smoke", action="store_true", help="toy size, one run each; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    parser.add_argument("--side", nargs=4, metavar=("NAME", "FOLDER", "THREADS", "EXPERTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    repeats = 1 if given.smoke else given.repeats
    sizes = {name: small if given.smoke else full for name, (full, small) in MODELS.items()}
    if given.side:
        name, folder, threads, experts = given.side
        return work(name, folder, sizes[given.only], int(threads), experts)

    import jax
    import jax.numpy as jnp

    out = given.out or (None if given.smoke else HERE / "results.json")
    record = json.loads(out.read_text()) if out is not None and given.only and out.exists() else {}
    rates = machine(128, 1024) if given.smoke else machine()
    print(
        f"a product runs at {rates['flops_a_second'] / 1e9:.0f} GFLOP/s; memory is read at "
        f"{rates['bytes_a_second'] / 1e9:.1f} GB/s"
    )
    for name, size in sizes.items():
        if given.only in (None, name):
            with tempfile.TemporaryDirectory() as temporary:
                folder = str(Path(temporary) / "checkpoint")
                model = dsj.init(size.cfg, jax.random.key(0), dtype=jnp.bfloat16)
                dsj.save_pretrained(model, folder)
                parameters = sum(a.size for a in jax.tree.leaves(model))
                results = compare(name, size, repeats, given.smoke, folder, rates)
            found = provenance() | {"parameters": parameters, "machine_rates": rates, "results": results}
            record |= found if name == "moe" else {name: found}
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
