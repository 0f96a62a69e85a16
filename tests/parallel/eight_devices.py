"""Runs on 8 virtual CPU devices in a process of its own: one device against meshes. Writes what it finds as JSON.

Usage: eight_devices.py RESULTS JOB...; a job is one of `JOBS`, a mesh and, where it is not the usual one, a model:
``sgd|fsdp=2,expert=4|concentrated``.
"""

import json
import re
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from architectures import ARCHITECTURES
from jax.sharding import PartitionSpec
from memory_maps import forget_programs
from moves import collectives
from tiny import fill_randomly, random_model, random_tokens, tiny_config
from tiny_janus import IMAGE, pictures
from tiny_janus import tiny_config as janus_config

import deepseek_jax as dsj
from deepseek_jax.aot.hlo import parse
from deepseek_jax.configs.schema import Compressed, HyperConnections
from deepseek_jax.convert import shards
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.names import layout as published
from deepseek_jax.convert.safetensors import Writer
from deepseek_jax.core.layout import parts
from deepseek_jax.core.params import RouterBias, map_variables, named
from deepseek_jax.core.partition import partition
from deepseek_jax.core.quant import FP8, Quantized, dequantize_matrix
from deepseek_jax.generation.engine import stream
from deepseek_jax.generation.score import score
from deepseek_jax.kernels import grouped
from deepseek_jax.model.attention import attend
from deepseek_jax.model.tokens import make_tokens
from deepseek_jax.multimodal import objective
from deepseek_jax.multimodal.draw import draw_pictures
from deepseek_jax.multimodal.janus import abstract as janus_shapes
from deepseek_jax.multimodal.laid import place_rows
from deepseek_jax.multimodal.stages import STAGES
from deepseek_jax.parallel import collectives as collectives_of
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.placement import place, place_batch, settle
from deepseek_jax.rl.advantage import advantages
from deepseek_jax.rl.policy import Policy
from deepseek_jax.rl.rollout import batch as rl_batch
from deepseek_jax.rl.rollout import rollout
from deepseek_jax.rl.variants import V32
from deepseek_jax.train.objective import Knobs, NextToken
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import start, train_step

CFG = tiny_config(n_layers=2, n_dense_layers=0)
ROWS, LENGTH, PROMPT = 8, 32, 16
SGD = optax.chain(optax.trace(0.9), optax.scale(-1.0))
ADAMW = optax.chain(optax.scale_by_adam(0.9, 0.95), optax.add_decayed_weights(0.1), optax.scale(-1.0))
# Small enough that the loss stays finite, large enough that a parameter moves by many times its bound.
RATES = {"sgd": 0.05, "adamw": 1e-3}
STEPS = 3


# Beside whole architectures: several streams, and V4's experts behind V3's attention, one layer's chosen by token.
OTHERS = ARCHITECTURES | {
    "streams": tiny_config(residual=HyperConnections()),
    "hash": replace(
        CFG, moe=replace(CFG.moe, n_hash=1, n_groups=1, top_groups=1, score="sqrtsoftplus", limit=0.5, scale=1.5)
    ),
}


def mesh_of(case: str):
    sizes = {name: int(size) for name, size in (part.split("=") for part in case.split(","))}
    return make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def error(ours, theirs) -> float:
    """Relative Frobenius error."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30))


def worst(ours: dict, theirs: dict) -> list:
    assert ours.keys() == theirs.keys()
    return list(max((error(ours[name], theirs[name]), name) for name in ours))


def same(ours, theirs) -> bool:
    return bool((np.asarray(ours) == np.asarray(theirs)).all())


def drifted(tree) -> list[str]:
    """The arrays of which two devices hold different values at the same place."""
    found = []
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        held = {}
        for shard in array.addressable_shards:
            value = np.asarray(shard.data)
            if not np.array_equal(held.setdefault(str(shard.index), value), value, equal_nan=True):
                found.append(jax.tree_util.keystr(path))
    return found


def concentrated(model):
    """The model with router biases that send every token to the same two experts."""
    # Of a type of its own as every other: a weakly typed one would compile each program anew.
    bias = jnp.where(jnp.arange(CFG.moe.n_experts) < CFG.moe.top_k, jnp.float32(100), 0)

    def point(path, v):
        return v.replace(jnp.broadcast_to(bias, v.get_value().shape)) if isinstance(v, RouterBias) else v

    return map_variables(point, model)


def batch() -> dict[str, np.ndarray]:
    """Rows with padding at their end and with two texts, so that masks matter."""
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 20:], segments[2, 12:], segments[3, 31:] = 0, 2, 0
    return {"tokens": np.asarray(random_tokens(CFG, ROWS, LENGTH)), "segments": segments}


@partial(jax.jit, static_argnames=("ctx", "kind"))
def step(state, rows, knobs, ctx, kind):
    optimizer = {"sgd": SGD, "adamw": ADAMW}[kind]
    # Indexers learn by their divergence alone: without it their gradients would be 0 on every mesh.
    weights = dsj.LossWeights(index=float(state.model.cfg.attention.indexed))
    objective = NextToken(weights, state.model.cfg.mtp_depth)
    return train_step(state, rows, knobs, optimizer=optimizer, objective=objective, ctx=ctx, clip=1e9)


@partial(jax.jit, static_argnames="ctx")
def forward(model, tokens, segments, ctx):
    return model(tokens, segments=segments, with_mtp=True, ctx=ctx)


@partial(jax.jit, static_argnames="ctx")
def cached(model, tokens, cache, ctx):
    return model(tokens, cache=cache, ctx=ctx)


def knobs(kind: str) -> Knobs:
    return Knobs.of(Setting(RATES[kind], 0.01, 0.3, 1, rows=0))


def steps(model, ctx, kind: str) -> dict:
    """Three steps: of the first the gradients (SGD's trace), the metrics; of the last the parameters and the bias."""
    state = settle(start(model, {"sgd": SGD, "adamw": ADAMW}[kind]), ctx)
    rows = place_batch({name: a[None] for name, a in batch().items()}, ctx)
    before, first = state, None
    for _ in range(STEPS):
        state, metrics = step(state, rows, knobs(kind), ctx, kind)
        first = first or (state, metrics)
    return {
        "before": before,
        "state": state,
        "gradients": first[0].opt_state[0].trace if kind == "sgd" else {},
        "metrics": first[1],
        "last": metrics,
    }


def run(case: str | None, kind: str, model, **how) -> dict:
    ctx = dsj.Context(**({} if case is None else {"mesh": mesh_of(case)}), **how)
    return steps(place(model, ctx), ctx, kind)


def generated(model, ctx) -> tuple:
    """Prefill of a part of each row, then two tokens more, one at a time."""
    tokens = random_tokens(CFG, ROWS, LENGTH)
    out = cached(model, tokens[:, :PROMPT], model.init_cache(ROWS, LENGTH, ctx=ctx), ctx)
    logits = [out.logits]
    for i in range(PROMPT, PROMPT + 2):
        out = cached(model, tokens[:, i : i + 1], out.cache, ctx)
        logits.append(out.logits)
    return np.concatenate(logits, axis=1), out.cache


def of_two_layers(cfg):
    if isinstance(cfg.attention, Compressed):
        attention, moe = replace(cfg.attention, ratios=(4, 8)), replace(cfg.moe, n_hash=1)
        return replace(cfg, n_layers=2, attention=attention, moe=moe)
    return replace(cfg, n_layers=2, n_dense_layers=0 if cfg.moe else 2)


def compare_other(case: str, name: str) -> dict:
    """Three steps, a prefill and two tokens of another architecture, on a mesh and on one device."""
    model = random_model(of_two_layers(OTHERS[name]))
    ctx = dsj.Context(mesh=mesh_of(case), expert_chunks=2, loss_chunk=12)
    ours, theirs = steps(place(model, ctx), ctx, "sgd"), steps(model, dsj.Context(), "sgd")
    ctx = dsj.Context(mesh=mesh_of(case))
    (logits, cache_), (expected, _) = generated(place(model, ctx), ctx), generated(model, dsj.Context())
    found = {
        "loss": error(ours["metrics"]["loss"], theirs["metrics"]["loss"]),
        "gradients": worst(ours["gradients"], theirs["gradients"]),
        "parameters": worst(named(ours["state"].params), named(theirs["state"].params)),
        "load": all(
            "load" not in theirs[at] or same(ours[at]["load"], theirs[at]["load"]) for at in ("metrics", "last")
        ),
        "logits": error(logits, expected),
        "indexers": [float(jnp.linalg.norm(a)) for name, a in ours["gradients"].items() if ".indexer." in name],
        "drifted": drifted((ours["state"], ours["metrics"], cache_)),
        "moved": worst(named(theirs["state"].params), named(theirs["before"].params)),
    }
    return found


@partial(jax.jit, static_argnames="ctx")
def shown(model, tokens, images, ctx):
    return model(tokens, images, ctx=ctx).logits


@cache
def small_janus():
    """Four tokens shown, sixteen codes drawn."""
    cfg = janus_config()
    vision, vq = replace(cfg.vision, image_size=4), replace(cfg.vq, multipliers=(1,))
    return fill_randomly(janus_shapes(replace(cfg, vision=vision, vq=vq)), seed=1)


def janus(case: str | None) -> dict:
    """Logits of rows with a picture each, codes and pixels drawn from two prompts, text about a picture, a step of
    training on rows of both kinds, and the files read into shards."""
    ctx = dsj.Context(mesh=None if case is None else mesh_of(case))
    model, rng = small_janus(), np.random.default_rng(0)
    tokens, weight = rng.integers(4, IMAGE, (2, ROWS, 12)).astype(np.int32)
    tokens[:, 2:6] = IMAGE
    prompts, codes = rng.integers(4, 48, (ROWS, 6)).astype(np.int32), rng.integers(0, 48, (ROWS, 16)).astype(np.int32)
    text = objective.Text(tokens, (weight > 99).astype(np.float32), pictures(ROWS, side=4))
    drawn = objective.Pictures(prompts, np.ones_like(prompts), codes)
    placed, rows = place(model, ctx), tuple(place_rows(part, ctx) for part in (text, drawn))
    logits = shown(placed, rows[0].tokens, rows[0].images, ctx)
    picture = draw_pictures(model, [[1, 40, 50, 60, 70, 9], [1, 80, 90, 9]], 3, seed=5, ctx=ctx)
    words = dsj.generate(placed, [tokens[0].tolist()], 3, images=[[text.images[0]]], stop_ids=(), ctx=ctx)[0]
    training = settle(objective.begin(jax.tree.map(jnp.array, placed), STAGES["janus-pro-3"]), ctx)
    falls = objective.loss if case is None else partial(objective.loss, ctx=ctx)
    how = {"stage": STAGES["janus-pro-3"], "objective": falls}
    training, value = objective.step(training, rows, np.float32(1e-3), **how)
    # Adam's first moment is the gradient times a number. A key's bias has none.
    (moments,) = (part.mu for part in training.state if hasattr(part, "mu"))
    with tempfile.TemporaryDirectory() as folder:
        dsj.save_pretrained(placed, folder)
        read = dsj.load_pretrained(folder, dtype=jnp.float32, ctx=ctx)
    return {
        "logits": logits,
        "loss": value,
        "gradients": {name: a for name, a in moments.items() if not name.endswith("k_bias")},
        "parameters": named(training.params),
        "codes": picture.codes,
        "images": picture.images.astype(np.int32),
        "words": words,
        "drifted": drifted((logits, training)),
        "read": all(same(a, b) for a, b in _pairs(jax.tree.leaves(read), jax.tree.leaves(model))),
        "shares": [a.addressable_shards[0].data.size / a.size for a in named(read).values()],
    }


@cache
def janus_on_one_device() -> dict:
    return janus(None)


def compare_janus(case: str) -> dict:
    ours, theirs = janus(case), janus_on_one_device()
    return {
        "errors": {name: error(ours[name], theirs[name]) for name in ("logits", "loss")},
        "gradients": worst(ours["gradients"], theirs["gradients"]),
        "parameters": worst(ours["parameters"], theirs["parameters"]),
        "codes": same(ours["codes"], theirs["codes"]),
        "images": int(np.abs(ours["images"] - theirs["images"]).max()),
        "words": ours["words"] == theirs["words"],
        "drifted": ours["drifted"],
        "read": ours["read"] and theirs["read"],
        "share": min(ours["shares"]),
    }


MODEL = random_model(CFG)
MODELS = {"usual": MODEL, "concentrated": concentrated(MODEL)}


@cache
def one_device(what: str, name: str):
    model, ctx, rows = MODELS[name], dsj.Context(), batch()
    if what == "forward":
        return forward(model, rows["tokens"], rows["segments"], ctx)
    return generated(model, ctx) if what == "generated" else run(None, what, model)


def compare_steps(kind: str, case: str, name: str = "usual", **how) -> dict:
    # In chunks and a chunk of logits at a time; AdamW, which runs on mixed meshes only, at once.
    how |= {"expert_chunks": 2, "loss_chunk": 12} if kind == "sgd" else {}
    ours, theirs = run(case, kind, MODELS[name], **how), one_device(kind, name)
    found = {
        "loss": error(ours["metrics"]["loss"], theirs["metrics"]["loss"]),
        "gradients": worst(ours["gradients"], theirs["gradients"]) if kind == "sgd" else [0.0, ""],
        "parameters": worst(named(ours["state"].params), named(theirs["state"].params)),
        "bias": all(same(ours[at]["bias"], theirs[at]["bias"]) for at in ("metrics", "last")),
        "load": all(same(ours[at]["load"], theirs[at]["load"]) for at in ("metrics", "last")),
        "statistics": max(
            error(ours["metrics"][key], theirs["metrics"][key])
            for key in ("main", "mtp", "tokens", "grad_norm", "activation_norm", "max_violation", "routing_entropy")
        ),
        "balance": error(ours["metrics"]["balance"]["sequence"], theirs["metrics"]["balance"]["sequence"]),
        "dropped": int(ours["metrics"]["dropped"]),
        "drifted": drifted((ours["state"], ours["metrics"])),
        "moved": worst(named(theirs["state"].params), named(theirs["before"].params)),
    }
    resting = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), ours["state"], ours["before"])
    found["moved_away"] = [
        jax.tree_util.keystr(path) for path, ok in jax.tree_util.tree_leaves_with_path(resting) if not ok
    ]
    return found


def compare_forward(case: str, name: str = "usual", **how) -> dict:
    ctx, rows = dsj.Context(mesh=mesh_of(case), **how), batch()
    model = place(MODELS[name], ctx)
    ours = forward(model, rows["tokens"], rows["segments"], ctx)
    theirs = one_device("forward", name)
    return {
        "logits": error(ours.logits, theirs.logits),
        "mtp_logits": error(ours.mtp_logits[0], theirs.mtp_logits[0]),
        "routing": same(ours.aux.expert_index, theirs.aux.expert_index)
        and same(ours.mtp_aux.expert_index, theirs.mtp_aux.expert_index),
        "load": same(ours.aux.load, theirs.aux.load) and same(ours.mtp_aux.load, theirs.mtp_aux.load),
        "dropped": np.asarray(ours.aux.dropped).tolist(),
        "loads": np.asarray(ours.aux.load).tolist(),
        "drifted": drifted((ours.logits, ours.mtp_logits, ours.aux, ours.mtp_aux)),
    }


def compare_generated(case: str, name: str = "usual") -> dict:
    ctx = dsj.Context(mesh=mesh_of(case))
    (ours, cache_), (theirs, expected) = generated(place(MODELS[name], ctx), ctx), one_device("generated", name)
    return {
        "logits": error(ours, theirs),
        "cache": max(error(a, b) for a, b in zip(*map(jax.tree.leaves, (cache_.held, expected.held)), strict=True)),
        "length": same(cache_.length, expected.length),
        "drifted": drifted(cache_),
    }


def text(ctx) -> dict:
    """Five rows, which do not divide over 8 devices, greedy and sampled, with drafts; in several calls of each
    program."""
    prompts = [row[: 3 + 4 * i].tolist() for i, row in enumerate(np.asarray(random_tokens(CFG, 5, 20)))]
    how = {"temperature": [0, 1, 0, 0.7, 0], "top_k": [0, 0, 0, 20, 0], "stop_ids": (), "use_mtp": True}
    run = stream(place(MODEL, ctx), prompts, 9, **how, seed=3, ctx=ctx, chunk=8, steps=4)
    # Of one device they stand in what may keep them on disk (`generation.programs`).
    programs = [getattr(program, "jitted", program) for program in (run._prefill, run._decode)]
    before = [program._cache_size() for program in programs]
    pieces = [len(new) for new in run]
    tokens, info = run.result()
    found = {"tokens": tokens, "calls": len(pieces), **vars(info)}
    return found | {"programs": [p._cache_size() - n for p, n in zip(programs, before, strict=True)]}


@cache
def text_on_one_device() -> dict:
    return text(dsj.Context())


def compare_text(case: str) -> dict:
    return {"ours": text(dsj.Context(mesh=mesh_of(case))), "theirs": text_on_one_device()}


def compare_scores(case: str) -> dict:
    ids = random_tokens(CFG, 1, 40)[0].tolist()
    ours, theirs = (score(MODEL, ids, ctx, chunk=16) for ctx in (dsj.Context(mesh=mesh_of(case)), dsj.Context()))
    return {"largest": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), "first": theirs[0]}


def compare_improved(case: str) -> dict:
    """Answers of V3.2's form, and a step on those of one device, with their experts and sets of tokens replayed."""
    form, prompts = replace(V32, beta=0.0), [[3, 4, 5], [7, 1], [9, 8, 2], [6]]
    found = []
    for ctx in (dsj.Context(mesh=mesh_of(case)), dsj.Context()):
        model = place(MODEL, ctx)
        written = rollout(model, prompts, 4, form, 8, seed=1, top_p=0.9, stop_ids=(0,), ctx=ctx, width=3)
        found.append((ctx, model, written))
    (*_, ours), (*_, theirs) = found
    rows = rl_batch(theirs, advantages([sum(a) % 7 for a in theirs.answers], theirs.group, form.scale), form, 11)
    how = {"optimizer": SGD, "objective": Policy(form)}
    after = []
    for ctx, model, _ in found:
        state = settle(start(model, SGD), ctx)
        batch = place_batch({name: a[None] for name, a in rows.items()}, ctx)
        state, metrics = jax.jit(partial(train_step, ctx=ctx, clip=1e9, **how))(state, batch, knobs("sgd"))
        after.append((named(state.params), state.opt_state[0].trace, metrics))
    same_rows = [i for i, (a, b) in enumerate(zip(ours.answers, theirs.answers, strict=True)) if a == b]
    pairs = [(ours.info.behaviour_logprobs[i], theirs.info.behaviour_logprobs[i]) for i in same_rows]
    return {
        "same": len(same_rows) / len(theirs.answers),
        "behaviour": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        "loss": abs(float(after[0][2]["loss"]) - float(after[1][2]["loss"])),
        "mismatch": float(after[0][2]["mismatch"]),
        "gradients": worst(after[0][1], after[1][1]),
        "parameters": worst(after[0][0], after[1][0]),
    }


def attention_kernel(case: str) -> dict:
    """The attention kernel on a mesh, interpreted, against the other form on one device: the output and gradients."""
    rng, segment = np.random.default_rng(0), np.ones((ROWS, 128), np.int32)
    segment[1, 50:], segment[2, 100:] = 2, 0
    position = jnp.broadcast_to(jnp.arange(128), segment.shape)
    tokens = make_tokens(CFG, position, jnp.asarray(segment), causal=True)

    def run(q, k, v, do, ctx):
        o, back = jax.vjp(lambda *a: attend(*a, tokens, 0.3, ctx), q, k, v)
        return o, *back(do)

    found = {}
    for name, heads in (("expanded", 4), ("absorbed", 1)):
        shapes = ((4, 24), (heads, 24), (heads, 16), (4, 16))
        arrays = [jnp.asarray(rng.normal(0, 1, (*segment.shape, *s)), jnp.float32) for s in shapes]
        ctx = dsj.Context(mesh=mesh_of(case), attention="kernel")
        ours = jax.jit(partial(run, ctx=ctx))(*arrays)
        theirs = jax.jit(partial(run, ctx=dsj.Context(attention="xla")))(*arrays)
        found[name] = [error(a, b) for a, b in zip(ours, theirs, strict=True)]
        found[f"{name} heads"] = ours[0].sharding.shard_shape(ours[0].shape)
    return found


def snapshot(case: str) -> dict:
    """Where every parameter and moment rests, and what the compiled step moves."""
    ctx = dsj.Context(mesh=mesh_of(case))
    state = settle(start(place(MODEL, ctx), ADAMW), ctx)
    rows = place_batch({name: a[None] for name, a in batch().items()}, ctx)
    compiled = step.lower(state, rows, knobs("adamw"), ctx, "adamw").compile()
    moves: dict[str, list[int]] = {}
    found = collectives(parse(compiled.as_text()))
    for c in found:
        entry = moves.setdefault(f"{c.kind} in {c.loops} loops", [0, 0])
        entry[0] += 1
        entry[1] += c.nbytes

    def places(arrays) -> dict[str, str]:
        """A word an axis: the mesh axes it is split over, "-" for none."""
        return {n: " ".join("+".join(mine) or "-" for mine in parts(a.sharding.spec)) for n, a in arrays.items()}

    return {
        "parameters": places(named(state.params)),
        "moments": places(state.opt_state[0].mu),
        "moves": moves,
        "gathered": [list(a.dims) for c in found if c.kind == "all-gather" for a in c.arrays],
        "loops": [c.loops for c in found if c.kind == "all-gather" for _ in c.arrays],
    }


def born(case: str) -> dict:
    """`dsj.init` on a mesh and on one device."""
    ctx, key = dsj.Context(mesh=mesh_of(case)), jax.random.key(3)
    ours, theirs = dsj.init(CFG, key, ctx=ctx), dsj.init(CFG, key)
    shards = {n: a.addressable_shards[0].data.size / a.size for n, a in named(partition(ours)[0]).items()}
    wanted = {n: a.sharding.spec for n, a in named(partition(place(MODEL, ctx))[0]).items()}
    ids = jnp.asarray([[0, -1, CFG.vocab_size - 1, CFG.vocab_size]] * ROWS)
    try:
        refused = dsj.generate(ours, [[1]])
    except ValueError as found:
        refused = str(found)
    return {
        "values": worst(named(partition(ours)[0]), named(partition(theirs)[0])),
        "shares": shards,
        "as_placed": all(a.sharding.spec == wanted[n] for n, a in named(partition(ours)[0]).items()),
        "looked_up": jnp.isnan(ctx.ops.lookup(ours.embed, ids, jnp.float32)).all(-1).tolist(),
        "without_mesh": refused,
    }


def loaded(case: str) -> dict:
    """The shipped FP8 checkpoint in its shards, and the bytes that all devices and the first half of them read."""
    ctx = dsj.Context(mesh=mesh_of(case))
    folder = Path(__file__).parents[2] / "checkpoints" / "tiny-v3"
    theirs = jax.tree.leaves(dsj.load_pretrained(folder, dtype=None))
    fill, make, read, few = shards._fill, jax.make_array_from_callback, [0], []

    def counting(file, entry, start, view):
        read[0] += len(view)
        fill(file, entry, start, view)

    def by_half(shape, sharding, callback):
        indices = list(sharding.devices_indices_map(shape).values())
        parts = {str(i): callback(i) for i in indices[: len(indices) // 2]}
        few.append(sum(part.nbytes for part in parts.values()))
        return make(shape, sharding, lambda index: np.zeros(sharding.shard_shape(shape), parts[str(indices[0])].dtype))

    found = {}
    with mock.patch.object(shards, "_fill", counting):
        ours = jax.tree.leaves(dsj.load_pretrained(folder, dtype=None, ctx=ctx))
        found["all"], read[0] = read[0], 0
        with mock.patch.object(jax, "make_array_from_callback", by_half):
            dsj.load_pretrained(folder, dtype=None, ctx=ctx)
        found["half"], read[0] = read[0], 0
        single = jax.tree.leaves(dsj.load_pretrained(folder, dtype=jnp.float32, ctx=ctx))
    plain = jax.tree.leaves(dsj.load_pretrained(folder, dtype=jnp.float32))
    return found | {
        "size": sum(a.nbytes for a in theirs),
        "half_size": sum(few),
        "equal": all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in _pairs(ours, theirs)),
        "dequantised_equal": all(a.tobytes() == b.tobytes() for a, b in _pairs(single, plain)),
    }


def compare_stored(case: str) -> dict:
    """The forward pass of the shipped checkpoint as it is stored, in FP8, computed in float32."""
    folder, tokens = Path(__file__).parents[2] / "checkpoints" / "tiny-v3", random_tokens(CFG, ROWS, LENGTH)
    found = []
    for mesh in (mesh_of(case), None):
        ctx = dsj.Context(mesh=mesh, dtype=jnp.float32)
        model = dsj.load_pretrained(folder, dtype=None, ctx=ctx)
        found.append(forward(model, place_batch({"tokens": tokens}, ctx)["tokens"], None, ctx))
    ours, theirs = found
    return {
        "logits": error(ours.logits, theirs.logits),
        "routing": same(ours.aux.expert_index, theirs.aux.expert_index),
    }


def decode_quantized(case: str, layout: str, experts: str) -> dict:
    """A decoding step from FP8 leaves, whose blocks of 16 parts of a matrix may begin within; what it converts from FP8
    and gathers, and whether a shape among these is a whole matrix."""
    cfg = replace(CFG, n_dense_layers=1, mtp_depth=0)
    tensors, leaves = published(cfg)
    chosen, rng = {tensor.path for tensor in tensors if tensor.fp8}, np.random.default_rng(0)
    whole = set()

    def quantize(path, variable):
        if path not in chosen:
            return variable
        leaf = leaves[path]
        shape = leaf.matrix[leaf.stacked :]
        # An expert's published matrices are gate, up and down; all others stand as they are.
        front, between = len(leaf.form.front), len(leaf.form.between)
        whole.update({shape, shape[front:], (*shape[front : front + 1], *shape[front + 1 + between :])})
        values = np.asarray(variable.get_value()).reshape(leaf.matrix) * 100
        scale = rng.uniform(0.5, 1.5, leaf.scale((16, 16))) / 100
        leaf = Quantized(jnp.asarray(values, FP8), jnp.asarray(scale, jnp.float32), leaf.block((16, 16)), leaf.dims)
        return variable.replace(leaf)

    model = map_variables(quantize, random_model(cfg))
    tokens, found = random_tokens(cfg, ROWS, 1), []
    for mesh in (mesh_of(case), None):
        how = {"mesh": mesh, "layout": layout} if mesh is not None else {}
        ctx = dsj.Context(dtype=jnp.float32, experts=experts, mla="absorbed", **how)
        step = jax.jit(lambda model, tokens, cache, ctx=ctx: model(tokens, cache=cache, ctx=ctx))
        placed = model if mesh is None else place(model, ctx)
        arguments = placed, place_batch({"tokens": tokens}, ctx)["tokens"], placed.init_cache(ROWS, LENGTH, ctx=ctx)
        with mock.patch.object(grouped, "SLAB", 16):
            lowered = step.lower(*arguments)
        if not found:
            text = lowered.as_text()
        found.append(lowered.compile()(*arguments))
    ours, theirs = found
    rebuilt = re.findall(r"stablehlo\.convert .*: \(tensor<([\dx]+)xf8E4M3FN>\)", text)
    shapes = {tuple(n for n in map(int, shape.split("x")) if n > 1) for shape in rebuilt}
    return {
        "logits": error(ours.logits, theirs.logits),
        "routing": same(ours.aux.expert_index, theirs.aux.expert_index),
        "rebuilt": len(rebuilt),
        "whole": sorted(shapes & whole),
        "gathered": len(re.findall(r"all_gather.*f8E4M3FN", text)),
    }


def staged(case: str) -> dict:
    """A weight gathered, and a gradient scattered, among some of an axis' devices after the other and among all."""
    mesh, rest, use, found = mesh_of(case), PartitionSpec("fsdp", None), PartitionSpec(None, None), []

    def local(w):
        whole = collectives_of.gathered(w, rest, use, w.dtype)
        return whole[None], collectives_of.to_rest(whole * (1.0 + jax.lax.axis_index("fsdp")), use, rest, ("fsdp",))

    for at_once in (8, 4, 2):
        with mock.patch.object(collectives_of, "AT_ONCE", at_once):
            run = jax.shard_map(local, mesh=mesh, in_specs=rest, out_specs=(rest, rest), check_vma=False)
            found.append(jax.jit(run)(jnp.arange(48.0).reshape(16, 3)))
    whole, part = found[0]
    return {
        "right": same(whole, np.tile(np.arange(48.0).reshape(16, 3), (8, 1, 1))) and same(part, 36 * whole[0]),
        "same": all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)),
    }


def saved(case: str) -> dict:
    """The files of a model in its shards and of the same on one device, FP8 blocks and all; and these files, some of
    their tensors no longer FP8, as they are stored in shards and on one device."""
    ctx, model = dsj.Context(mesh=mesh_of(case)), random_model(CFG)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "theirs")]
        for path, m in zip(paths, (place(model, ctx), model), strict=True):
            dsj.save_pretrained(m, path, quantize="fp8")
        ours, theirs = ({f.name: f.read_bytes() for f in path.iterdir()} for path in paths)
        _thaw(paths[0], "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.5.up_proj.weight")
        mixed = [jax.tree.leaves(dsj.load_pretrained(paths[0], dtype=None, ctx=c)) for c in (ctx, None)]
    mixed_equal = all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in _pairs(*mixed))
    return {"files": sorted(ours), "equal": ours == theirs, "mixed_equal": mixed_equal}


def _thaw(folder: Path, *names: str) -> None:
    """Makes FP8 tensors of a folder bfloat16."""
    checkpoint = Checkpoint(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint}
    for name in names:
        values = dequantize_matrix(tensors[name], tensors.pop(name + "_scale_inv"), (128, 128))
        tensors[name] = values.astype(jnp.bfloat16)
    with Writer(folder / "model.safetensors", {n: (a.dtype, a.shape) for n, a in tensors.items()}) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def _pairs(ours: list, theirs: list) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True)]


JOBS = {
    "staged": staged,
    "quantized": partial(decode_quantized, layout="decode", experts="ragged"),
    "quantized-blocks": partial(decode_quantized, layout="decode", experts="blocks"),
    "quantized-all": partial(decode_quantized, layout="all", experts="ragged"),
    "loaded": loaded,
    "saved": saved,
    "stored": compare_stored,
    "other": compare_other,
    "janus": compare_janus,
    "sgd": partial(compare_steps, "sgd"),
    "adamw": partial(compare_steps, "adamw"),
    "forward": compare_forward,
    "drop": partial(compare_forward, drop=True),
    "kernel": partial(compare_forward, experts="kernel"),
    "native": partial(compare_steps, "sgd", experts="native", attention="native"),
    "attention": attention_kernel,
    "generated": compare_generated,
    "text": compare_text,
    "scores": compare_scores,
    "improved": compare_improved,
    "snapshot": snapshot,
    "born": born,
}


def main(path: str, jobs: list[str]) -> None:
    assert jax.device_count() == 8
    results = {}
    for job in jobs:
        what, *arguments = job.split("|")
        results[job] = JOBS[what](*arguments)
        forget_programs()
    Path(path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
