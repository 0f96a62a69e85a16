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

    ``logprobs``: of each new token, the float32 log-softmax of the model's logits (no temperature or filter), in nats.
    ``behaviour_logprobs``: the log-probability with which it was drawn, after temperature and filters; 0 in a greedy
    row. ``finish_reason``: "stop" (a stop id came), "length", or "interrupted". ``drafted``, ``accepted``: drafts of
    the MTP modules that were verified, and those that are in the output. ``seed``: with its own a row alone gives what
    it gave among others.

    What was not asked for is None. ``routing``: int32 [L, n, K], the experts of the row's tokens in each MoE layer,
    prompt and new ones, all but the last, which was not fed: n is one less than there are. ``kept_size``: of each new
    token, how many tokens the filters left. ``kept_mask``: uint32 [new, V / 32], which (`sampling.unpacked`).
    """

    logprobs: list[list[float]]
    behaviour_logprobs: list[list[float]]
    finish_reason: list[str]
    drafted: list[int]
    accepted: list[int]
    seed: list[int]
    routing: list[np.ndarray] | None = None
    kept_size: list[list[int]] | None = None
    kept_mask: list[np.ndarray] | None = None


def prepared(model: Transformer, ctx: Context) -> Transformer:
    """The model where and as decoding wants it; one that is so already is returned as it is."""
    return unstacked(place(model, ctx), model.compute_dtype(ctx), ctx)


def stops(cfg, stop_ids, rows: int) -> np.ndarray:
    """int32 [rows, N]: the tokens that end each row, filled up with -1; None for the model's own. N is 8, or a larger
    power of two, so that few programs are compiled."""
    ids = [sorted(set(row)) for row in check_stops(cfg.eos_ids if stop_ids is None else stop_ids, cfg.vocab_size, rows)]
    longest = max(map(len, ids))
    stop_BN = np.full((rows, max(8, 1 << max(longest - 1, 0).bit_length())), -1, np.int32)
    for row, found in enumerate(ids):
        stop_BN[row, : len(found)] = found
    return stop_BN


def idle(model: Transformer, cache: Cache, stops: int, depth: int, ctx: Context, records) -> State:
    """Rows without tokens, which are done; ``stops``: how many each may have; ``records``: empty ones."""
    cfg, (batch, capacity) = model.cfg, cache.segment.shape
    return State(
        cache=cache,
        tokens=np.zeros((batch, capacity), np.int32),
        logprob=np.zeros((batch, capacity), np.float32),
        behaviour=np.zeros((batch, capacity), np.float32),
        known=np.zeros(batch, np.int32),
        limit=np.zeros(batch, np.int32),
        stop=np.full((batch, stops), -1, np.int32),
        done=np.ones(batch, bool),
        drafts=np.zeros(batch, np.int32),
        offered=np.zeros(batch, np.int32),
        q=np.zeros((batch, depth, cfg.vocab_size), np.float32),
        recent=np.zeros((batch, max(depth - 1, 0), *cfg.stream_shape), model.compute_dtype(ctx)),
        drafted=np.zeros(batch, np.int32),
        accepted=np.zeros(batch, np.int32),
        bias=None,
        records=records,
    )


def empty_record(name: str, batch: int, capacity: int, cfg) -> np.ndarray:
    """A record of `loop.RECORDS` with nothing in it."""
    if name == "kept_mask":
        return np.zeros((batch, capacity, -(-cfg.vocab_size // 32)), np.uint32)
    return np.full((batch, capacity, *((cfg.n_moe_layers, cfg.moe.top_k) if name == "routing" else ())), -1, np.int32)


def filled(rows: int, ctx: Context) -> int:
    """Rows of the batch: on a mesh as many for every group of devices; those that fill up are done."""
    return rows if ctx.mesh is None else -(-rows // row_groups(ctx)) * row_groups(ctx)


def begun(
    model: Transformer,
    cache: Cache,
    prompts: list[list[int]],
    new: np.ndarray,
    sampling: Sampling,
    stop_BN: np.ndarray,
    drafts: np.ndarray,
    ctx: Context,
    chunk: int = CHUNK,
    steps: int | None = None,
    fed: int = 0,
    record: Sequence[str] = (),
) -> "Generation":
    """A generation of arguments that are checked. ``model``: as `prepared` gives it. ``cache``: of `filled` rows, with
    the first ``fed`` tokens of every prompt in it. ``new``, ``drafts``: integers [rows]."""
    cfg, rows = model.cfg, len(prompts)
    batch, capacity = cache.segment.shape
    depth, lengths = int(drafts.max()), np.array([len(p) for p in prompts], np.int32)
    seeds = sampling.seed
    if batch > rows:
        every = lambda a: a[np.arange(batch) % rows]  # noqa: E731
        sampling, new, stop_BN, drafts = jax.tree.map(every, (sampling, new, stop_BN, drafts))
    known = np.pad(lengths, (0, batch - rows), constant_values=1)
    tokens_BS = np.zeros((batch, capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    records = {name: empty_record(name, batch, capacity, cfg) for name in record}
    state = replace(
        idle(model, cache, stop_BN.shape[1], depth, ctx, records),
        tokens=tokens_BS,
        known=known,
        limit=(known + new).astype(np.int32),
        stop=stop_BN,
        done=np.arange(batch) >= rows,
        drafts=drafts,
    )
    return Generation(model, state, sampling, seeds, lengths, depth, ctx, chunk, steps, fed)


class Generation(Iterator[list[list[int]]]):
    """A generation under way; made by `stream`, or for a `Conversation`."""

    def __init__(self, model, state: State, sampling, seeds, lengths, depth: int, ctx, chunk: int, steps, fed=0):
        self._stops = [set(row.tolist()) - {-1} for row in state.stop[: len(lengths)]]
        # Placed at once: arrays that are bound to a device in one call and not in the next compile twice.
        if ctx.mesh is None:
            device = next(iter(jax.tree.leaves(model)[0].devices()))
            self._state, self._sampling = jax.device_put((state, sampling), device)
        else:
            self._state, self._sampling = _placed(state, sampling, ctx)
        self._model, self._seeds = model, seeds.tolist()
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
        self._behaviour: list[list[float]] = [[] for _ in lengths]
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
        self._state = self._decode(self._model, self._state, self._sampling, np.int32(self._steps), **self._static)
        new = self._collect()
        if self._adapts and time.perf_counter() - began < LIVELY / 2:
            self._steps = min(2 * self._steps, STEPS)
        return new

    def _collect(self) -> list[list[int]]:
        state = self._state
        wanted = (state.known, state.tokens, state.done, state.drafted, state.accepted, state.logprob, state.behaviour)
        rows, found = len(self._lengths), fetch(wanted, self._static["ctx"])
        known, tokens, done, drafted, accepted, logprob, behaviour = (a[:rows] for a in found)
        new = [tokens[row, a:b].tolist() for row, (a, b) in enumerate(zip(self._seen, known, strict=True))]
        for row, (a, b) in enumerate(zip(self._seen, known, strict=True)):
            values = logprob[row, a:b]
            if not np.isfinite(values).all():
                raise ValueError(f"the model's logits of row {row} are not finite: its weights hold NaN or inf.")
            self._tokens[row].extend(new[row])
            self._logprobs[row].extend(values.tolist())
            self._behaviour[row].extend(behaviour[row, a:b].tolist())
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
        for tokens, done, stop in zip(self._tokens, self._done, self._stops, strict=True):
            ended = "stop" if tokens and tokens[-1] in stop else "length"
            reasons.append(ended if done else "interrupted")
        return [list(row) for row in self._tokens], Info(
            logprobs=[list(row) for row in self._logprobs],
            behaviour_logprobs=[list(row) for row in self._behaviour],
            finish_reason=reasons,
            drafted=self._drafted.tolist(),
            accepted=self._accepted.tolist(),
            seed=self._seeds,
            **self._records(),
        )

    def _records(self) -> dict[str, list]:
        if self._state is None:  # given up by a `Conversation`, which records nothing
            return {}
        found, result = fetch(self._state.records, self._static["ctx"]), {}
        for name, record in found.items():
            rows = [record[row, a:b] for row, (a, b) in enumerate(zip(self._lengths, self._seen, strict=True))]
            if name == "routing":
                rows = [record[row, : b - 1].transpose(1, 0, 2) for row, b in enumerate(self._seen)]
            result[name] = [row.tolist() for row in rows] if name == "kept_size" else rows
        return result


def _placed(state: State, sampling: Sampling, ctx: Context):
    """On a mesh: what belongs to rows goes with its rows, the rest everywhere; the cache lies where it was made."""

    def place(a):
        return activation_sharding((BATCH, *(None,) * (a.ndim - 1)) if a.ndim else (), a.shape, ctx)

    rest = replace(state, cache=None), sampling
    # Not `device_put`: it would compare the values among processes first.
    placed, sampling = jax.jit(lambda a: a, out_shardings=jax.tree.map(place, rest))(rest)
    return replace(placed, cache=state.cache), sampling
