"""What the server says when it will not answer: vLLM's status codes and body, in our words.

    {"error": {"message": "…", "type": "BadRequestError", "param": "max_tokens", "code": 400}}

A message holds what the client sent in short form at most (never an image), and nothing of this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class APIError(Exception):
    """An answer with a 4xx or 5xx status."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: int | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param
        self.code = status if code is None else code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As it goes over the wire."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None) -> APIError:
    """400: the request can never be answered as it is."""
    return APIError(400, "BadRequestError", message, param=param)


def unauthorized() -> APIError:
    """401 in OpenAI's words; says nothing about the key that came or the one that was expected."""
    return APIError(
        401,
        "invalid_request_error",
        "Incorrect API key provided: send the server's key as `Authorization: Bearer …`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def forbidden(message: str) -> APIError:
    """403"""
    return APIError(403, "PermissionDeniedError", message)


def not_found(message: str, param: str | None = None) -> APIError:
    """404"""
    return APIError(404, "NotFoundError", message, param=param)


def timed_out(message: str) -> APIError:
    """408"""
    return APIError(408, "RequestTimeoutError", message, headers={"Connection": "close"})


def too_large(limit: int) -> APIError:
    """413: the body is longer than serve.max_body_bytes."""
    message = f"The request body is longer than the {limit} bytes that this server takes."
    return APIError(413, "RequestTooLargeError", message, headers={"Connection": "close"})


def wrong_media_type() -> APIError:
    """415"""
    return APIError(415, "UnsupportedMediaTypeError", "Unsupported Media Type: Only 'application/json' is allowed")


def busy(waiting: int) -> APIError:
    """429: the waiting queue is full."""
    message = f"{waiting} requests are waiting already; try again later."
    return APIError(429, "RateLimitError", message, headers={"Retry-After": "1"})


def internal() -> APIError:
    """500: a bug of ours; its traceback is in the server's log, not in the answer."""
    return APIError(500, "InternalServerError", "The server failed to answer this request.")


def unavailable(message: str) -> APIError:
    """503: loading, stopping, or the engine has died."""
    return APIError(503, "ServiceUnavailableError", message)
