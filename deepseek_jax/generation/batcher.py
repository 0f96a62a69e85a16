"""Requests that come and go, continued together: continuous batching on the slots of one cache.

Plain Python without threads. Between two calls of decoding at most one call feeds a prompt, so that a long prompt holds
nobody up for longer than that. A slot keeps its tokens when its choice ends: where a new prompt begins with them, only
the rest of it is fed.
"""

import time
from collections import Counter, deque

import jax
import numpy as np

from deepseek_jax.core.context import Context
from deepseek_jax.generation import slots as device
from deepseek_jax.generation.arguments import check_count, check_drafts, check_length, check_model
from deepseek_jax.generation.choices import (
    Choice,
    GrammarFailed,
    Offer,
    Phase,
    Slot,
    check_request,
    choices_of,
    row_of,
)
from deepseek_jax.generation.request import MAX_TOP_LOGPROBS, Delta, Finish, QueueFull, Request, Sight, Stats
from deepseek_jax.generation.running import CHUNK, prepared
from deepseek_jax.generation.sampling import unpacked
from deepseek_jax.generation.sight import Eyes
from deepseek_jax.generation.slots import News
from deepseek_jax.model.transformer import Transformer

STEPS = 8  # decoding steps of a call
COUNTS = ("prompt", "queried", "cached", "generated", "drafted", "accepted", "drafting_steps")


class Batcher:
    """Continues requests, ``slots`` texts at a time, each with its prompt of up to ``length`` tokens.

    A choice's tokens and log-probabilities do not depend on its slot or on what else is under way, to the last bit;
    where a part of its prompt was kept, to rounding, as its prompt was then fed in other pieces. They are those of
    `generate` up to near-ties. ``use_mtp``: the MTP modules draft for the requests that ask for it; a step then has
    room for drafts in every slot. ``queue``: requests that may wait. ``chunk``: tokens of a prompt that a call feeds.
    ``steps``: decoding steps of a call, after which new requests are looked at; one for a first token, while prompts
    are fed, or where a grammar binds a choice. ``prefixes``: kept tokens are shared, where the model's cache can be
    taken back. ``routing``: experts are recorded. ``sight``: for prompts with pictures. ``ctx``: of one device.

    Everything is compiled here. Raises ValueError for arguments out of range, and for a context with a mesh.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int = 8,
        length: int = 4096,
        use_mtp: bool = False,
        queue: int = 64,
        *,
        chunk: int = CHUNK,
        steps: int = STEPS,
        prefixes: bool = True,
        routing: bool = False,
        sight: Sight | None = None,
        ctx: Context | None = None,
    ):
        ctx = check_model(model, ctx)
        if ctx.mesh is not None:
            raise ValueError("a batcher runs on one device: its slots are not split over a mesh; use dsj.generate.")
        for name, value in {"slots": slots, "length": length, "queue": queue, "chunk": chunk, "steps": steps}.items():
            check_count(name, value)
        cfg = model.cfg
        check_length(cfg, 1, length - 1)
        depth = int(check_drafts(cfg, use_mtp, 1)[0])
        self.offer = Offer(cfg, slots, length, depth, routing, sight)
        self._eyes = Eyes(sight, chunk, cfg.dim)
        self.reuses = prefixes and device.truncates(model, length + depth, ctx)
        self._model, self._most, self._chunk, self._steps = prepared(model, ctx), queue, chunk, steps
        self._again = 2 * depth if self.reuses else length  # tokens of what is shared that are fed all the same
        self._static = {"depth": depth, "ctx": ctx}
        sizes = (slots, length, depth, min(MAX_TOP_LOGPROBS, cfg.vocab_size), routing)
        self._device = device.make_slots(self._model, *sizes, ctx)
        self._slots = [Slot(i) for i in range(slots)]
        self._queue: deque[list[Choice]] = deque()
        self._ids = self._clock = 0
        self._counts, self._finished, self._accepted_at = Counter(), Counter(), np.zeros(depth, int)
        self._every = np.full((slots, -(-cfg.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        self._warm()

    def _warm(self) -> None:
        """Runs each program once, for nobody: all are compiled then, and no request compiles another."""
        number, none = np.int32(0), Choice(0, 0, Request([0]), [0], [], 0, 0.0)
        self._device = device.admit(self._device, number, row_of(none, self.offer), number)
        self._prefill(self._slots[0], scored=False)
        self._device = device.fork(self._device, number, number, np.uint32(0))
        for top in (False, True):
            self._call([], self._every, 1, top)
        if self.offer.routing:
            device.routing_of(self._device, number)
        device.scores_of(self._device, number)
        jax.block_until_ready(self._device)

    def check(self, request: Request) -> None:
        """Raises ValueError where `submit` would. Any thread may ask."""
        check_request(request, self.offer)

    def submit(self, request: Request) -> int:
        """Puts a request in the queue; its number. Raises ValueError for one that cannot be continued, QueueFull."""
        self.check(request)
        if len(self._queue) >= self._most + len(self._free()):
            raise QueueFull(f"{len(self._queue)} requests are waiting, as many as may; try again later.")
        self._ids += 1
        self._queue.append(choices_of(self._ids, request, self.offer.cfg, time.monotonic()))
        return self._ids

    def cancel(self, request: int) -> None:
        """Gives up a request, queued or under way; its slots are free at once. One that has ended is none."""
        gone = [choices for choices in self._queue if choices[0].request == request]
        self._queue = deque(choices for choices in self._queue if choices[0].request != request)
        mine = [slot for slot in self._slots if slot.choice is not None and slot.choice.request == request]
        self._finished["cancelled"] += sum(map(len, gone)) + len(mine)
        for slot in mine:
            self._release(slot)

    def step(self) -> list[Delta]:
        """Lets requests in, feeds a part of one prompt, decodes; what came of it."""
        self._admit()
        self._feed()
        return self._decode()

    def update(self, model: Transformer) -> None:
        """Goes on with other weights of the same model; nothing of what was kept is shared any more.

        Raises ValueError for another model, and while choices are under way, which began with the weights before.
        """
        if len(self._free()) < len(self._slots):
            raise ValueError("choices are under way: step until they end, or cancel them, before weights change.")
        new = prepared(model, check_model(model, self._static["ctx"]))
        leaves, structures = zip(*map(jax.tree.flatten, (new, self._model)), strict=True)
        shapes = [[(a.shape, a.dtype) for a in of_one] for of_one in leaves]
        if structures[0] != structures[1] or shapes[0] != shapes[1]:
            raise ValueError(f"the new weights are not of {self.offer.cfg.name} in the dtypes that this batcher runs.")
        self._model = new
        for slot in self._slots:
            slot.tokens, slot.fed = [], 0

    def stats(self) -> Stats:
        taken = [slot for slot in self._slots if slot.phase != Phase.FREE]
        return Stats(
            slots=len(self._slots),
            running=len(taken),
            waiting=sum(map(len, self._queue)),
            held=sum(slot.fed for slot in taken),
            room=len(self._slots) * self.offer.length,
            finished=dict(self._finished),
            accepted_at=tuple(self._accepted_at.tolist()),
            **{name: self._counts[name] for name in COUNTS},
        )

    def _free(self) -> list[Slot]:
        """Free slots, the longest unused first."""
        return sorted((slot for slot in self._slots if slot.phase == Phase.FREE), key=lambda slot: slot.used)

    def _release(self, slot: Slot) -> None:
        self._clock += 1
        slot.phase, slot.choice, slot.twins, slot.used = Phase.FREE, None, [], self._clock

    def _admit(self) -> None:
        """Slots for those that have waited longest; for choices of one request together, since one prompt is fed."""
        while self._queue and len(free := self._free()) >= len(self._queue[0]):
            choices, now = self._queue.popleft(), time.monotonic()
            source = self._source(choices[0].prompt, first=free)
            target = source if source.phase == Phase.FREE else free[0]
            twins = [slot for slot in free if slot is not target][: len(choices) - 1]
            for slot, choice in zip([target, *twins], choices, strict=True):
                slot.phase, slot.choice, choice.admitted = Phase.TWIN, choice, now
            target.phase, target.twins = Phase.ENTERING, twins

    def _source(self, prompt: list[int], first: list[Slot]) -> Slot:
        """The slot that holds most of a prompt; of equals one of ``first``, in their order."""
        return max([*first, *self._slots], key=lambda slot: slot.kept(prompt, self._again))

    def _feed(self) -> None:
        """One call for the prompt that has waited longest; those that are fed begin to decode."""
        entering = [slot for slot in self._slots if slot.phase in (Phase.ENTERING, Phase.FEEDING)]
        for slot in sorted(entering, key=lambda slot: slot.choice.request):
            if slot.phase == Phase.ENTERING:
                self._enter(slot)
            hungry = slot.fed < len(slot.tokens) - 1
            if hungry:
                self._prefill(slot, slot.choice.scored)
                slot.fed = min(slot.fed + self._chunk, len(slot.tokens) - 1)
            if slot.fed == len(slot.tokens) - 1:
                self._begin(slot)
            if hungry:
                return

    def _enter(self, slot: Slot) -> None:
        """When its turn to be fed has come, and not before: the prompts before it may have brought what it shares."""
        prompt, slot.seen = slot.choice.prompt, self._eyes.see(slot.choice)
        # What was kept has no log-probabilities, which come of feeding it; of pictures ids say nothing.
        looks = self.reuses and not slot.choice.scored and slot.seen is None
        source = self._source(prompt, first=[slot]) if looks else slot
        kept, row = source.kept(prompt, self._again) if looks else 0, row_of(slot.choice, self.offer)
        if source is not slot:
            self._fork(source, slot)
        self._device = device.admit(self._device, np.int32(slot.number), row, np.int32(kept))
        slot.phase, slot.tokens, slot.fed = Phase.FEEDING, list(prompt), kept
        for one in (slot, *slot.twins):
            one.choice.cached = kept
        self._counts.update(prompt=len(prompt), queried=len(prompt) if looks else 0, cached=kept)

    def _begin(self, slot: Slot) -> None:
        for twin in slot.twins:
            self._fork(slot, twin)
            twin.tokens, twin.fed, twin.seen = list(slot.tokens), slot.fed, slot.seen
        for started in (slot, *slot.twins):
            started.phase, started.choice.began = Phase.RUNNING, time.monotonic()
        slot.twins = []

    def _fork(self, source: Slot, target: Slot) -> None:
        numbers = np.int32(source.number), np.int32(target.number), np.uint32(target.choice.seed)
        self._device = device.fork(self._device, *numbers)

    def _decode(self) -> list[Delta]:
        # While prompts wait to be fed, few decode, and a step takes as long as if all did; a first token is waited for.
        taken = [slot for slot in self._slots if slot.phase != Phase.FREE]
        hurry = any(slot.phase != Phase.RUNNING or len(slot.tokens) == len(slot.choice.prompt) for slot in taken)
        deltas, allowed, steps = [], self._every, 1 if hurry else self._steps
        for slot in [slot for slot in self._slots if slot.phase == Phase.RUNNING and slot.choice.bound]:
            allowed, steps = self._every.copy() if allowed is self._every else allowed, 1
            try:
                mask = slot.choice.allowed()
            except GrammarFailed as error:
                deltas.append(self._delta(slot, "error", str(error)))
                continue
            if mask is not None:
                allowed[slot.number] = mask
                # Bits behind the vocabulary's last token are nobody's.
                if not unpacked(mask, self.offer.cfg.vocab_size).any():
                    deltas.append(self._delta(slot, "stop"))
        running = [slot for slot in self._slots if slot.phase == Phase.RUNNING]
        deltas += [self._delta(slot, "length") for slot in running if not slot.choice.given.max_new_tokens]
        running = [slot for slot in running if slot.phase == Phase.RUNNING]
        if running:
            news = self._call(running, allowed, steps, any(slot.choice.given.top_logprobs for slot in running))
            deltas += [self._heard(slot, news) for slot in running]
        return deltas

    def _heard(self, slot: Slot, news: News) -> Delta:
        """What a call to decode has brought a slot."""
        i, choice, count = slot.number, slot.choice, int(news.count[slot.number])
        tokens, drafted, accepted = news.tokens[i, :count].tolist(), int(news.drafted[i]), int(news.accepted[i])
        slot.tokens += tokens
        slot.fed = len(slot.tokens) - 1
        self._counts.update(
            generated=count,
            drafted=drafted - choice.drafted,
            accepted=accepted - choice.accepted,
            drafting_steps=(drafted - choice.drafted) // max(self.offer.depth, 1),
        )
        choice.drafted, choice.accepted = drafted, accepted
        self._accepted_at += np.bincount(news.draft[i, :count], minlength=self.offer.depth + 1)[1:]
        finish, error = None, ""
        if news.done[i]:
            finish = "stop" if tokens[-1] in choice.stops else "length"
        if choice.bound:
            try:
                choice.accept(tokens)
            except GrammarFailed as failed:
                finish, error = "error", str(failed)
        return self._delta(slot, finish, error, news, count)

    def _delta(
        self, slot: Slot, finish: Finish | None, error: str = "", news: News | None = None, count: int = 0
    ) -> Delta:
        i, choice, said = slot.number, slot.choice, {}
        if news is not None:
            new = {name: getattr(news, name)[i, :count] for name in ("tokens", "logprob", "behaviour")}
            said = choice.heard(**new, top={name: a[i, :count] for name, a in news.top.items()})
        if choice.scored:
            said |= choice.told(*jax.device_get(device.scores_of(self._device, np.int32(i))))
        if choice.given.routing:
            said["routing"] = np.asarray(device.routing_of(self._device, np.int32(i)))[choice.reported : slot.fed]
            choice.reported = slot.fed
        if finish is not None:
            self._finished[finish] += 1
            self._release(slot)
        return choice.delta(finish, error, said)

    def _prefill(self, slot: Slot, scored: bool) -> None:
        where = (np.int32(slot.number), np.int32(slot.fed), np.bool_(scored), self._eyes.of_chunk(slot))
        self._device = device.prefill(self._model, self._device, *where, chunk=self._chunk, **self._static)

    def _call(self, running: list[Slot], allowed: np.ndarray, steps: int, top: bool) -> News:
        runs = np.isin(np.arange(len(self._slots)), [slot.number for slot in running])
        self._device, news = device.decode(
            self._model, self._device, runs, allowed, np.int32(steps), room=self._steps, top=top, **self._static
        )
        return jax.device_get(news)
