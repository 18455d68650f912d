"""From a loop and a configuration to a listening process: key, address, signals, exit.

SIGTERM, SIGINT -> no new connections, 503 for new requests, serve.drain_s for answers that have begun, exit
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from vlm_nemo.serve.app import make_app
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.gate import Gate
from vlm_nemo.serve.loop import EngineLoop
from vlm_nemo.serve.turns import Share, alone
from vlm_nemo.types import UserError

if TYPE_CHECKING:
    from vlm_nemo.infer.load import LoadedModel

KEY_VARIABLE = "VLM_NEMO_API_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
MAX_HEADER_BYTES = 1 << 16


def serve(
    open_model: Callable[[], LoadedModel],
    cfg: ServeConfig,
    *,
    sharer: Callable[[LoadedModel], Share] = lambda model: alone,
    several: bool = False,
) -> None:
    """Listen until a signal says stop. Raises UserError where the address, the key or the model is not good.

    open_model: runs in the engine's thread, while health/ready says 503. sharer: how the model's ranks share commands.
    several: other ranks follow; then an engine that dies ends the process, so that the launcher ends them.
    """
    server = Server(open_model, cfg, sharer=sharer, several=several)
    with logs():
        server.listen()
    if server.loop.failure is not None:
        raise server.loop.failure
    if server.loop.model is not None:
        server.loop.model.close()


class Server(uvicorn.Server):
    """uvicorn, whose signals drain the engine and which then ends by itself instead of by the signal."""

    def __init__(
        self,
        open_model: Callable[[], LoadedModel],
        cfg: ServeConfig,
        *,
        sharer: Callable[[LoadedModel], Share] = lambda model: alone,
        several: bool = False,
    ) -> None:
        """Takes the address; `listen` answers. Raises UserError as `serve` does."""
        key = read_key(cfg)
        self._listener = bind(cfg, key)
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"
        self._cfg = cfg
        self._several = several
        self.loop = EngineLoop(
            open_model, max_waiting=cfg.max_waiting, sharer=sharer, on_ready=self._ready, on_end=self._ended
        )
        super().__init__(
            uvicorn.Config(
                Gate(make_app(self.loop, cfg), hosts=hosts(cfg), key=key, log=cfg.access_log),
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                # Running answers are cut off by the engine's loop; this is for connections that hang
                timeout_graceful_shutdown=max(1, int(cfg.drain_s) + 2),
            )
        )

    def listen(self) -> None:
        """Answer requests until a signal comes."""
        self.run(sockets=[self._listener])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but that the signal is not raised again afterwards: the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running answers end, a second does not wait."""
        again = self.should_exit
        self.should_exit = True
        self.force_exit = again and sig == signal.SIGINT
        # Not here: the interrupted thread may hold the loop's lock
        seconds = 0 if again else self._cfg.drain_s
        threading.Thread(target=self.loop.drain, args=(seconds,), daemon=True).start()

    def _ready(self) -> None:
        assert self.loop.model is not None
        print(f"serving {self._cfg.name or self.loop.model.name} at {self.url} (ctrl-c ends it)", flush=True)

    def _ended(self) -> None:
        if self._several or self.loop.model is None:
            self.should_exit = True


def read_key(cfg: ServeConfig) -> str | None:
    """The API key, or None. Raises UserError for an empty one, or one that a header cannot carry."""
    key, origin = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if key is None and cfg.api_key_file is not None:
        origin = f"serve.api_key_file={cfg.api_key_file}"
        try:
            lines = Path(cfg.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{origin} cannot be read: {type(error).__name__}") from None
        key = lines[0].strip() if lines else ""
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{origin} holds no key: a word of printable ASCII characters")
    return key


def bind(cfg: ServeConfig, key: str | None) -> socket.socket:
    """The listening socket. Raises UserError where the address is open to others without a key, or not to be had."""
    if not is_local(cfg.host) and key is None and not cfg.insecure:
        raise UserError(
            f"serve.host={cfg.host} can be reached from other machines: set {KEY_VARIABLE} or serve.api_key_file, or "
            "serve.insecure=true if everybody may ask"
        )
    if not 0 <= cfg.port < 1 << 16:
        raise UserError(f"serve.port={cfg.port} is no port; take one of 0 to 65535")
    try:
        ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
            cfg.host, cfg.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise UserError(
            f"cannot listen on serve.host={cfg.host} serve.port={cfg.port}: {error.strerror}; choose another"
        ) from None
    return listener


def is_local(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts(cfg: ServeConfig) -> frozenset[str] | None:
    """Names that the Host header may hold; None = any, where other machines may ask and none is listed."""
    if not is_local(cfg.host) and not cfg.allowed_hosts:
        return None
    own = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    return frozenset((*LOCAL_NAMES, own, *cfg.allowed_hosts))


@contextlib.contextmanager
def logs() -> Iterator[None]:
    """A line a request to stderr, with the time."""
    log = logging.getLogger("vlm_nemo.serve.access")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
