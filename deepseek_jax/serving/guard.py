"""Who may ask, and how much: what every request passes before a route sees it."""

import hmac
import json

from starlette.requests import Request
from starlette.responses import JSONResponse

from deepseek_jax.notes import cut
from deepseek_jax.serving.errors import ApiError, bad

OPEN = ("/health", "/")  # the page at / asks for the key itself
DEEPEST = 100  # lists and objects in one another; what is made of a body goes down with it
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Asks for ``key`` as a bearer's token, where there is one. Without one the server is for this machine only: a page
    from elsewhere that a browser shows is kept out by the name that it knows the server by."""

    def __init__(self, app, key: str | None):
        self._app, self._key = app, key

    async def __call__(self, scope, receive, send) -> None:
        error = self._refused(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)

    def _refused(self, scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            known = name in LOCAL or scope["path"] == "/health"
            return None if known else ApiError(403, "without a key, this server answers on this machine only.")
        if scope["path"] in OPEN:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode()):
            return None
        message = "give this server's key: Authorization: Bearer KEY."
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


async def json_body(request: Request, most: int):
    """A request's JSON. Raises `ApiError`: more than ``most`` bytes, of another type, or no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Which also keeps pages of other origins out: a browser asks before it sends this type.
        raise ApiError(415, "the body must be JSON, with content-type: application/json.")
    body = bytearray()
    too_large = ApiError(
        413, f"the body has more than {most} bytes.", code="body_too_large", headers={"connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    try:
        found = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise bad("body", f"is not JSON: {cut(error)}.") from None
    level, depth = [found], 0
    while level := [entry for value in level for entry in _inside(value)]:
        depth += 1
        if depth > DEEPEST:
            raise bad("body", f"has more than {DEEPEST} lists and objects in one another.")
    return found


def _inside(value):
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
