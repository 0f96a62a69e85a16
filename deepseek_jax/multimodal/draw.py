"""Pictures of text: codes are drawn one after the other, with classifier-free guidance (2207.12598; Janus-Pro §2.1).

Each picture is two rows of a batch, its prompt and the same without its words; the codes are drawn from
uncond + weight x (cond - uncond), and both rows go on with them. Suffixes: N pictures, B = 2 N rows, T tokens,
K codes, S codes of a picture, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.generation.arguments import check_length, check_model, check_prompts
from deepseek_jax.generation.running import filled, prepared
from deepseek_jax.generation.sampling import DRAW, Sampling, distribution, draw, make_sampling
from deepseek_jax.multimodal.janus import Janus, with_language
from deepseek_jax.multimodal.laid import compiled, rows_at
from deepseek_jax.multimodal.pictures import pixels
from deepseek_jax.parallel.placement import fetch, place

# As released: weight of the guidance, and temperature.
WEIGHT, TEMPERATURE = 5.0, 1.0
# Codes that one call on the device draws.
STEPS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """``hidden``: [B, D], of each row's last token. ``codes``: int32 [N, S], drawn so far, then 0."""

    cache: Any
    hidden: jax.Array
    codes: jax.Array


@dataclass(frozen=True)
class Drawn:
    """``images``: uint8 [N, side, side, 3]. ``codes``: int32 [N, S]. ``seed``: of each; with it a picture alone is what
    it was among others."""

    images: np.ndarray
    codes: np.ndarray
    seed: list[int]


def draw_pictures(
    model: Janus,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    weight: float = WEIGHT,
    temperature: float = TEMPERATURE,
    seed: int | Sequence[int] = 0,
    progress: Callable[[int], None] = lambda drawn: None,
    ctx: Context | None = None,
) -> Drawn:
    """Pictures of prompts, all drawn at once.

    ``prompts``: lists of ids that end where a picture begins (`PromptWriter.to_draw`). ``pad_id``: what stands for a
    prompt's words in its second row, between its first token and its last. ``weight``: 1 draws by the prompt alone, 0
    without it. ``temperature``: 0 takes the likeliest code. ``seed``: as in `deepseek_jax.generate`: a picture depends
    on its prompt and its seed only. ``progress``: is told after some codes how many of each picture there are.
    ``ctx``: on a mesh the pictures are split over its data, fsdp and expert axes, both rows of one together, filled up
    with pictures that are not returned.

    Raises ValueError for prompts and settings out of range and for logits that are not finite, LayoutError where the
    context's layout does not divide the model.
    """
    ctx, cfg = check_model(model.language, ctx).whole_rows(), model.cfg
    prompts = check_prompts(prompts, cfg.language.vocab_size)
    N, S = len(prompts), cfg.n_codes
    if not isinstance(weight, Real) or isinstance(weight, bool) or not np.isfinite(weight):
        raise ValueError(
            f"weight={weight!r} must be a finite number: 1 draws by the prompt alone, {WEIGHT:g} is usual."
        )
    if not 0 <= pad_id < cfg.language.vocab_size:
        raise ValueError(f"pad_id {pad_id} lies outside the vocabulary of {cfg.language.vocab_size}.")
    longest = max(map(len, prompts))
    check_length(cfg.language, longest, S)
    sampling = make_sampling(N, temperature, 0, 1.0, 0.0, seed)
    drawn_at_once = filled(N, ctx)
    every = np.arange(drawn_at_once) % N
    tokens, segments = (np.zeros((2 * drawn_at_once, longest), np.int32) for _ in range(2))
    for i, prompt in enumerate(prompts[n] for n in every):
        tokens[2 * i, : len(prompt)] = tokens[2 * i + 1, : len(prompt)] = prompt
        tokens[2 * i + 1, 1 : len(prompt) - 1] = pad_id
        segments[2 * i : 2 * i + 2, : len(prompt)] = 1
    model = place(model, ctx)
    model = with_language(model, prepared(model.language, ctx))
    cache = model.init_cache(2 * drawn_at_once, longest + S, ctx=ctx)
    places, seeds = None, sampling.seed
    if ctx.mesh is None:
        sampling = jax.device_put(sampling, next(iter(jax.tree.leaves(model)[0].devices())))
    else:
        sampling = jax.tree.map(lambda a: a[every], sampling)
        hidden, codes = (
            rows_at((rows, size), ctx) for rows, size in ((len(tokens), cfg.language.dim), (len(every), S))
        )
        places = State(jax.tree.map(lambda a: a.sharding, cache), hidden, codes)
    state = compiled(_begun, "cache", places)(model, cache, tokens, segments, ctx=ctx)
    draw_codes = compiled(_drawn, "state", places)
    for first in range(0, S, STEPS):
        steps = min(STEPS, S - first)
        state = draw_codes(model, state, sampling, np.float32(weight), np.int32(first), np.int32(steps), ctx=ctx)
        if not np.isfinite(fetch(state.hidden, ctx)).all():
            raise ValueError("the model's hidden states are not finite: its weights hold NaN or inf.")
        progress(first + steps)
    codes = fetch(state.codes, ctx)[:N]
    # One after the other: the last convolutions have a hundred times the numbers of the codes.
    images = [pixels(fetch(_decode(model.vq, codes[i : i + 1]), ctx))[0] for i in range(N)]
    return Drawn(np.stack(images), codes, seeds.tolist())


def _begun(model: Janus, cache, tokens_BT, segments_BT, *, ctx: Context) -> State:
    out = model.language(tokens_BT, None, segments_BT, cache=cache, logits="none", ctx=ctx)
    last_B = segments_BT.sum(-1) - 1
    hidden_BD = jnp.take_along_axis(out.hidden, last_B[:, None, None], axis=1)[:, 0]
    codes = jnp.zeros((tokens_BT.shape[0] // 2, model.cfg.n_codes), jnp.int32)
    return State(out.cache, hidden_BD, codes)


def _drawn(model: Janus, state: State, sampling: Sampling, weight, first, steps, *, ctx: Context) -> State:
    """The codes ``first`` .. ``first + steps``."""
    step = lambda i, state: next_code(model, state, sampling, weight, i, ctx)  # noqa: E731
    return jax.lax.fori_loop(first, first + steps, step, state)


def next_code(model: Janus, state: State, sampling: Sampling, weight, i, ctx: Context) -> State:
    """The code number ``i`` of every picture, fed to its two rows."""
    logits_BK = ctx.ops.constrain(model.code_logits(state.hidden[:, None], ctx)[:, 0], (BATCH, None))
    p_NK = distribution(guided(logits_BK, weight)[:, None], sampling)[:, 0]
    code_N = draw(p_NK, sampling, jnp.full(p_NK.shape[:1], i, jnp.int32), DRAW)
    x_B1D = jnp.repeat(model.embed_codes(code_N[:, None], ctx), 2, axis=0)
    ids_B1 = jnp.zeros(x_B1D.shape[:2], jnp.int32)
    out = model.language(ids_B1, cache=state.cache, logits="none", ctx=ctx, embeddings=x_B1D)
    return replace(state, cache=out.cache, hidden=out.hidden[:, 0], codes=state.codes.at[:, i].set(code_N))


def guided(logits_BK: jax.Array, weight: jax.Array) -> jax.Array:
    """[N, K] of rows in pairs, with the prompt and without: uncond + weight x (cond - uncond)."""
    cond_NK, uncond_NK = logits_BK[0::2], logits_BK[1::2]
    return uncond_NK + weight * (cond_NK - uncond_NK)


_decode = jax.jit(lambda vq, codes: vq.decode(codes))
