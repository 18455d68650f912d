"""What the server counts, for Prometheus.

/metrics has vLLM's names (`vllm:num_requests_running`), so that dashboards made for vLLM show this server;
/v1/metrics has the same figures under NIM's names (`num_requests_running`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from vlm_nemo.infer.engine import Event

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
COUNTS = (1, 2, 5, 10, 20)

NIM = {
    "vllm:kv_cache_usage_perc": "gpu_cache_usage_perc",
    "vllm:request_time_per_output_token_seconds": "time_per_output_token_seconds",
}
"""Where NIM's name is not vLLM's without its prefix."""

_NAME = re.compile(r"^((?:# (?:HELP|TYPE) )?)(vllm:\w+?)(_bucket|_sum|_count|_created)?(?=[ {])", flags=re.MULTILINE)


class Metrics:
    """The counters of one server; each request reports through a `RequestTimer`."""

    def __init__(
        self, model: str, *, running: Callable[[], float], waiting: Callable[[], float], cache: Callable[[], float]
    ) -> None:
        """running, waiting, cache: read whenever somebody asks for the metrics."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._model = model
        for name, text, value in (
            ("num_requests_running", "Answers being generated.", running),
            ("num_requests_waiting", "Requests waiting for their turn.", waiting),
            ("kv_cache_usage_perc", "KV cache in use; 1 means 100 percent.", cache),
        ):
            gauge = Gauge(f"vllm:{name}", text, ["model_name"], registry=self.registry)
            gauge.labels(model).set_function(value)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, image tokens among them.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success",
            "Answers that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.ttft = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", TTFT)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time of an answer's tokens after the first.", TOKEN
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", REQUEST)
        self.queue = self._histogram("request_queue_time_seconds", "From arrival to the step that began it.", REQUEST)
        self.prefill = self._histogram("request_prefill_time_seconds", "From that step to the first token.", REQUEST)
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", REQUEST)
        self.inference = self._histogram("request_inference_time_seconds", "From that step to the last.", REQUEST)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens that a request got.", TOKENS)
        self.params_n = self._histogram("request_params_n", "n of a request.", COUNTS)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", TOKENS)

    def ended(self, reason: str) -> None:
        """An answer ended: stop, length, abort (the client went or the server stopped) or error."""
        self._success.labels(self._model, reason).inc()

    def text(self, *, nim: bool) -> str:
        """The exposition format, with NIM's names or vLLM's."""
        text = generate_latest(self.registry).decode()
        return _NAME.sub(_to_nim, text) if nim else text

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], buckets=tuple(buckets), registry=self.registry).labels(
            self._model
        )


def _to_nim(found: re.Match[str]) -> str:
    lead, name, suffix = found.groups()
    return lead + NIM.get(name, name.removeprefix("vllm:")) + (suffix or "")


class RequestTimer:
    """One request's times, from arrival to its end."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._began: float | None = None
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self.tokens = 0

    def accepted(self, *, prompt_tokens: int, n: int, max_tokens: int) -> None:
        """The engine has it."""
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.request_prompt.observe(prompt_tokens)
        self._metrics.params_n.observe(n)
        self._metrics.params_max_tokens.observe(max_tokens)

    def saw(self, event: Event, began: float) -> None:
        """An event came; `began` is when the turn that made it did."""
        now = time.monotonic()
        if event.token_ids:
            if self._first is None:
                self._began, self._first = began, now
                self._metrics.ttft.observe(now - self._arrived)
                self._metrics.queue.observe(max(0.0, began - self._arrived))
                self._metrics.prefill.observe(now - began)
            if event.index in self._last:
                self._metrics.inter_token.observe(now - self._last[event.index])
            self._last[event.index] = now
            self.tokens += len(event.token_ids)
            self._metrics.generation_tokens.inc(len(event.token_ids))
        if event.finish_reason is not None:
            self._metrics.ended("abort" if event.finish_reason == "cancelled" else event.finish_reason)

    def ended(self) -> None:
        """All its answers have ended, well or not."""
        now = time.monotonic()
        self._metrics.e2e.observe(now - self._arrived)
        if self._first is None or self._began is None:
            return
        self._metrics.request_generation.observe(self.tokens)
        self._metrics.decode.observe(now - self._first)
        self._metrics.inference.observe(now - self._began)
        if self.tokens > len(self._last):
            self._metrics.per_token.observe((now - self._first) * len(self._last) / (self.tokens - len(self._last)))
