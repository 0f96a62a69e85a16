"""The engine's thread: who asks is answered, who leaves is forgotten, and who waits for a dead engine is told."""

import asyncio
import threading
import time
from contextlib import aclosing, contextmanager

import pytest

from deepseek_jax.generation.request import Delta, QueueFull, Request, Stats
from deepseek_jax.serving.errors import NotServing
from deepseek_jax.serving.worker import Worker


class Counter:
    """A batcher whose choices count: a token a step, up to their number, two requests at a time."""

    slots = 2

    def __init__(self):
        self.waiting, self.under_way, self.ids, self.cancelled, self.steps = [], {}, 0, [], 0
        self.goes_on, self.fails = threading.Event(), None
        self.goes_on.set()
        self.threads = set()

    def check(self, request):
        if request.max_new_tokens > 100:
            raise ValueError("more than 100 tokens.")

    def submit(self, request):
        self.check(request)
        if len(self.waiting) >= 3 + self.slots - len(self.under_way):
            raise QueueFull("as many wait as may; try again later.")
        self.ids += 1
        self.waiting.append((self.ids, request))
        return self.ids

    def cancel(self, number):
        self.cancelled.append((number, self.steps))
        self.waiting = [(i, request) for i, request in self.waiting if i != number]
        self.under_way.pop(number, None)

    def step(self):
        assert self.goes_on.wait(20)
        if self.fails:
            raise self.fails
        time.sleep(0.001)
        self.threads.add(threading.get_ident())
        self.steps += 1
        while self.waiting and len(self.under_way) < self.slots:
            number, request = self.waiting.pop(0)
            self.under_way[number] = [request, 0]
        deltas = []
        for number, (request, said) in list(self.under_way.items()):
            ends = said + 1 == request.max_new_tokens
            for choice in range(request.n):
                deltas.append(Delta(number, choice, (said,), (-1.0,), finish="length" if ends else None))
            self.under_way[number][1] += 1
            if ends:
                del self.under_way[number]
        return deltas

    def stats(self):
        return Stats(self.slots, len(self.under_way), len(self.waiting), 0, 1, 0, 0, 0, self.steps, 0, 0, 0, {})


@contextmanager
def counting():
    batcher = Counter()
    worker = Worker(lambda: batcher)
    try:
        yield worker, batcher
    finally:
        batcher.goes_on.set()
        worker.close()
        worker._thread.join(20)
        assert not worker._thread.is_alive()


async def said(worker, count, n=1):
    return [(d.choice, *d.tokens) async for d in worker.stream(Request([0], count, n=n))]


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came about")


def test_many_are_answered_each_its_own_by_one_thread():
    async def ask(worker):
        await worker.started()
        return await asyncio.gather(said(worker, 5), said(worker, 3, n=2), said(worker, 1), said(worker, 7))

    with counting() as (worker, batcher):
        found = asyncio.run(ask(worker))
        assert found[0] == [(0, i) for i in range(5)]
        assert found[1] == [(choice, i) for i in range(3) for choice in range(2)]
        assert found[2:] == [[(0, 0)], [(0, i) for i in range(7)]]
        # Another loop, as another client's thread has.
        assert asyncio.run(said(worker, 2)) == [(0, 0), (0, 1)]
        assert batcher.threads == {worker._thread.ident}
        assert batcher.cancelled == []
        steps = batcher.steps
        time.sleep(0.05)
        assert batcher.steps == steps, "it steps for nobody"
        assert (worker.state, worker.stepping(), worker.stats().running) == ("ready", 0.0, 0)


def test_who_leaves_is_forgotten_within_a_step():
    """Under way, and queued; by closing the generator, and by a task that is cancelled."""

    async def leave(worker, batcher):
        await worker.started()
        async with aclosing(worker.stream(Request([0], 90))) as stream:
            async for _ in stream:
                break
            others = [asyncio.create_task(said(worker, 90)) for _ in range(3)]
            await until(lambda: worker.stats().waiting == 2)
            batcher.goes_on.clear()
            await until(lambda: worker.stepping() > 0.01)
            others[2].cancel()
            left = batcher.steps
        batcher.goes_on.set()
        await until(lambda: len(batcher.cancelled) == 2)
        assert {number for number, _ in batcher.cancelled} == {1, 4}
        assert all(step <= left + 1 for _, step in batcher.cancelled)
        assert [len(found) for found in await asyncio.gather(*others[:2])] == [90, 90]

    with counting() as (worker, batcher):
        asyncio.run(leave(worker, batcher))
        assert worker.stats().running == worker.stats().waiting == 0


def test_a_loop_that_is_gone_holds_no_slot():
    with counting() as (worker, batcher):
        loop = asyncio.new_event_loop()
        stream = worker.stream(Request([0], 90))
        loop.run_until_complete(anext(stream))
        loop.close()
        deadline = time.monotonic() + 10
        while not batcher.cancelled and time.monotonic() < deadline:
            time.sleep(0.005)
        assert [number for number, _ in batcher.cancelled] == [1]
        assert worker.state == "ready"
        with pytest.raises(StopIteration):
            stream.aclose().send(None)


def test_what_the_batcher_refuses_is_raised_where_it_was_asked():
    async def ask(worker, batcher):
        await worker.started()
        with pytest.raises(ValueError, match="more than 100"):
            worker.check(Request([0], 101))
        with pytest.raises(ValueError, match="more than 100"):
            await said(worker, 101)
        batcher.goes_on.clear()
        first = asyncio.create_task(said(worker, 2))
        await until(lambda: worker.stepping() > 0)
        rest = [asyncio.create_task(said(worker, 2)) for _ in range(5)]
        await asyncio.sleep(0)
        batcher.goes_on.set()
        found = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [isinstance(one, QueueFull) for one in found] == [False] * 5 + [True]

    with counting() as (worker, batcher):
        asyncio.run(ask(worker, batcher))
        assert batcher.cancelled == []


def test_a_dead_engine_answers_with_its_error():
    async def ask(worker, batcher):
        await worker.started()
        tasks = [asyncio.create_task(said(worker, 90)) for _ in range(4)]
        await until(lambda: worker.stats().running == 2)
        batcher.fails = ValueError("the weights hold NaN.")
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, NotServing)
            assert str(found) == "the engine has died: the weights hold NaN."
            assert found.__cause__ is batcher.fails
        assert (worker.state, worker.error) == ("dead", batcher.fails)
        for refused in (said(worker, 1), worker.started()):
            with pytest.raises(NotServing, match="weights hold NaN"):
                await refused
        with pytest.raises(NotServing, match="weights hold NaN"):
            worker.check(Request([0], 1))
        await worker.drain()

    with counting() as (worker, batcher):
        asyncio.run(ask(worker, batcher))


def test_it_drains():
    async def ask(worker, batcher):
        await worker.started()
        tasks = [asyncio.create_task(said(worker, 30)) for _ in range(4)]
        await until(lambda: worker.stats().running == 2)
        draining = asyncio.create_task(worker.drain())
        await until(lambda: worker.state == "draining")
        with pytest.raises(NotServing, match="being stopped"):
            await said(worker, 1)
        await draining
        assert [len(found) for found in await asyncio.gather(*tasks)] == [30] * 4
        worker.close()
        with pytest.raises(NotServing, match="is stopped"):
            await said(worker, 1)

    with counting() as (worker, batcher):
        asyncio.run(ask(worker, batcher))
        assert (worker.state, worker.error) == ("dead", None)


def test_closing_ends_what_is_under_way():
    async def ask(worker):
        await worker.started()
        task = asyncio.create_task(said(worker, 90))
        await until(lambda: worker.stats().running == 1)
        worker.close()
        with pytest.raises(NotServing, match="is stopped"):
            await task

    with counting() as (worker, _):
        asyncio.run(ask(worker))


def test_a_model_that_does_not_load_is_everybodys_error():
    loads = threading.Event()

    def make():
        assert loads.wait(20)
        raise FileNotFoundError("no such folder")

    async def ask(worker):
        with pytest.raises(NotServing, match="being loaded"):
            await said(worker, 1)
        with pytest.raises(NotServing, match="being loaded"):
            worker.check(Request([0]))
        assert worker.stats() is None
        started = asyncio.create_task(worker.started())
        await asyncio.sleep(0)
        loads.set()
        with pytest.raises(NotServing, match="has died: no such folder"):
            await started

    worker = Worker(make)
    asyncio.run(ask(worker))
    worker.close()
    assert isinstance(worker.error, FileNotFoundError)
