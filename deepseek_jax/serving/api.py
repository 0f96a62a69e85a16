"""The HTTP side: routes, streams, errors. JSON comes in, goes to the engine as a `Job`, and comes out as JSON."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deepseek_jax.generation.request import QueueFull
from deepseek_jax.notes import shown
from deepseek_jax.serving import schema
from deepseek_jax.serving.errors import ApiError, NotServing
from deepseek_jax.serving.fields import boolean, integer, known_fields, listed, text
from deepseek_jax.serving.guard import Guard, json_body
from deepseek_jax.serving.jobs import Engine, Job, Jobs, checked, pieces_of
from deepseek_jax.serving.metrics import CONTENT_TYPE, Clock, Metrics
from deepseek_jax.serving.replies import usage_of
from deepseek_jax.version import __version__

PAGE = Path(__file__).parent / "page.html"
LOG = logging.getLogger("deepseek_jax.serving")
BODY = 16 * 2**20  # bytes of a request, at most
RETRY = 1  # seconds after which a client whom the queue had no room for may come again
HANGS = 120.0  # seconds after which a step of the engine, which takes a part of one, is taken for one that never ends
GONE = 499  # what a client that has left would be answered


@dataclass
class Api:
    """The routes, for one engine. ``key``: what clients must know, None for none; ``origins``: of pages that a browser
    may let ask; ``body``: bytes of a request, at most."""

    engine: Engine
    jobs: Jobs
    key: str | None = None
    origins: tuple[str, ...] = ()
    body: int = BODY

    def __post_init__(self):
        self.metrics = Metrics(self.jobs.name, self.engine.stats)
        self._created = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.prometheus),
            Route("/version", self.version),
            Route("/", self.page),
        ]
        middleware = [Middleware(Guard, key=self.key)]
        if self.origins:
            # Outside the guard: a browser asks without a key whether it may ask.
            cors = {"allow_origins": self.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
            middleware.insert(0, Middleware(CORSMiddleware, **cors))
        known = dict.fromkeys((ApiError, QueueFull, NotServing), _api_error)
        handlers = {HTTPException: _http_error, ClientDisconnect: _gone, Exception: _api_error} | known
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def chat(self, request: Request) -> Response:
        asked = schema.chat_request(await self._asked(request), self.jobs.limits)
        return await self._complete(request, asked.sampling, lambda: self.jobs.chat(asked))

    async def completions(self, request: Request) -> Response:
        asked = schema.completion_request(await self._asked(request), self.jobs.limits)
        return await self._complete(request, asked.sampling, lambda: self.jobs.completion(asked))

    async def _asked(self, request: Request):
        body = await json_body(request, self.body)
        self._serving()
        return body

    def _serving(self) -> None:
        state = self.engine.state
        if state != "ready":
            why = {"starting": "the model is being loaded", "draining": "the server is shutting down"}
            headers = {"retry-after": "5"} if state == "starting" else {}
            raise ApiError(503, f"{why.get(state, 'the engine has failed')}; it answers no requests.", headers=headers)

    async def _complete(self, request: Request, sampling, make: Callable[[], Awaitable[Job]]) -> Response:
        self._known(sampling.model)
        arrived = time.monotonic()
        job = await make()
        checked(self.engine, job)
        clock = Clock(self.metrics, arrived)
        pieces = self._timed(job, clock)
        if not sampling.stream:
            whole = await _unless_gone(request, _whole(job, pieces))
            return Response(status_code=GONE) if whole is None else JSONResponse(whole)
        # Whatever is refused is refused with its status: nothing is sent before the first piece is there.
        first = await _unless_gone(request, anext(pieces))
        if first is None:
            await pieces.aclose()
            return Response(status_code=GONE)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return Events(self._events(job, first, pieces, sampling.include_usage), pieces, headers)

    async def _timed(self, job: Job, clock: Clock) -> AsyncIterator:
        """Pieces of a job, its times taken; and how its choices ended."""
        try:
            seen = lambda prompt, delta: clock.take(prompt, delta, time.monotonic())  # noqa: E731
            async with aclosing(pieces_of(self.engine, job, seen)) as pieces:
                async for found in pieces:
                    yield found
            clock.end(time.monotonic())
        finally:
            for answer in job.answers:
                self.metrics.ended(answer.finish or "abort")

    async def _events(self, job: Job, first, pieces, usage: bool) -> AsyncIterator[bytes]:
        """A stream's events; an error in its middle is one, and the last."""
        begun = set()

        def chunks(number: int, found):
            if number not in begun:
                begun.add(number)
                yield from job.reply.begin(number, job.answers[number])
            yield from job.reply.pieces(number, found)
            yield from job.reply.routed(number, job.answers[number])
            if job.answers[number].finish is not None:
                yield job.reply.end(number, job.answers[number])

        # What came at once is sent at once.
        try:
            yield b"".join(map(_event, chunks(*first)))
            async for number, found in pieces:
                yield b"".join(map(_event, chunks(number, found)))
        except Exception as error:
            yield _event(_as_api_error(error).body())
            return
        if usage:
            yield _event(job.reply.usage(usage_of(job.prompts, job.answers)))
        yield b"data: [DONE]\n\n"

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._known(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict:
        about = {"id": self.jobs.name, "object": "model", "created": self._created, "owned_by": "deepseek-jax"}
        limits = self.jobs.limits
        return about | {"max_model_len": limits.context, "routing": self.jobs.routing, "pictures": limits.pictures}

    def _known(self, name: str | None) -> None:
        if name not in (None, self.jobs.name):
            raise ApiError(
                404, f"there is no model {shown(name)} here, but {self.jobs.name}.", "model", "model_not_found"
            )

    async def tokenize(self, request: Request) -> Response:
        body = await json_body(request, self.body)
        tokenizer = self.jobs.tokenizer
        if isinstance(body, dict) and "messages" in body:
            asked = schema.chat_request(body, self.jobs.limits)
            self._known(asked.sampling.model)
            _, ids = await asyncio.to_thread(self.jobs.render, asked)
        else:
            given = known_fields(body, {"model", "prompt", "add_special_tokens"})
            self._known(given.get("model"))
            bos = None if boolean("add_special_tokens", given.get("add_special_tokens", True)) else False
            ids = await asyncio.to_thread(tokenizer.encode, text("prompt", given.get("prompt")), bos)
        return JSONResponse({"count": len(ids), "max_model_len": self.jobs.limits.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        given = known_fields(await json_body(request, self.body), {"model", "tokens"})
        self._known(given.get("model"))
        most = self.jobs.limits.vocab_size - 1
        ids = listed("tokens", given.get("tokens"), lambda name, value: integer(name, value, 0, most))
        return JSONResponse({"prompt": await asyncio.to_thread(self.jobs.tokenizer.decode, ids)})

    async def health(self, request: Request) -> Response:
        state, error = self.engine.state, self.engine.error
        if self.engine.stepping() > HANGS:
            state = "hanging"
        body = {"status": state} | ({"error": f"{type(error).__name__}: {error}"} if error is not None else {})
        return JSONResponse(body, 200 if state == "ready" else 503)

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def page(self, request: Request) -> Response:
        """A chat in the browser, which runs what stands in it and asks nobody but this server."""
        allowed = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"content-security-policy": f"{allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers=headers)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})


class Events(StreamingResponse):
    """Server-sent events; ``source``, which they are made from, is closed when the client has gone, not some time
    later, and also where none was sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], source: AsyncIterator, headers: dict[str, str]):
        super().__init__(events, headers=headers)
        self._source = source

    async def stream_response(self, send) -> None:
        async with aclosing(self._source), aclosing(self.body_iterator):
            await super().stream_response(send)


async def _whole(job: Job, pieces: AsyncIterator) -> dict:
    said = [[] for _ in job.answers]
    async with aclosing(pieces):
        async for number, found in pieces:
            said[number] += found
    return job.reply.whole(list(zip(job.answers, said, strict=True)), usage_of(job.prompts, job.answers))


async def _unless_gone(request: Request, work: Awaitable):
    """What ``work`` gives; None, and it is cancelled, where the client leaves before."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(RETRY)})
    if isinstance(error, NotServing):
        return ApiError(503, str(error))
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why.")


async def _api_error(request: Request, error: Exception) -> Response:
    found = _as_api_error(error)
    return JSONResponse(found.body(), found.status, found.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Of starlette's own: no such path, or not by this method."""
    message = {404: f"there is nothing at {request.url.path}.", 405: f"{request.method} is not for {request.url.path}."}
    found = ApiError(error.status_code, message.get(error.status_code, error.detail))
    return JSONResponse(found.body(), found.status, error.headers)
