"""A server on a free port, in a thread, with an engine that says what it is told; and clients for it."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import openai

from deepseek_jax.generation.request import Delta, QueueFull, Stats
from deepseek_jax.serving.api import Api
from deepseek_jax.serving.jobs import Jobs
from deepseek_jax.serving.schema import Limits
from deepseek_jax.serving.server import listening, serve

VOCAB, CONTEXT = 2048, 512


class Told:
    """An engine for tests, with the worker's interface. ``says``: the ids of a choice, of a request and its number;
    they come ``step`` at a time. ``never``: an id that the model gives no probability at all."""

    def __init__(self, says, step=3, never=None):
        self.says, self.step, self.never = says, step, never
        self.state, self.error, self.drained = "ready", None, False
        self.asked, self.cancelled, self.full, self.seconds = [], 0, False, 0.0
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def check(self, request):
        if request.n > 8:
            raise ValueError(f"n={request.n}: there are 8 slots.")

    async def stream(self, request):
        if self.full:
            raise QueueFull("2 requests are waiting, as many as may; try again later.")
        self.asked.append(request)
        texts = [self.says(request, choice) for choice in range(request.n)]
        grammars = [request.grammar() if request.grammar else None for _ in texts]
        longest, going = max(map(len, texts)), request.n
        try:
            for begin in range(0, longest, self.step):
                for choice, (ids, grammar) in enumerate(zip(texts, grammars, strict=True)):
                    if begin < len(ids):
                        delta = self._delta(request, choice, ids, begin, grammar)
                        going -= delta.finish is not None
                        yield delta
                await asyncio.sleep(0)
                while begin + self.step < longest and not self.goes_on.is_set():
                    await asyncio.sleep(0.01)
        finally:
            self.cancelled += going > 0

    def _delta(self, request, choice, ids, begin, grammar):
        end = min(begin + self.step, len(ids), request.max_new_tokens)
        new = ids[begin:end]
        if grammar is not None:
            for i in new:
                mask = grammar.mask()
                assert mask is None or mask[i // 32] >> (i % 32) & 1, f"the grammar lets no {i} follow"
                grammar.accept([i])
        stops = end == len(ids) and ids[-1] in request.stop_ids
        finish = "stop" if stops else "length" if end in (len(ids), request.max_new_tokens) else None
        routing = None
        if request.routing:  # of what was fed: the prompt, and all tokens up to the one before the last
            known = len(request.prompt)
            fed = range(known + begin - 1 if begin else 0, known + end - 1)
            routing = np.asarray([[[i, i + 1]] for i in fed], np.int32).reshape(-1, 1, 2)
        top = tuple(tuple((k, -float(k)) for k in range(request.top_logprobs)) for _ in new)
        logprobs = tuple(-0.5 if i != self.never else float("-inf") for i in new)
        counts = {"drafted": 4, "accepted": 3, "cached": 2}
        if request.prompt_logprobs and not begin:  # the token at position p has -p
            behind = range(1, len(request.prompt))
            told = tuple(tuple((k, -float(k)) for k in range(request.top_logprobs)) for _ in behind)
            counts |= {"prompt_logprobs": tuple(-float(p) for p in behind), "prompt_top": told}
        return Delta(1, choice, tuple(new), logprobs, top=top, finish=finish, routing=routing, **counts)

    def stats(self):
        return Stats(4, 1, 0, 10, 100, 5, 5, 2, 7, 4, 3, 2, {"stop": 1}, (2, 1))

    def stepping(self):
        return self.seconds

    async def drain(self):
        self.state, self.drained = "draining", True

    def close(self):
        self.state = "dead"


@contextmanager
def serving(
    engine,
    tokenizer,
    *,
    name="tiny",
    eos_ids=(1,),
    context=CONTEXT,
    drafts=False,
    routing=False,
    shows=None,
    **settings,
):
    """The address of a server. Ends when the block does, and waits for it."""
    limits = Limits(VOCAB, context, pictures=shows is not None)
    jobs = Jobs(name, tokenizer, limits, eos_ids, drafts, routing, shows)
    sock, stop = listening("127.0.0.1", 0), threading.Event()
    app = Api(engine, jobs, **settings).app()
    thread = threading.Thread(target=lambda: asyncio.run(serve(app, sock, engine, stop.is_set)))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def client(url, key="none", **settings):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **settings) as client:
        yield client
