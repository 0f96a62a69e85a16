"""Text about pictures: a prompt's pictures and words fill the cache, then `deepseek_jax.generation` goes on as ever."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation.arguments import check_count, check_counts, check_length, check_model, check_prompts
from deepseek_jax.generation.engine import MIN_CACHE
from deepseek_jax.generation.running import STEPS, Generation, Info, begun, filled, prepared, stops
from deepseek_jax.generation.sampling import make_sampling
from deepseek_jax.multimodal.janus import Janus, with_language
from deepseek_jax.multimodal.laid import compiled
from deepseek_jax.parallel.placement import place

# A prefill's length is a multiple of this, so that few programs are compiled.
STRIDE = 64


def generate(
    model: Janus,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[np.ndarray]],
    max_new_tokens: int | Sequence[int] = 64,
    **settings,
) -> tuple[list[list[int]], Info]:
    """Continues prompts with pictures; returns the new tokens of each, and `Info`.

    ``images``: for each prompt its pictures (`pictures.shown`), in the order of their places, which are runs of
    ``cfg.image_id`` (`PromptWriter.about_pictures`). Settings are those of `stream`.
    """
    run = stream(model, prompts, images, max_new_tokens, steps=STEPS, **settings)
    for _ in run:
        pass
    return run.result()


def stream(
    model: Janus,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[np.ndarray]],
    max_new_tokens: int | Sequence[int] = 64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    stop_ids=None,
    ctx: Context | None = None,
    *,
    steps: int | None = None,
) -> Generation:
    """`generate` as an iterator. What is not said here is as in `deepseek_jax.generation.engine.stream`, which this is
    for prompts with pictures.

    Raises ValueError as that does, and for pictures that do not fit their prompts.
    """
    ctx = check_model(model.language, ctx).whole_rows()
    cfg = model.cfg.language
    prompts = check_prompts(prompts, cfg.vocab_size)
    rows = len(prompts)
    if len(images) != rows:
        raise ValueError(f"images has {len(images)} lists of pictures for {rows} prompts: give a list for each.")
    for row, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        places, P = prompt.count(model.cfg.image_id), model.cfg.vision.n_tokens
        if places != len(own) * P:
            raise ValueError(
                f"prompt {row} has {places} tokens of pictures, its {len(own)} pictures have {P} each: write it with "
                "PromptWriter.about_pictures."
            )
    new = check_counts("max_new_tokens", max_new_tokens, rows)
    if steps is not None:
        check_count("steps", steps)
    lengths = np.array([len(p) for p in prompts])
    most = int(np.argmax(lengths + new))
    check_length(cfg, lengths[most], new[most])
    needed = int((lengths + new).max())
    capacity = min(max(1 << (needed - 1).bit_length(), MIN_CACHE), cfg.max_length)
    sampling = make_sampling(rows, temperature, top_k, top_p, min_p, seed)
    stop_BN = stops(cfg, stop_ids, rows)
    model = place(model, ctx)
    model = with_language(model, prepared(model.language, ctx))
    fed = int(lengths.max()) - 1
    T = min(-(-max(fed, 1) // STRIDE) * STRIDE, capacity)
    tokens, segments = (np.zeros((filled(rows, ctx), T), np.int32) for _ in range(2))
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt) - 1], segments[row, : len(prompt) - 1] = prompt[:-1], 1
        if prompt[-1] == model.cfg.image_id:
            raise ValueError(f"prompt {row} ends in a picture: end it with words.")
    pictures = [picture for own in images for picture in own]
    # Those that fill up stand behind all places.
    pictures += [np.zeros_like(pictures[0])] * (filled(len(pictures), ctx) - len(pictures)) if pictures else []
    shown = np.stack(pictures).astype(np.float32) if pictures else None
    cache = model.init_cache(len(tokens), capacity, ctx=ctx)
    places = None if ctx.mesh is None else jax.tree.map(lambda a: a.sharding, cache)
    cache = compiled(_filled, "cache", places)(model, cache, tokens, segments, shown, ctx=ctx)
    drafts = np.zeros(rows, np.int32)
    return begun(model.language, cache, prompts, new, sampling, stop_BN, drafts, ctx, steps=steps, fed=fed)


def _filled(model: Janus, cache, tokens_BT, segments_BT, images, *, ctx: Context):
    x_BTD = model.embed(jnp.where(segments_BT != 0, tokens_BT, 0), images, ctx)
    out = model.language(tokens_BT, None, segments_BT, cache=cache, logits="none", ctx=ctx, embeddings=x_BTD)
    return out.cache
