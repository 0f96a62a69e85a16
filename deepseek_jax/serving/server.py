"""The socket and the life of the server: from listening to the end of the last answer."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Protocol

import uvicorn

LOOK = 0.1  # seconds between two looks at whether it is to end


class Life(Protocol):
    """What is seen of `worker.Worker` here."""

    state: str
    error: BaseException | None

    async def drain(self) -> None: ...
    def close(self) -> None: ...


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is a free one. Raises OSError, with a sentence."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(2048)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}.") from error
    return found


class _Uvicorn(uvicorn.Server):
    """The process's signals are not its business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app, sock: socket.socket, life: Life, ends: Callable[[], bool]) -> None:
    """Answers on ``sock`` until ``ends()`` says so; then takes no new requests, and returns when those under way are
    answered. An engine that dies before it is ready ends it as well, with its error; one that dies later does not, and
    `/health` says so."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Uvicorn(config)
    serving = asyncio.create_task(server.serve([sock]))
    was_ready = False
    try:
        while not serving.done() and not ends() and (was_ready or life.state != "dead"):
            was_ready = was_ready or life.state == "ready"
            await asyncio.sleep(LOOK)
        failed = not was_ready and life.state == "dead"
        if life.state == "ready":
            await life.drain()
    finally:
        server.should_exit = True
        await serving
        life.close()
    if failed and life.error is not None:
        raise life.error
