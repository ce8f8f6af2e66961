"""The names and meanings of /metrics: vLLM's, pinned. What the answers say adds up to what the counters say."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.serving import Json, Served, eventually

NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket", "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
}  # fmt: skip


def read(server: Served) -> dict[str, float]:
    """Return the value of every sample, by name and what its labels add to the model's."""
    with server.client() as client:
        text = client.get("/metrics").text
    found = dict[str, float]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
            assert sample.labels["engine"] == "0"
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_the_names_are_those_of_vllm(drafting: Served) -> None:
    drafting.post(prompt="import os", max_tokens=24, temperature=0)
    with drafting.client() as client:
        text = client.get("/metrics").text
    assert set(re.findall(r"^(vllm:\w+)\{", text, re.MULTILINE)) >= NAMES
    assert 'vllm:spec_decode_num_drafts_total{engine="0",model_name="stdlib-10m"}' in text
    assert 'position="0"' in text


def test_answers_add_up_to_the_counters(drafting: Served) -> None:
    """Plain and speculative requests together, with every policy, to the last token."""
    before = read(drafting)

    def ask(at: int) -> Json:
        ways: list[Json] = [{}, {"k": 0}, {"seed": at}, {"policy": "typical", "k": 2}, {"controller": "adaptive"}]
        how = ways[at % 5]
        text = ["import os", "class Stack:", "def f(x):"][at % 3]
        return drafting.post(prompt=text, max_tokens=20 + at, temperature=1.0, ignore_eos=True, **how)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(10)))
    after = read(drafting)
    found = [answer["metrics"]["speculative_decoding"] for answer in answers]
    assert [each is None for each in found] == [at % 5 == 1 for at in range(10)]
    found = [each for each in found if each is not None]

    def gained(name: str) -> float:
        return after.get(f"vllm:{name}", 0) - before.get(f"vllm:{name}", 0)

    assert gained("spec_decode_num_drafts_total") == sum(each["num_spec_steps"] for each in found) > 0
    assert gained("spec_decode_num_draft_tokens_total") == sum(each["num_draft_tokens"] for each in found)
    accepted = sum(each["num_accepted_draft_tokens"] for each in found)
    assert gained("spec_decode_num_accepted_tokens_total") == accepted > 0
    for position in range(8):
        reached = sum(sum(each["acceptance_histogram"][position + 1 :]) for each in found)
        assert gained(f"spec_decode_num_accepted_tokens_per_pos_total {position}") == reached
    assert gained("generation_tokens_total") == sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert gained("prompt_tokens_total") == sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert gained("request_success_total length") == 10
    assert gained("time_to_first_token_seconds_count") == gained("e2e_request_latency_seconds_count") == 10
    assert gained("request_generation_tokens_sum") == gained("generation_tokens_total")
    for each in found:
        histogram, steps = each["acceptance_histogram"], each["num_spec_steps"]
        assert sum(histogram) == steps
        assert sum(at * count for at, count in enumerate(histogram)) == each["num_accepted_draft_tokens"]
        assert each["mean_acceptance_length"] == 1 + each["num_accepted_draft_tokens"] / max(1, steps)
        assert len(histogram) == each["num_spec_tokens"] + 1


def test_gauges_and_aborted_requests(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.slow(monkeypatch)
    before = read(server)
    with server.client() as client:
        asked = {"prompt": "import os", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 4}
        with client.stream("POST", "/v1/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            during = read(server)
    eventually(server.rests)
    assert during["vllm:num_requests_running"] == 4
    assert 0 < during["vllm:kv_cache_usage_perc"] <= 1
    eventually(
        lambda: read(server)["vllm:request_success_total abort"] == before["vllm:request_success_total abort"] + 4
    )
    assert read(server)["vllm:num_requests_running"] == read(server)["vllm:kv_cache_usage_perc"] == 0
