"""A Janus's programs that are compiled ahead of time, beside those of `programs` for language models.

Of "train" a step of the paper's last stage, on as many rows of text with a picture each as rows to draw; of "prefill"
rows of text with a picture each; of "decode" the next code of every picture, of two rows each.

Suffixes: B rows, N pictures, T tokens, S codes of a picture.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from deepseek_jax.analysis.counts import counts
from deepseek_jax.aot.programs import Program, beside, empty_cache, placed, rows_split, whole
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.core.params import named, renamed
from deepseek_jax.generation.sampling import make_sampling
from deepseek_jax.multimodal.draw import TEMPERATURE, WEIGHT, State, next_code
from deepseek_jax.multimodal.janus import abstract
from deepseek_jax.multimodal.laid import rows_at
from deepseek_jax.multimodal.objective import Pictures, Text, begin, loss, step
from deepseek_jax.multimodal.stages import STAGES
from deepseek_jax.parallel.context import Context
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.placement import row_groups

STAGE = STAGES["janus-pro-3"]
COLOURS = 3


def lower(cfg: JanusConfig, program: Program, devices: list, sizes: dict[str, int], layout: str | None):
    """`programs.lower` of a Janus. Raises ValueError, too, for quantised weights and for rows without room for a
    picture."""
    if program.weights != "bfloat16":
        raise ValueError(f"weights {program.weights!r}: those of a Janus are kept in bfloat16.")
    least = max(cfg.vision.n_tokens, cfg.n_codes) + 2
    room = program.context if program.kind == "decode" else program.length
    if room < least:
        raise ValueError(f"rows of {room} tokens have no room for a picture and its prompt: {least} at least.")
    mesh = make_mesh(**sizes, devices=devices)
    ctx = Context(mesh=mesh, layout=layout, **{"dtype": jnp.bfloat16} | program.options)
    return {"train": _train, "prefill": _prefill, "decode": _decode}[program.kind](cfg, program, ctx), mesh


def useful(cfg: JanusConfig, program: Program) -> tuple[int, dict[str, int]]:
    """Tokens of a chip, codes in decoding, and by convention the FLOPs for each: in training and prefill of the
    language model alone, in decoding of what both rows multiply with."""
    if program.kind == "decode":
        found = counts(cfg, program.context)
        row = found.language.decode_flops_per_token - 2 * found.language.embedding + 2 * found.components["gen_head"]
        return program.rows, {"both rows": 2 * (row + found.components["gen_aligner"])}
    language = counts(cfg, program.length).language
    if program.kind == "train":
        return 2 * program.rows * program.length, {"language model, causal": language.flops_per_token}
    return program.rows * program.length, {"language model, causal": language.forward_flops_per_token}


def _train(cfg: JanusConfig, program: Program, ctx: Context):
    model = placed(abstract(cfg, jnp.float32), ctx)
    places, training = named(model), jax.eval_shape(lambda m: begin(m, STAGE), model)
    training = replace(
        training,
        params=renamed(training.params, places),
        rest=renamed(training.rest, places),
        state=beside(training.state, places, ctx),
    )
    rows, T, S = program.rows * row_groups(ctx), program.length, cfg.n_codes
    array = partial(_rows, ctx=ctx)
    text = Text(array((rows, T), jnp.int32), array((rows, T), jnp.float32), array(_images(cfg, rows), jnp.float32))
    prompts = (array((rows, T - S), jnp.int32) for _ in range(2))
    batch = text, Pictures(*prompts, array((rows, S), jnp.int32))
    run = partial(step.__wrapped__, stage=STAGE, objective=partial(loss, ctx=ctx))
    out = jax.tree.map(lambda a: a.sharding, training), None
    rate = whole(jax.ShapeDtypeStruct((), jnp.float32), ctx)
    return jax.jit(run, donate_argnums=0, out_shardings=out).lower(training, batch, rate)


def _prefill(cfg: JanusConfig, program: Program, ctx: Context):
    """The first token of an answer about each row's picture, and the cache."""
    rows, T = program.rows * row_groups(ctx), program.length
    cache = _cache(cfg, rows, T, ctx)

    def prefill(model, tokens, images, cache):
        out = model(tokens, images, cache=cache, logits="last", ctx=ctx)
        return out.logits[:, -1].argmax(-1).astype(jnp.int32), out.cache

    auto = jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), cache)
    run = jax.jit(prefill, donate_argnums=3, in_shardings=(None, None, None, auto), out_shardings=(None, auto))
    tokens, images = _rows((rows, T), jnp.int32, ctx), _rows(_images(cfg, rows), jnp.float32, ctx)
    return run.lower(placed(abstract(cfg, jnp.bfloat16), ctx), tokens, images, cache)


def _decode(cfg: JanusConfig, program: Program, ctx: Context):
    """One more code of ``program.rows`` pictures a chip, as `draw.draw_pictures` draws them."""
    N = program.rows * row_groups(ctx)
    hidden = _rows((2 * N, cfg.language.dim), jnp.bfloat16, ctx)
    state = State(_cache(cfg, 2 * N, program.context, ctx), hidden, _rows((N, cfg.n_codes), jnp.int32, ctx))
    sampling = whole(jax.eval_shape(lambda: make_sampling(N, TEMPERATURE, 0, 1.0, 0.0, 0)), ctx)

    def decode(model, state, sampling, i):
        return next_code(model, state, sampling, jnp.float32(WEIGHT), i, ctx)

    auto = jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), state)
    run = jax.jit(decode, donate_argnums=1, in_shardings=(None, auto, None, None), out_shardings=auto)
    number = whole(jax.ShapeDtypeStruct((), jnp.int32), ctx)
    return run.lower(placed(abstract(cfg, jnp.bfloat16), ctx), state, sampling, number)


def _images(cfg: JanusConfig, count: int) -> tuple[int, ...]:
    return count, cfg.vision.image_size, cfg.vision.image_size, COLOURS


def _rows(shape: tuple[int, ...], dtype, ctx: Context) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_at(shape, ctx))


def _cache(cfg: JanusConfig, rows: int, slots: int, ctx: Context):
    return jax.tree.map(partial(rows_split, rows=rows, ctx=ctx), empty_cache(cfg.language, rows, slots, ctx))
