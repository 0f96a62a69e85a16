"""`generate` and `stream`: prompts in, tokens out; checks every argument before anything runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.generation.arguments import check_count, check_model, check_prompts, check_stops
from deepseek_jax.generation.layers import unstacked
from deepseek_jax.generation.loop import State, compiled
from deepseek_jax.generation.sampling import Sampling, make_sampling
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import fetch, place, row_groups
from deepseek_jax.parallel.shardings import activation_sharding

# Tokens of a prompt that one prefill call feeds, and decoding steps that one call runs on the device.
CHUNK = 128
STEPS = 32
# The smallest cache, in tokens a row; larger ones are powers of two, so that few programs are compiled.
MIN_CACHE = 256


@dataclass(frozen=True)
class Info:
    """What came with the tokens, a list entry a row.

    ``logprobs``: of each new token, the float32 log-softmax of the model's logits (no temperature or
    filter), in nats. ``finish_reason``: "stop" (a stop id came), "length", or "interrupted". ``drafted``,
    ``accepted``: drafts of the MTP modules that were verified, and those that are in the output.
    """

    logprobs: list[list[float]]
    finish_reason: list[str]
    drafted: list[int]
    accepted: list[int]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    use_mtp: bool = False,
    stop_ids: Sequence[int] | None = None,
    ctx: Context | None = None,
    *,
    cache_length: int | None = None,
    chunk: int = CHUNK,
) -> tuple[list[list[int]], Info]:
    """Continues prompts (lists of token ids, of any lengths); returns the new tokens of each, and `Info`.

    ``temperature`` (0: greedy), ``top_k`` (0: all), ``top_p``, ``min_p`` and ``seed`` are numbers, or one for
    each row. A row's random numbers depend on its seed, its place in the batch and the position only. Its
    logits depend on no other row, but products over a batch of another size are rounded otherwise: a prompt
    among others and alone have the same log-probabilities to about 2e-6 (float32), the same tokens up to
    near-ties. The filters act in the order temperature, top-k, top-p, min-p.

    ``use_mtp``: the MTP modules draft ``cfg.mtp_depth`` tokens a step (V3 §5.4.3). The distribution of the
    output stays the same; greedy output is the same up to near-ties. ``stop_ids``: tokens that end a row
    (kept in its output); None for the model's ``cfg.eos_ids``, () for none. ``cache_length``: tokens a row
    of the cache, prompt and new; default the next power of two, from 256. ``chunk``: prompt tokens a prefill
    call feeds.

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
    )
    for _ in run:
        pass
    return run.result()


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    use_mtp: bool = False,
    stop_ids: Sequence[int] | None = None,
    ctx: Context | None = None,
    *,
    cache_length: int | None = None,
    chunk: int = CHUNK,
    steps: int = STEPS,
) -> "Generation":
    """`generate` as an iterator: each item is the rows' new tokens of up to ``steps`` decoding steps.

    Arguments and errors are those of `generate`, and are checked here, before the first item. Leaving the
    iteration at any time (Ctrl-C too) loses nothing that came: ``result()`` has it.
    """
    # Calls are of few tokens, a row's on one device: the MTP modules' too, which are run by themselves.
    ctx = check_model(model, ctx).whole_rows()
    cfg = model.cfg
    prompts = check_prompts(prompts, cfg.vocab_size)
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk), ("steps", steps)):
        check_count(name, value)
    if use_mtp and not cfg.mtp_depth:
        raise ValueError(f"use_mtp=True, but {cfg.name} has no MTP modules (mtp_depth=0).")
    depth = cfg.mtp_depth if use_mtp else 0
    lengths = np.array([len(p) for p in prompts], np.int32)
    capacity = _capacity(cfg, int(lengths.max()), max_new_tokens, depth, cache_length)
    sampling = make_sampling(len(prompts), temperature, top_k, top_p, min_p, seed)
    rows = batch = len(prompts)
    if ctx.mesh is not None:
        # As many rows for every group of devices: those that fill up are done.
        batch = -(-rows // row_groups(ctx)) * row_groups(ctx)
        sampling = jax.tree.map(lambda a: a[np.arange(batch) % rows], sampling)
    known = np.pad(lengths, (0, batch - rows), constant_values=1)
    stop_V = np.zeros(cfg.vocab_size, bool)
    stop_V[check_stops(cfg.eos_ids if stop_ids is None else stop_ids, cfg.vocab_size)] = True

    dtype = model.compute_dtype(ctx)
    tokens_BS = np.zeros((batch, capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    state = State(
        cache=model.init_cache(batch, capacity, rewind=depth, ctx=ctx),
        tokens=tokens_BS,
        logprob=np.zeros((batch, capacity), np.float32),
        known=known,
        limit=known + np.int32(max_new_tokens),
        done=np.arange(batch) >= rows,
        offered=np.int32(0),
        q=np.zeros((batch, depth, cfg.vocab_size), np.float32),
        recent=jnp.zeros((batch, max(depth - 1, 0), cfg.dim), dtype),
        drafted=np.zeros(batch, np.int32),
        accepted=np.zeros(batch, np.int32),
    )
    model = unstacked(place(model, ctx), dtype, ctx)
    return Generation(model, state, sampling, stop_V, lengths, depth, ctx, chunk, steps)


class Generation(Iterator[list[list[int]]]):
    """A generation under way; made by `stream`."""

    def __init__(self, model, state: State, sampling, stop_V, lengths, depth: int, ctx, chunk: int, steps: int):
        # Placed at once: arrays that are bound to a device in one call and not in the next compile twice.
        if ctx.mesh is None:
            device = next(iter(jax.tree.leaves(model)[0].devices()))
            self._state, self._sampling, self._stop_V = jax.device_put((state, sampling, stop_V), device)
        else:
            self._state, self._sampling, self._stop_V = _placed(state, sampling, stop_V, ctx)
        self._model, self._stop_ids = model, set(np.flatnonzero(stop_V).tolist())
        self._static = {"depth": depth, "ctx": ctx}
        leaves, structure = jax.tree.flatten(self._state)
        kept = () if ctx.mesh is None else (structure, tuple(a.sharding for a in leaves))
        self._prefill, self._decode = compiled(*kept)
        self._chunk, self._steps = chunk, steps
        self._prefilled = False
        self._seen, self._lengths = lengths.copy(), lengths
        self._tokens: list[list[int]] = [[] for _ in lengths]
        self._logprobs: list[list[float]] = [[] for _ in lengths]
        self._done = np.zeros(len(lengths), bool)
        self._drafted = self._accepted = np.zeros(len(lengths), np.int32)

    def __next__(self) -> list[list[int]]:
        if self._done.all():
            raise StopIteration
        if not self._prefilled:
            for start in range(0, int(self._lengths.max()) - 1, self._chunk):
                at = np.int32(start)
                self._state = self._prefill(self._model, self._state, at, chunk=self._chunk, **self._static)
            self._prefilled = True
        arguments = (self._state, self._sampling, self._stop_V, np.int32(self._steps))
        self._state = self._decode(self._model, *arguments, **self._static)
        return self._collect()

    def _collect(self) -> list[list[int]]:
        state = self._state
        wanted = (state.known, state.tokens, state.logprob, state.done, state.drafted, state.accepted)
        rows = len(self._lengths)
        known, tokens, logprob, done, drafted, accepted = (a[:rows] for a in fetch(wanted, self._static["ctx"]))
        new = [tokens[row, a:b].tolist() for row, (a, b) in enumerate(zip(self._seen, known, strict=True))]
        for row, (a, b) in enumerate(zip(self._seen, known, strict=True)):
            values = logprob[row, a:b]
            if not np.isfinite(values).all():
                raise ValueError(f"the model's logits of row {row} are not finite: its weights hold NaN or inf.")
            self._tokens[row].extend(new[row])
            self._logprobs[row].extend(values.tolist())
        self._seen, self._done, self._drafted, self._accepted = known, done, drafted, accepted
        return new

    def result(self) -> tuple[list[list[int]], Info]:
        """All tokens so far, and their `Info`; a row that is not finished is "interrupted"."""
        reasons = []
        for tokens, done in zip(self._tokens, self._done, strict=True):
            ended = "stop" if tokens and tokens[-1] in self._stop_ids else "length"
            reasons.append(ended if done else "interrupted")
        return [list(row) for row in self._tokens], Info(
            logprobs=[list(row) for row in self._logprobs],
            finish_reason=reasons,
            drafted=self._drafted.tolist(),
            accepted=self._accepted.tolist(),
        )


def _placed(state: State, sampling: Sampling, stop_V: np.ndarray, ctx: Context):
    """On a mesh: what belongs to rows goes with its rows, the rest everywhere; the cache lies where it was made."""

    def place(a):
        return activation_sharding((BATCH, *(None,) * (a.ndim - 1)) if a.ndim else (), a.shape, ctx)

    rest = replace(state, cache=None), sampling
    # Not `device_put`: it takes no random keys to devices of other processes.
    placed, sampling = jax.jit(lambda a: a, out_shardings=jax.tree.map(place, rest))(rest)
    everywhere = activation_sharding((None,), stop_V.shape, ctx)
    return replace(placed, cache=state.cache), sampling, jax.device_put(stop_V, everywhere)


def _capacity(cfg, longest: int, new: int, depth: int, cache_length: int | None) -> int:
    """Slots a row: the last step may hold ``depth`` drafts beyond the tokens asked for."""
    needed = longest + new
    if needed > cfg.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones make {needed}, beyond the {cfg.max_length} of "
            f"{cfg.name}; shorten the prompt or lower max_new_tokens."
        )
    if cache_length is None:
        return min(max(1 << (needed - 1).bit_length(), MIN_CACHE), cfg.max_length) + depth
    check_count("cache_length", cache_length)
    if needed > cache_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones make {needed}, beyond cache_length={cache_length}."
        )
    return cache_length + depth
