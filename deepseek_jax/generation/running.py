"""A generation under way: its calls on the device, and what has come of them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH
from deepseek_jax.generation.arguments import check_stops
from deepseek_jax.generation.layers import unstacked
from deepseek_jax.generation.loop import State, compiled
from deepseek_jax.generation.sampling import Sampling
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import fetch, place, row_groups
from deepseek_jax.parallel.shardings import activation_sharding

# Tokens of a prompt that one prefill call feeds, and decoding steps that one call runs on the device.
CHUNK = 128
# What a call feeds where two such calls have all that is to be fed, as a chat's next question: padding is paid for.
SHORT = 32
STEPS = 32
# Seconds that a reader may wait for the next tokens, where a step does not take longer.
LIVELY = 0.1


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


def prepared(model: Transformer, ctx: Context) -> Transformer:
    """The model where and as decoding wants it; one that is so already is returned as it is."""
    return unstacked(place(model, ctx), model.compute_dtype(ctx), ctx)


def stops(cfg, stop_ids: Sequence[int] | None) -> np.ndarray:
    """bool [V]: the tokens that end a row; None for the model's own."""
    stop_V = np.zeros(cfg.vocab_size, bool)
    stop_V[check_stops(cfg.eos_ids if stop_ids is None else stop_ids, cfg.vocab_size)] = True
    return stop_V


def filled(rows: int, ctx: Context) -> int:
    """Rows of the batch: on a mesh as many for every group of devices; those that fill up are done."""
    return rows if ctx.mesh is None else -(-rows // row_groups(ctx)) * row_groups(ctx)


def begun(
    model: Transformer,
    cache: Cache,
    prompts: list[list[int]],
    new: int,
    sampling: Sampling,
    stop_V: np.ndarray,
    depth: int,
    ctx: Context,
    chunk: int = CHUNK,
    steps: int | None = None,
    fed: int = 0,
) -> "Generation":
    """A generation of arguments that are checked. ``model``: as `prepared` gives it. ``cache``: of `filled` rows, with
    the first ``fed`` tokens of every prompt in it."""
    cfg, rows = model.cfg, len(prompts)
    batch, capacity = cache.segment.shape
    dtype = model.compute_dtype(ctx)
    lengths = np.array([len(p) for p in prompts], np.int32)
    if batch > rows:
        sampling = jax.tree.map(lambda a: a[np.arange(batch) % rows], sampling)
    known = np.pad(lengths, (0, batch - rows), constant_values=1)
    tokens_BS = np.zeros((batch, capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    state = State(
        cache=cache,
        tokens=tokens_BS,
        logprob=np.zeros((batch, capacity), np.float32),
        known=known,
        limit=known + np.int32(new),
        done=np.arange(batch) >= rows,
        offered=np.int32(0),
        q=np.zeros((batch, depth, cfg.vocab_size), np.float32),
        recent=np.zeros((batch, max(depth - 1, 0), cfg.dim), dtype),
        drafted=np.zeros(batch, np.int32),
        accepted=np.zeros(batch, np.int32),
    )
    return Generation(model, state, sampling, stop_V, lengths, depth, ctx, chunk, steps, fed)


class Generation(Iterator[list[list[int]]]):
    """A generation under way; made by `stream`, or for a `Conversation`."""

    def __init__(self, model, state: State, sampling, stop_V, lengths, depth: int, ctx, chunk: int, steps, fed=0):
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
        self._chunk, self._fed = chunk, fed
        # Several processes must make the same calls, whatever their clocks say.
        self._adapts = steps is None and jax.process_count() == 1
        self._steps = steps or (1 if self._adapts else STEPS)
        self._seen, self._lengths = lengths.copy(), lengths
        self._tokens: list[list[int]] = [[] for _ in lengths]
        self._logprobs: list[list[float]] = [[] for _ in lengths]
        self._done = np.zeros(len(lengths), bool)
        self._drafted = self._accepted = np.zeros(len(lengths), np.int32)

    def __next__(self) -> list[list[int]]:
        if self._done.all() or self._state is None:
            raise StopIteration
        end = int(self._lengths.max()) - 1
        chunk = min(SHORT, self._chunk) if end - self._fed <= 2 * SHORT else self._chunk
        for start in range(self._fed, end, chunk):
            self._state = self._prefill(self._model, self._state, np.int32(start), chunk=chunk, **self._static)
            self._fed = start + chunk
        began = time.perf_counter()
        arguments = (self._state, self._sampling, self._stop_V, np.int32(self._steps))
        self._state = self._decode(self._model, *arguments, **self._static)
        new = self._collect()
        if self._adapts and time.perf_counter() - began < LIVELY / 2:
            self._steps = min(2 * self._steps, STEPS)
        return new

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

    def given_up(self) -> tuple[Cache, list[int]]:
        """The cache, and row 0's tokens, which are in it but for the last. The generation ends here."""
        state, self._state = self._state, None
        known, tokens = fetch((state.known, state.tokens), self._static["ctx"])
        return state.cache, tokens[0, : known[0]].tolist()

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
