"""Decoding over a long context: time a step and bytes of cache of V4, V3.2 and V3 beside one another, in miniature.

Three twins of one width and depth, whose attention keeps the releases' proportions: V3's latents of a token, V3.2's
indexer over them, V4's recent tokens with entries of 4 and of 128 tokens. Their other parts are small, so that with a
long context attention dominates. The cache is not prefilled but filled with random numbers: what a step takes does not
depend on what it reads, and a prefill of 128k tokens would take hours here. Every step decodes one token of one row at
that length, layer by layer as `generate` does; the models take turns, round by round, and medians count. Bytes are
those of the cache's arrays, made for the context and not a token more than the steps need. Times vary from machine to
machine; the ratios are the result.

    python experiments/bench_long_context/run.py          # some minutes on 2 cores; writes results.json beside itself
    python experiments/bench_long_context/run.py --smoke  # the same code at toy size
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.configs.schema import MLA, Compressed, HyperConnections, Indexer, ModelConfig, MoE
from deepseek_jax.generation.layers import unstacked
from deepseek_jax.model.cache import Cache

HERE = Path(__file__).parent
CONTEXTS, TOY_CONTEXTS = (4096, 32768, 131072), (256,)
# V4-Flash's: two layers of recent tokens, then entries of 4 and of 128 in turn.
RATIOS, TOY_RATIOS = (0, 0, 4, 128, 4, 128), (0, 4, 128)


def twins(heads: int, top_k: int, window: int, ratios: tuple[int, ...]) -> dict[str, ModelConfig]:
    """Model -> its config. ``top_k``: keys or entries that an indexer chooses; ``window``: V4's recent tokens;
    ``ratios``: of V4's layers, as many as all have."""
    index = Indexer(index_heads=16, index_dim=32, index_top_k=top_k)
    mla = MLA(n_heads=heads, q_rank=96, kv_rank=128, nope_dim=32, rope_dim=16, v_dim=32)
    v3 = ModelConfig(
        name="long-context-v3",
        vocab_size=512,
        dim=128,
        n_layers=len(ratios),
        n_dense_layers=0,
        ffn_dim=128,
        attention=mla,
        moe=MoE(n_experts=8, top_k=2, expert_dim=32),
        max_length=2 * max(CONTEXTS),
        init_std=0.02,
    )
    v32 = replace(v3, name="long-context-v3.2", attention=replace(mla, indexer=index), model_type="deepseek_v32")
    compressed = Compressed(
        n_heads=heads,
        head_dim=128,
        rope_dim=16,
        q_rank=96,
        o_groups=2,
        o_rank=96,
        window=window,
        ratios=ratios,
        indexer=index,
    )
    v4 = replace(
        v3,
        name="long-context-v4",
        attention=compressed,
        moe=replace(v3.moe, score="sqrtsoftplus", n_hash=len(ratios) // 2, limit=10.0),
        model_type="deepseek_v4",
        residual=HyperConnections(),
    )
    return {"v3": v3, "v3.2": v32, "v4": v4}


def filled(model, context: int, steps: int) -> Cache:
    """A cache that holds ``context`` random tokens and has room for ``steps`` more."""
    cache = model.init_cache(1, context + steps)
    leaves, structure = jax.tree.flatten(cache.held)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    held = [jax.random.normal(key, a.shape, a.dtype) for key, a in zip(keys, leaves, strict=True)]
    slot = jnp.arange(context + steps)[None]
    return replace(
        cache,
        held=jax.tree.unflatten(structure, held),
        position=slot.astype(jnp.int32),
        segment=(slot < context).astype(jnp.int32),
        length=jnp.full((1,), context, jnp.int32),
    )


def decoder(cfg: ModelConfig, context: int, steps: int) -> tuple[Callable[[], float], int]:
    """A function that decodes one token more and returns its seconds, and the bytes of the cache's keys."""
    model = unstacked(dsj.init(cfg, jax.random.key(0)), jnp.float32)

    def step(model, token, cache):
        out = model(token, cache=cache, logits="last")
        return out.logits[:, -1].argmax(-1).astype(jnp.int32)[:, None], out.cache

    # Bound to the device as a step's own results are, whose layers are: otherwise the second step would compile again.
    state = list(jax.device_put((jnp.zeros((1, 1), jnp.int32), filled(model, context, steps)), jax.devices()[0]))
    step = jax.jit(step, donate_argnums=2).lower(model, *state).compile()
    size = sum(a.nbytes for a in jax.tree.leaves(state[1].held))

    def run() -> float:
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state[:] = jax.block_until_ready(step(model, *state))
        return time.perf_counter() - begin

    return run, size


def measure(cfgs: dict[str, ModelConfig], context: int, steps: int) -> dict[str, dict[str, float]]:
    """Model -> seconds a step, bytes of cache, and both over V3's."""
    made = {name: decoder(cfg, context, steps + 1) for name, cfg in cfgs.items()}
    seconds = {name: [] for name in made}
    for turn in range(steps + 1):
        for name, (run, _) in made.items():
            value = run()
            if turn:  # the first warms up
                seconds[name].append(value)
    found = {
        name: {"step_seconds": statistics.median(seconds[name]), "cache_bytes": size}
        for name, (_, size) in made.items()
    }
    for each in found.values():
        for figure, over in (("step_seconds", "step_over_v3"), ("cache_bytes", "cache_over_v3")):
            each[over] = round(each[figure] / found["v3"][figure], 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each model and length, after one")
    parser.add_argument("--smoke", action="store_true", help="toy size, two steps; results go to --out only")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    given = parser.parse_args()
    contexts, steps = (TOY_CONTEXTS, 2) if given.smoke else (CONTEXTS, given.steps)
    cfgs = twins(2, 16, 32, TOY_RATIOS) if given.smoke else twins(16, 512, 128, RATIOS)
    results = {}
    for context in contexts:
        results[str(context)] = measure(cfgs, context, steps)
        for name, found in results[str(context)].items():
            print(
                f"{context:>8} tokens  {name:5}{found['step_seconds'] * 1e3:9.2f} ms a step  "
                f"{found['cache_bytes'] / 2**20:8.2f} MiB   of V3's {found['step_over_v3']:.2f}, "
                f"{found['cache_over_v3']:.3f}"
            )
    record = {
        **provenance(),
        "steps": steps,
        "layers": len(cfgs["v3"].layers),
        "cache": "filled with random numbers",
        "results": results,
    }
    out = given.out or (None if given.smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
