"""The programs that are compiled ahead of time, on shapes alone: a training step, prefill, one decoding step.

Suffixes: A micro-batches, B rows, T tokens.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.convert.formats import Stored
from deepseek_jax.convert.manifest import form_of, releases_of
from deepseek_jax.convert.names import layout as published
from deepseek_jax.core.layout import BATCH, spec
from deepseek_jax.core.params import map_variables, named, renamed
from deepseek_jax.core.quant import BLOCK, FP8, Quantized
from deepseek_jax.model.attention import KEY_TILE, MIN_BLOCK, UNROLLED_BLOCKS
from deepseek_jax.model.transformer import Transformer, abstract
from deepseek_jax.parallel.context import Context
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.placement import row_groups
from deepseek_jax.parallel.shardings import shardings
from deepseek_jax.train.begin import compiled, prepared
from deepseek_jax.train.objective import Knobs
from deepseek_jax.train.recipe import Recipe
from deepseek_jax.train.recipes import ADAMW
from deepseek_jax.train.schedule import Setting
from deepseek_jax.train.step import State, start

PROGRAMS = ("train", "prefill", "decode")
WEIGHTS = ("bfloat16", "int8", "fp8")


@dataclass(frozen=True)
class Program:
    """What is compiled.

    ``rows``: a device's. ``length``: tokens of a row that the call runs, 1 in decoding. ``context``: the cache's slots
    in decoding. ``weights``: of `WEIGHTS`, in prefill and decoding; training keeps float32. ``mtp``: the MTP modules
    train too. ``options``: of `Context`.
    """

    kind: str = "train"
    rows: int = 1
    length: int = 4096
    context: int = 4096
    weights: str = "bfloat16"
    mtp: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def lower(cfg: ModelConfig, program: Program, devices: list, sizes: dict[str, int], layout: str | None):
    """The `jax.stages.Lowered` of a program, and its mesh of ``devices``.

    Raises LayoutError where mesh, layout, model and batch do not fit together, ValueError for unknown options.
    """
    mesh = make_mesh(**sizes, devices=devices)
    ctx = Context(mesh=mesh, layout=layout, **{"dtype": jnp.bfloat16} | program.options)
    return {"train": _train, "prefill": _prefill, "decode": _decode}[program.kind](cfg, program, ctx), mesh


def balanced_fill(program: Program, sizes: dict[str, int]) -> float:
    """The part of the experts' buffers that is filled when every expert gets as many tokens."""
    return 1 / max(1.0, program.options.get("expert_buffer", Context.expert_buffer)) if sizes["expert"] > 1 else 1.0


def expected_trips(program: Program, source: str, number: int) -> int:
    """How often the ``number``-th loop of a layer runs whose length the data decides.

    The experts' further rounds do not run when routing is balanced. In prefill each block of queries reads the cache in
    tiles as far as it sees: all of its own tokens, and all before them.
    """
    if program.kind != "prefill" or "shard_map" in source:
        return 0
    block = max(MIN_BLOCK, -(-program.length // UNROLLED_BLOCKS))
    last = min((number % -(-program.length // block) + 1) * block, program.length)
    return -(-last // KEY_TILE)


def _train(cfg: ModelConfig, program: Program, ctx: Context):
    model = placed(abstract(cfg, jnp.float32), ctx)
    recipe = Recipe(optimizer=ADAMW, ema_decay=0.0)
    if not (program.mtp and cfg.mtp_depth):
        recipe = replace(recipe, weights=replace(recipe.weights, mtp=0.0))
    optimizer, step = prepared(model, recipe, ctx)
    state = _like_parameters(jax.eval_shape(lambda m: start(m, optimizer), model), model, ctx)
    shape = (1, program.rows * row_groups(ctx), program.length)
    split = spec((None, BATCH, None), shape, ctx.layout.use, ctx.mesh, "a batch")
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(ctx.mesh, split))}
    return compiled(step, state, ctx).lower(state, batch, whole(Knobs.of(_SETTING), ctx))


# Its numbers are arguments of the compiled step.
_SETTING = Setting(lr=1e-4, bias_speed=1e-3, mtp_weight=0.3, micro_batches=1, rows=1)


def _prefill(cfg: ModelConfig, program: Program, ctx: Context):
    return _run(cfg, program, ctx, program.length, program.length)


def _decode(cfg: ModelConfig, program: Program, ctx: Context):
    return _run(cfg, program, ctx, 1, program.context)


def _run(cfg: ModelConfig, program: Program, ctx: Context, length: int, slots: int):
    """The next token of every row after ``length`` more tokens, and the cache of ``slots`` tokens, which is donated."""
    rows = program.rows * row_groups(ctx)
    model = abstract(cfg, jnp.bfloat16)
    if program.weights != "bfloat16":
        model = quantized(model, cfg, program.weights)
    model = placed(model, ctx)
    cache = empty_cache(cfg, rows, slots, ctx)
    cache = jax.tree.map(partial(rows_split, rows=rows, ctx=ctx), cache)
    tokens = rows_split(jax.ShapeDtypeStruct((rows, length), jnp.int32), rows, ctx)

    def step(model, tokens, cache):
        out = model(tokens, cache=cache, logits="last", ctx=ctx)
        return out.logits[:, -1].argmax(-1).astype(jnp.int32), out.cache

    step.__name__ = program.kind
    # The cache lies as the compiler would have it: with the layout of an array from elsewhere it would be copied.
    auto = jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), cache)
    return jax.jit(step, donate_argnums=2, in_shardings=(None, None, auto), out_shardings=(None, auto)).lower(
        model, tokens, cache
    )


def empty_cache(cfg: ModelConfig, rows: int, slots: int, ctx: Context):
    """The shapes of a cache, on no device yet."""
    return jax.eval_shape(lambda: abstract(cfg).init_cache(rows, slots, ctx=Context(dtype=ctx.dtype, cache=ctx.cache)))


def cache_bytes(cfg: ModelConfig, slots: int, cache: str) -> float:
    """What a token of a row of so many holds in all layers, MTP modules apart: bytes of the arrays, in bfloat16 or as
    ``cache`` says, whatever a device adds to them."""
    made = empty_cache(cfg, 1, slots, Context(dtype=jnp.bfloat16, cache=cache))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(made.held)) / slots


def rows_split(a, rows: int, ctx: Context):
    """A shape with the rows, its first axis of that size, on the devices that compute them."""
    axes = [None] * a.ndim
    axes[a.shape.index(rows, 1 if a.ndim > 2 else 0)] = BATCH
    split = spec(tuple(axes), a.shape, ctx.layout.use, ctx.mesh, "an activation")
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(ctx.mesh, split))


def quantized(model: Transformer, cfg: ModelConfig, kind: str) -> Transformer:
    """Every matrix that releases quantise, for "fp8" as they store it (V4's experts in FP4), for "int8" with a float32
    scale for each block of 128 x 128."""
    tensors, leaves = published(cfg)
    chosen = {tensor.path: tensor for tensor in tensors if tensor.fp8}
    release = next(iter(releases_of(cfg)), cfg.name)

    def quantize(path, variable):
        if path not in chosen:
            return variable
        leaf, form, block = leaves[path], Stored(np.dtype(np.int8), np.dtype(np.float32)), BLOCK
        if kind == "fp8":
            stored = form_of(release, chosen[path])
            form = stored if stored.scale is not None else Stored(np.dtype(FP8), np.dtype(np.float32))
            block = form.block(BLOCK)
        values = jax.ShapeDtypeStruct(leaf.matrix, form.dtype)
        scale = jax.ShapeDtypeStruct(leaf.scale(block), form.scale)
        return variable.replace(Quantized(values, scale, leaf.block(block), leaf.dims))

    return map_variables(quantize, model)


def placed(tree, ctx: Context):
    """Shapes with the shardings at which parameters rest."""

    def place(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings(tree, ctx))


def whole(tree, ctx: Context):
    """Shapes of arrays that every device has whole."""
    everywhere = NamedSharding(ctx.mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), tree)


def _like_parameters(state: State, model: Transformer, ctx: Context) -> State:
    """A training state's shapes with shardings."""
    places = named(model)
    return replace(
        state,
        params=renamed(state.params, places),
        rest=renamed(state.rest, places),
        opt_state=beside(state.opt_state, places, ctx),
        step=whole(state.step, ctx),
        skipped=whole(state.skipped, ctx),
    )


def beside(opt_state, places: dict[str, jax.ShapeDtypeStruct], ctx: Context):
    """An optimizer's shapes with shardings: its arrays lie where their parameters, ``places``, do."""

    def place(path, a):
        name = next((p.key for p in reversed(path) if isinstance(p, jax.tree_util.DictKey)), None)
        like = places.get(name)
        same = like is not None and like.shape == a.shape
        sharding = like.sharding if same else NamedSharding(ctx.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, opt_state)
