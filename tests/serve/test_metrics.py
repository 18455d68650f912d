"""What Prometheus is told, under vLLM's names and NIM's, read back by Prometheus's own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from .parrot import Parrot, http, image_part, served, until, user

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
}
NIM = {
    "num_requests_running",
    "num_requests_waiting",
    "gpu_cache_usage_perc",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
}


def scrape(url: str) -> tuple[set[str], dict[str, float]]:
    families = list(text_string_to_metric_families(http.get(url).text))
    values = {
        sample.name + str(sample.labels.get("finished_reason") or ""): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    return {family.name for family in families}, values


def test_one_request_is_counted_once(parrot: Parrot) -> None:
    parrot.delay = 0.01
    with served(parrot, name="my/vllm:model") as server:
        body = {"messages": user(image_part(), "x"), "temperature": 0, "max_tokens": 6}
        usage = http.post(f"{server.url}/v1/chat/completions", json=body).json()["usage"]
        names, values = scrape(f"{server.url}/metrics")
        assert names >= VLLM
        assert values["vllm:prompt_tokens_total"] == usage["prompt_tokens"]
        assert values["vllm:generation_tokens_total"] == usage["completion_tokens"] == 6
        assert values["vllm:request_success_totallength"] == 1
        for name in VLLM - {"vllm:inter_token_latency_seconds"}:
            if f"{name}_count" in values:
                assert values[f"{name}_count"] == 1, name
        assert values["vllm:inter_token_latency_seconds_count"] == 5
        ttft, e2e = (values[f"vllm:{name}_seconds_sum"] for name in ("time_to_first_token", "e2e_request_latency"))
        parts = [values[f"vllm:request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode")]
        assert 0.01 <= ttft < e2e and abs(sum(parts) - e2e) < 0.005
        assert 0.008 < values["vllm:request_time_per_output_token_seconds_sum"] < 0.1

        nim_names, nim_values = scrape(f"{server.url}/v1/metrics")
        assert nim_names >= NIM and not [name for name in nim_names if name.startswith("vllm:")]
        assert nim_values["time_to_first_token_seconds_sum"] == ttft
        assert 'model_name="my/vllm:model"' in http.get(f"{server.url}/v1/metrics").text


def test_gauges_while_something_runs(parrot: Parrot) -> None:
    with served(parrot) as server:
        parrot.delay = 0.02
        body = {"messages": user("x"), "stream": True, "max_tokens": 100, "ignore_eos": True}
        with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # the connection ends with it
            next(lines)
            _, values = scrape(f"{server.url}/metrics")
            assert values["vllm:num_requests_running"] == 1 and 0 < values["vllm:kv_cache_usage_perc"] < 1
        until(lambda: scrape(f"{server.url}/metrics")[1]["vllm:num_requests_running"] == 0)
        _, values = scrape(f"{server.url}/metrics")
        assert values["vllm:kv_cache_usage_perc"] == values["vllm:num_requests_waiting"] == 0
