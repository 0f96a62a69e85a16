"""The same requests over HTTP: a server in a thread, and a client in a thread for each."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from deepseek_jax.generation.batcher import Batcher
from deepseek_jax.generation.request import Request
from deepseek_jax.serving.api import Api
from deepseek_jax.serving.jobs import Jobs
from deepseek_jax.serving.schema import Limits
from deepseek_jax.serving.server import listening, serve
from deepseek_jax.serving.worker import Worker


@contextmanager
def served(make: Callable[[], Batcher], cfg, tokenizer, length: int) -> Iterator[int]:
    """The port of a server whose engine ``make`` makes."""
    worker, stop, sock = Worker(make), threading.Event(), listening("127.0.0.1", 0)
    asyncio.run(worker.started())
    jobs = Jobs("tiny-v3", tokenizer, Limits(cfg.vocab_size, length), cfg.eos_ids)
    app = Api(worker, jobs).app()
    thread = threading.Thread(target=lambda: asyncio.run(serve(app, sock, worker, stop.is_set)))
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        stop.set()
        thread.join()


def over_http(port: int, requests: list[Request], eos_ids) -> Callable[[], tuple]:
    """As `run.slots`: each client sends its request at once, and reads its stream to the end. A first token counts when
    its event has come."""

    def client(request: Request) -> tuple[int, float]:
        body = {"prompt": list(request.prompt), "max_tokens": request.max_new_tokens, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "logit_bias": {str(i): -100 for i in eos_ids}}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer, first, last = connection.getresponse(), 0.0, ""
        if answer.status != 200:
            raise RuntimeError(answer.read().decode())
        for line in answer:
            if line.startswith(b"data: {"):
                first, last = first or time.perf_counter(), line.removeprefix(b"data: ")
        connection.close()
        return json.loads(last)["usage"]["completion_tokens"], first

    def run():
        with ThreadPoolExecutor(len(requests)) as pool:
            begin = time.perf_counter()
            counts, first = zip(*pool.map(client, requests), strict=True)
            seconds = time.perf_counter() - begin
        return [range(count) for count in counts], [at - begin for at in first], seconds

    return run
