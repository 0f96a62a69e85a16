"""The thread that owns JAX and the batcher, and how requests reach it from an event loop.

What is asked goes into an inbox, which the thread empties between two calls to the device; what comes of it goes back
by the loop of whoever asked. Nobody waits for the device but this thread.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Literal

from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.request import Delta, QueueFull, Request, Stats
from deepseek_jax.serving.errors import NotServing

State = Literal["starting", "ready", "draining", "dead"]
REFUSALS = {
    "starting": "the model is being loaded; try again later.",
    "draining": "the server is being stopped, and takes no more requests.",
    "dead": "the server is stopped.",
}


@dataclass(eq=False)
class Caller:
    """Who asked, and where what comes of it is heard: a `Delta`, or why there are no more. ``going``: choices that have
    not ended. ``left``: set by who asked, before it is put into the inbox again."""

    request: Request
    loop: asyncio.AbstractEventLoop
    heard: asyncio.Queue = field(default_factory=asyncio.Queue)
    number: int | None = None
    going: int = 0
    left: bool = False

    def hear(self, found: Delta | Exception) -> bool:
        """False where nobody can: its loop is closed."""
        return _called(self.loop, self.heard.put_nowait, found)


@dataclass(eq=False)
class Waiter:
    """Who waits until something has come about."""

    loop: asyncio.AbstractEventLoop
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        _called(self.loop, self.happened.set)


class Worker:
    """Runs the batcher that ``make`` gives, in a thread of its own, until `close` or until it fails.

    ``state``: "starting" while ``make`` runs, "ready", "draining" when no more requests are taken, "dead". ``error``:
    what ``make`` or a step raised, None otherwise. Its methods may be called from any thread and any event loop.
    """

    def __init__(self, make: Callable[[], Batcher]):
        self.state: State = "starting"
        self.error: BaseException | None = None
        self._lock = threading.Lock()  # of the state, and of what is asked because of it
        self._inbox: SimpleQueue[Caller | Waiter | None] = SimpleQueue()
        self._starting: list[Waiter] = []
        self._draining: list[Waiter] = []
        self._callers: dict[int, Caller] = {}
        self._batcher: Batcher | None = None
        self._stats: Stats | None = None
        self._began: float | None = None
        # A process that ends does not wait for a model to load.
        self._thread = threading.Thread(target=self._run, args=(make,), name="engine", daemon=True)
        self._thread.start()

    def stats(self) -> Stats | None:
        """As of the last step; None while it starts."""
        return self._stats

    def stepping(self) -> float:
        """Seconds for which the step that is under way has run, 0 without one: a device that hangs shows here."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def check(self, request: Request) -> None:
        """`Batcher.check`. Raises ValueError, and NotServing where there is no batcher."""
        batcher = self._batcher
        if batcher is None:
            raise self._refusal()
        batcher.check(request)

    async def started(self) -> None:
        """Returns when requests are taken. Raises NotServing where they will not be."""
        waiter = Waiter(asyncio.get_running_loop())
        with self._lock:
            waits = self.state == "starting"
            if waits:
                self._starting.append(waiter)
        if waits:
            await waiter.happened.wait()
        if self.state != "ready":
            raise self._refusal()

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        """What comes of a request, until each of its choices has ended. Closing it cancels the request.

        Raises ValueError, QueueFull, and NotServing, also in the middle, when the engine dies.
        """
        caller, going = Caller(request, asyncio.get_running_loop()), True
        with self._lock:
            if self.state != "ready":
                raise self._refusal()
            self._inbox.put(caller)
        try:
            ended = 0
            while going:
                found = await caller.heard.get()
                if isinstance(found, Exception):
                    going = False
                    raise found
                ended += found.finish is not None
                going = ended < request.n
                yield found
        finally:
            if going:
                caller.left = True
                self._inbox.put(caller)

    async def drain(self) -> None:
        """Takes no more requests, and returns when those under way have ended, or the engine has."""
        waiter = Waiter(asyncio.get_running_loop())
        with self._lock:
            if self.state == "dead":
                return
            self.state = "draining"
            self._inbox.put(waiter)
        await waiter.happened.wait()

    def close(self) -> None:
        """Ends the thread after the step that is under way; who still waits for a text gets NotServing."""
        self._inbox.put(None)
        if self._batcher is not None:
            self._thread.join()

    def _refusal(self) -> NotServing:
        refusal = NotServing(f"the engine has died: {self.error}" if self.error else REFUSALS[self.state])
        refusal.__cause__ = self.error
        return refusal

    def _run(self, make: Callable[[], Batcher]) -> None:
        try:
            batcher = make()
            self._stats = batcher.stats()
            with self._lock:
                self._batcher = batcher
                self.state = "ready" if self.state == "starting" else self.state
            for waiter in self._starting:
                waiter.wake()
            while self._listen(batcher):
                self._began = time.monotonic()
                deltas = batcher.step()
                self._began, self._stats = None, batcher.stats()
                for delta in deltas:
                    self._pass_on(delta, batcher)
        except BaseException as error:  # whatever it is, who waits is told
            self.error = error
        self._end()

    def _listen(self, batcher: Batcher) -> bool:
        """Takes what is in the inbox, and waits for it while there is nothing else to do. False at the end."""
        while True:
            idle = not self._callers
            if idle:
                self._stats = batcher.stats()
                while self._draining:
                    self._draining.pop().wake()
            try:
                found = self._inbox.get(block=idle)
            except Empty:
                return True
            if found is None:
                return False
            if isinstance(found, Waiter):
                self._draining.append(found)
            elif found.left:
                self._forget(found, batcher)
            else:
                self._submit(found, batcher)

    def _submit(self, caller: Caller, batcher: Batcher) -> None:
        try:
            caller.number, caller.going = batcher.submit(caller.request), caller.request.n
        except (ValueError, QueueFull) as error:
            caller.hear(error)
        else:
            self._callers[caller.number] = caller

    def _forget(self, caller: Caller, batcher: Batcher) -> None:
        """Where it had not ended."""
        if self._callers.pop(caller.number, None) is not None:
            batcher.cancel(caller.number)

    def _pass_on(self, delta: Delta, batcher: Batcher) -> None:
        caller = self._callers.get(delta.request)
        if caller is None:  # its loop was closed a moment ago
            return
        caller.going -= delta.finish is not None
        if not caller.hear(delta):
            self._forget(caller, batcher)
        elif not caller.going:
            del self._callers[caller.number]

    def _end(self) -> None:
        with self._lock:
            self.state, self._batcher, self._began = "dead", None, None
            waiting = []
            while not self._inbox.empty():
                waiting.append(self._inbox.get())
        for found in (*self._callers.values(), *waiting, *self._starting, *self._draining):
            if isinstance(found, Caller):
                found.hear(self._refusal())
            elif isinstance(found, Waiter):
                found.wake()


def _called(loop: asyncio.AbstractEventLoop, *call) -> bool:
    """Lets a loop call something. False where it is closed."""
    try:
        loop.call_soon_threadsafe(*call)
    except RuntimeError:
        return False
    return True
