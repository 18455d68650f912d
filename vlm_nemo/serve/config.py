"""How a model is served. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ServeConfig:
    """The HTTP server (`vlm_nemo.serve.app`)."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs an API key, or serve.insecure=true."""
    port: int = 8000
    """Port to listen on; 0 = one that is free."""
    name: str | None = None
    """The model's name in requests and answers; null = the name of what is served."""
    api_key_file: str | None = None
    """File whose first line every request has to bring as `Authorization: Bearer …`. The variable VLM_NEMO_API_KEY
    does the same. Only the empty page at / comes without."""
    insecure: bool = False
    """Listen on another address than this machine's own without an API key."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names that a request's Host header may hold besides localhost, 127.0.0.1, [::1] and serve.host."""
    max_waiting: int = 64
    """Requests that wait for their turn; the next one is answered with 429."""
    max_body_bytes: int = 1 << 26
    """Longest request body."""
    body_timeout_s: float = 60.0
    """How long a request's body may take to arrive."""
    max_images: int = 8
    """Images a request; 0 = text only."""
    max_image_bytes: int = 20 << 20
    """Longest image file."""
    max_pixels: int = 1 << 26
    """Largest image, width x height; looked up in its header before anything is decoded."""
    max_choices: int = 16
    """Largest n: answers to one request."""
    max_logprobs: int = 20
    """Largest top_logprobs."""
    decode_threads: int = 2
    """Threads that decode images and tokenise prompts."""
    drain_s: float = 10.0
    """When asked to stop: how long answers that have begun may take to end."""
    access_log: bool = True
    """A line a request to stderr: address, path, status, seconds; never a body or a key, and no health probes."""
