"""What every request passes before it reaches a route: host name, API key, errors in one form, a line in the log.

Plain ASGI, around the whole application, so that no route can be forgotten.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Collection
from typing import Any

from vlm_nemo.serve.errors import APIError, forbidden, internal, unauthorized

logger = logging.getLogger(__name__)
access = logging.getLogger("vlm_nemo.serve.access")

OPEN_PATHS = frozenset({"/"})
"""Without a key: the page, which holds nothing and asks for it."""

PROBES = frozenset({"/v1/health/live", "/v1/health/ready", "/v1/metrics", "/metrics"})
"""Not in the log: something asks for them every few seconds."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """ASGI middleware.

    hosts: what the Host header may name, without port; None = anything. A page of another site that points its own
        name at this machine (DNS rebinding) sends that name.
    key: every request brings it as `Authorization: Bearer KEY`, but those of OPEN_PATHS; None = no key is asked for.
    """

    def __init__(self, app: Any, *, hosts: Collection[str] | None, key: str | None, log: bool) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._key = None if key is None else key.encode()
        self._log = log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, whole = time.monotonic(), 0, False

        async def watched(message: Any) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, watched)
        except APIError as error:
            await answer(watched, error)
        except Exception:
            logger.exception("a request failed")
            if not status:
                await answer(watched, internal())
            elif not whole:
                raise  # too late for another status: the connection breaks
        finally:
            if self._log and scope["path"] not in PROBES:
                client = (scope.get("client") or ("-",))[0]
                # The path as it came, percent signs and all: it cannot forge a line. Neither query nor headers.
                path = scope.get("raw_path", b"").decode("latin-1")
                access.info("%s %s %s %s %.3fs", client, scope["method"], path, status or "-", time.monotonic() - began)

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None and _name(headers.get(b"host", b"")) not in self._hosts:
            raise forbidden("This host name is not served; add it with serve.allowed_hosts=[NAME].")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(given.strip(), self._key)
            if scheme.lower() != b"bearer" or not same:
                raise unauthorized()


def _name(host: bytes) -> str:
    """b"localhost:8000" -> "localhost", b"[::1]:8000" -> "[::1]"."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return text.partition(":")[0]


async def answer(send: Any, error: APIError) -> None:
    """Send an error as JSON."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
