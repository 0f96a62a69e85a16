"""`generate` and `stream`: prompts in, tokens out; checks every argument before anything runs."""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation.arguments import (
    check_count,
    check_counts,
    check_drafts,
    check_length,
    check_model,
    check_prompts,
    check_records,
)
from deepseek_jax.generation.loop import RECORDS
from deepseek_jax.generation.running import CHUNK, STEPS, Generation, Info, begun, filled, prepared, stops
from deepseek_jax.generation.sampling import make_sampling
from deepseek_jax.model.transformer import Transformer

# The smallest cache, in tokens a row; larger ones are powers of two, so that few programs are compiled.
MIN_CACHE = 256


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] = 64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    use_mtp: bool | Sequence[bool] = False,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ctx: Context | None = None,
    *,
    cache_length: int | None = None,
    chunk: int = CHUNK,
    record: Sequence[str] = (),
) -> tuple[list[list[int]], Info]:
    """Continues prompts (lists of token ids, of any lengths); returns the new tokens of each, and `Info`.

    ``max_new_tokens``, ``temperature`` (0: greedy), ``top_k`` (0: all), ``top_p``, ``min_p``, ``seed`` and ``use_mtp``
    are one for all rows, or one for each. A row's random numbers depend on its seed and the position only, not on its
    place in the batch; of one seed, rows after the first have seeds of their own (`Info.seed`), so that equal prompts
    are continued differently. A row's logits depend on no other row, but products over a batch of another size are
    rounded otherwise: a prompt among others and alone have the same log-probabilities to about 2e-6 (float32), the same
    tokens up to near-ties. The filters act in the order temperature, top-k, top-p, min-p.

    ``use_mtp``: the MTP modules draft ``cfg.mtp_depth`` tokens a step (V3 §5.4.3). The distribution of the
    output stays the same; greedy output is the same up to near-ties. ``stop_ids``: tokens that end a row
    (kept in its output), or a list of them for each row; None for the model's ``cfg.eos_ids``, () for none.
    ``cache_length``: tokens a row of the cache, prompt and new; default the next power of two, from 256. ``chunk``:
    prompt tokens a prefill call feeds. ``record``: what `Info` is to have beside the log-probabilities, of "routing",
    "kept_size" and "kept_mask".

    ``ctx``: on a mesh the rows are split over its data, fsdp and expert axes, filled up with rows that do nothing
    where they do not divide; the tokens are those of one device up to near-ties. Several processes all call this with
    the same prompts, and all get the tokens.

    Raises ValueError for an empty prompt, ids outside the vocabulary, settings out of range, and for a prompt
    that with its new tokens exceeds the cache or the model's length.
    """
    run = stream(
        model,
        prompts,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        use_mtp,
        stop_ids,
        ctx,
        cache_length=cache_length,
        chunk=chunk,
        steps=STEPS,
        record=record,
    )
    for _ in run:
        pass
    return run.result()


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int] = 64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    use_mtp: bool | Sequence[bool] = False,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ctx: Context | None = None,
    *,
    cache_length: int | None = None,
    chunk: int = CHUNK,
    steps: int | None = None,
    record: Sequence[str] = (),
) -> Generation:
    """`generate` as an iterator: each item is the rows' new tokens of up to ``steps`` decoding steps, by default of as
    many as take about a tenth of a second, but 32 at most.

    Arguments and errors are those of `generate`, and are checked here, before the first item. Leaving the
    iteration at any time (Ctrl-C too) loses nothing that came: ``result()`` has it.
    """
    # Calls are of few tokens, a row's on one device: the MTP modules' too, which are run by themselves.
    ctx = check_model(model, ctx).whole_rows()
    cfg = model.cfg
    prompts = check_prompts(prompts, cfg.vocab_size)
    rows, lengths = len(prompts), np.array([len(p) for p in prompts])
    new = check_counts("max_new_tokens", max_new_tokens, rows)
    for name, value in {"chunk": chunk, **({} if steps is None else {"steps": steps})}.items():
        check_count(name, value)
    drafts, record = check_drafts(cfg, use_mtp, rows), check_records(cfg, record, RECORDS)
    most = int(np.argmax(lengths + new))
    check_length(cfg, lengths[most], new[most], cache_length)
    # The last step may hold drafts beyond the tokens asked for.
    depth = int(drafts.max())
    capacity = (cache_length or _cache_length(cfg, int(lengths[most] + new[most]))) + depth
    sampling = make_sampling(rows, temperature, top_k, top_p, min_p, seed)
    stop_BN = stops(cfg, stop_ids, rows)
    model = prepared(model, ctx)
    cache = model.init_cache(filled(rows, ctx), capacity, rewind=depth, ctx=ctx)
    return begun(model, cache, prompts, new, sampling, stop_BN, drafts, ctx, chunk, steps, record=record)


def _cache_length(cfg, needed: int) -> int:
    return min(max(1 << (needed - 1).bit_length(), MIN_CACHE), cfg.max_length)
