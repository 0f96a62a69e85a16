"""Where the time of a training step goes: the parts of the tiny V3's step on a CPU, as shares of the whole.

`train_step` runs as the recipe `tiny` runs it (micro-batches of 2 rows of 512 tokens, MTP, Muon beside AdamW, a moving
average); then each part runs alone, forward and backward, at the same shapes, times how often a step has it. Time is
the process's CPU time, in which other programs on the machine do not count; the parts take turns, round by round, and
the fastest round counts. What the parts do not explain (embedding, residual stream, MTP's projection, the copies of
the scan over layers, clipping, average, metrics) is the remainder; a part alone may also be faster or slower than
within the step, which the remainder takes up. The wait for data is measured apart, by `bench_data`.

    python experiments/bench_step/run.py           # about three minutes on 2 cores; writes results.json beside itself
    python experiments/bench_step/run.py --smoke   # the same code at toy size
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.core.context import DEFAULT
from deepseek_jax.core.params import named, unstack
from deepseek_jax.core.partition import partition
from deepseek_jax.model.experts import routed_experts
from deepseek_jax.model.tokens import make_tokens
from deepseek_jax.train import optim
from deepseek_jax.train.loss import cross_entropy
from deepseek_jax.train.objective import Knobs, NextToken
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.recipes import recipe
from deepseek_jax.train.schedule import setting
from deepseek_jax.train.step import start, train_step

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bench:
    """A model, and how it is trained."""

    cfg: ModelConfig
    recipe: Recipe


FULL = Bench(dsj.zoo("tiny-v3"), recipe("tiny"))
SMOKE = Bench(
    replace(
        FULL.cfg,
        vocab_size=64,
        dim=32,
        n_layers=2,
        ffn_dim=32,
        attention=replace(FULL.cfg.attention, n_heads=2, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8),
        moe=replace(FULL.cfg.moe, expert_dim=16),
    ),
    replace(FULL.recipe, length=16),
)


def compiled(f: Callable, *arguments, donate: tuple[int, ...] = ()) -> Callable:
    return jax.jit(f, donate_argnums=donate).lower(*arguments).compile()


def timed(f: Callable, *arguments) -> float:
    begin = time.process_time()
    jax.block_until_ready(f(*arguments))
    return time.process_time() - begin


def whole(bench: Bench) -> Callable[[], float]:
    """The step itself, at the batch after the ramp, on a model of its own, which it donates."""
    cfg, recipe = bench.cfg, bench.recipe
    model = dsj.init(cfg, jax.random.key(0))
    now = setting(recipe, recipe.tokens // 2, 1000)
    tokens = np.random.default_rng(0).integers(2, cfg.vocab_size, (now.micro_batches, recipe.pass_rows, recipe.length))
    batch, knobs = {"tokens": jnp.asarray(tokens, jnp.int32)}, Knobs.of(now)
    optimizer = optim.make(recipe.optimizer, partition(model)[0])
    settings = {
        "optimizer": optimizer,
        "objective": NextToken(recipe.weights, cfg.mtp_depth),
        "clip": recipe.optimizer.clip,
    }
    step = partial(train_step, ctx=DEFAULT, ema_decay=recipe.ema_decay, **settings)
    held = [start(model, optimizer, average=recipe.ema_decay > 0)]
    step = compiled(step, held[0], batch, knobs, donate=(0,))

    def run() -> float:
        begin = time.process_time()
        held[0], metrics = step(held[0], batch, knobs)
        jax.block_until_ready((held[0], metrics))
        return time.process_time() - begin

    return run


def parts(model, bench: Bench) -> dict[str, tuple[int, Callable[[], float]]]:
    """Part -> (how often a micro-batch has it, a function that runs it once and returns its seconds).

    A step has one optimizer update whatever the number of its micro-batches.
    """
    cfg, recipe = bench.cfg, bench.recipe
    B, T, D = recipe.pass_rows, recipe.length, cfg.dim
    tokens = jax.random.randint(jax.random.key(0), (B, T), 2, cfg.vocab_size)
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    seen = make_tokens(cfg, position, jnp.ones((B, T), jnp.int32), causal=True, alike=True, uniform=True)
    layer = unstack(model.stacks[1], 0)
    depth, moe = cfg.mtp_depth, cfg.n_moe_layers + cfg.mtp_depth
    routing = jax.jit(lambda x: layer.ffn.router(x, seen, DEFAULT))(x)

    def gradient(f: Callable, module, *arguments) -> Callable[[], float]:
        params, rest = partition(module)

        def total(params, *arguments):
            return f(dsj.combine(params, rest), *arguments).sum()

        g = compiled(jax.grad(total, argnums=(0, 1)), params, *arguments)
        return partial(timed, g, params, *arguments)

    def experts(ffn, x, weight):
        rows = (a.reshape(B * T, -1) for a in (x, routing.index_BTK, weight))
        return routed_experts(*rows, ffn.gate_up, ffn.down, DEFAULT.experts)

    def head(model, x):
        return cross_entropy(model.unembed(x), tokens)[0]

    found = {
        "attention": (cfg.n_layers + depth, gradient(lambda m, x: m(x, seen, DEFAULT)[0], layer.attn, x)),
        "routed experts": (moe, gradient(experts, layer.ffn, x, routing.weight_BTK)),
        "router": (moe, gradient(lambda m, x: m(x, seen, DEFAULT).weight_BTK, layer.ffn.router, x)),
        "shared experts": (moe, gradient(lambda m, x: m(x, DEFAULT), layer.ffn.shared, x)),
        "dense network": (cfg.n_dense_layers, gradient(lambda m, x: m(x, DEFAULT), unstack(model.stacks[0], 0).ffn, x)),
        "norms of the residual stream": (2 * (cfg.n_layers + depth), gradient(lambda m, x: m(x), layer.attn_norm, x)),
        "head and loss": (1 + depth, gradient(head, model, x)),
    }
    params = partition(model)[0]
    values, optimizer = named(params), optim.make(recipe.optimizer, params)
    state = jax.jit(optimizer.init)(values)
    update = compiled(optimizer.update, values, state, values)
    return found | {"optimizer": (1, partial(timed, update, values, state, values))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds after one to warm up")
    parser.add_argument("--smoke", action="store_true", help="toy size, one round; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    given = parser.parse_args()
    bench, rounds = (SMOKE, 1) if given.smoke else (FULL, given.rounds)
    cfg, recipe = bench.cfg, bench.recipe
    model = dsj.init(cfg, jax.random.key(0))
    found = parts(model, bench)
    step = whole(bench)
    micro = setting(recipe, recipe.tokens // 2, 1000).micro_batches
    seconds: dict[str, list[float]] = {name: [] for name in ("whole step", *found)}
    for turn in range(rounds + 1):
        for name, (_, run) in {"whole step": (1, step), **found}.items():
            value = run()
            if turn:
                seconds[name].append(value)
    times = {name: (1 if name == "optimizer" else micro) * often for name, (often, _) in found.items()}
    total = min(seconds["whole step"])
    shares = {name: often * min(seconds[name]) / total for name, often in times.items()}
    shares["remainder"] = 1 - sum(shares.values())
    print(f"a step of {micro * recipe.pass_rows * recipe.length} tokens: {total:.3f} s of CPU time")
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {name:30}{share:7.1%}   {f'{times[name]} x' if name in times else ''}")
    record = {
        **provenance(),
        "model": cfg.name,
        "tokens_a_step": micro * recipe.pass_rows * recipe.length,
        "step_cpu_seconds": round(total, 4),
        "shares_of_a_step": {name: round(share, 4) for name, share in shares.items()},
        "times_a_step": times,
        "cpu_seconds": {name: [round(s, 5) for s in values] for name, values in seconds.items()},
    }
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
