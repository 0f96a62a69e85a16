"""Errors in the shape that OpenAI's clients read: ``{"error": {message, type, param, code}}``."""

from dataclasses import dataclass, field

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class ApiError(Exception):
    """``status``: of HTTP. Below 500 the request is at fault, and clients do not try again, but for 429."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(param: str, message: str, code: str | None = None) -> ApiError:
    """A request that cannot be done: 400. The message is a sentence that begins with the field's name."""
    return ApiError(400, f"{param}: {message}", param, code)


class NotServing(RuntimeError):
    """The engine takes no requests: it starts, drains or has died, of the error that is the cause."""
