"""What /metrics tells Prometheus: the names, labels and meanings are vLLM's, so its dashboards and tools read them.

vLLM marks the counters of speculative decoding as experimental; tests/phase7/test_server_metrics.py pins the names.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine import LLMEngine, Output, PagedCache, StepStats

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
REASONS = {"length": "length", "eos": "stop", "stop": "stop", "aborted": "abort", "error": "error", "refused": "error"}
LABELS = ("model_name", "engine")


class Metrics:
    """Counters of one server. `observe` is called in the engine's thread, the rest anywhere."""

    def __init__(self, engine: LLMEngine, model: str) -> None:
        self.registry = CollectorRegistry()
        self._engine, self._labels = engine, (model, "0")
        running = self._gauge("num_requests_running", "Requests that are decoded or prefilled.")
        running.set_function(lambda: len(engine.scheduler.running))
        waiting = self._gauge("num_requests_waiting", "Requests that wait for a row or for blocks.")
        waiting.set_function(lambda: len(engine.scheduler.waiting))
        self._gauge("kv_cache_usage_perc", "Share of the blocks in use, 0 to 1.").set_function(self._cache_usage)
        self._preemptions = self._counter("num_preemptions", "Requests that lost their blocks for a time.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation = self._counter("generation_tokens", "Tokens of outputs.")
        ended = Counter("vllm:request_success", "Requests by how they ended.", (*LABELS, "finished_reason"),
                        registry=self.registry)  # fmt: skip
        self._ended = {name: ended.labels(*self._labels, name) for name in dict.fromkeys(REASONS.values())}
        self._drafts = self._counter("spec_decode_num_drafts", "Steps with a draft.")
        self._proposed = self._counter("spec_decode_num_draft_tokens", "Draft tokens that the target computed.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self._positions = Counter("vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by position.",
                                  (*LABELS, "position"), registry=self.registry)  # fmt: skip
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "Mean time of a further token.", SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first schedule.", SECONDS)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._outputs = self._histogram("request_generation_tokens", "Tokens of an output.", TOKENS)

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(f"vllm:{name}", words, LABELS, registry=self.registry).labels(*self._labels)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(f"vllm:{name}", words, LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", words, LABELS, registry=self.registry, buckets=buckets)
        return made.labels(*self._labels)

    def _cache_usage(self) -> float:
        cache = getattr(getattr(self._engine.target, "manager", None), "cache", None)
        if not isinstance(cache, PagedCache):
            return 0.0
        return 1 - cache.blocks.free / len(cache.blocks.users)

    def observe(self, outputs: list[Output]) -> None:
        """Count what a step of the engine gave."""
        for output in outputs:
            self._generation.inc(len(output.tokens))
            for step in drafted(output.steps):
                self._drafts.inc()
                self._proposed.inc(step.proposed)
                self._accepted.inc(step.accepted)
                for position in range(step.accepted):
                    self._positions.labels(*self._labels, str(position)).inc()
            if output.finish_reason is None or (stats := output.stats) is None:
                continue
            self._ended[REASONS[output.finish_reason]].inc()
            self._preemptions.inc(stats.preemptions)
            self._prompt.inc(stats.prompt_tokens)
            self._prompts.observe(stats.prompt_tokens)
            self._outputs.observe(stats.new_tokens)
            self._queue.observe(stats.queue_ms / 1e3)
            if stats.new_tokens:
                self._first.observe(stats.ttft_ms / 1e3)
                self._whole.observe(stats.total_ms / 1e3)
            if stats.new_tokens > 1:
                self._between.observe(stats.tpot_ms / 1e3)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def drafted(steps: Iterable[StepStats]) -> list[StepStats]:
    """Return the steps whose drafts the target computed."""
    return [step for step in steps if step.proposed]


def speculation(steps: list[StepStats], longest: int) -> dict[str, object]:
    """Return vLLM's figures of one request, protocol.SpeculativeDecoding. longest: the longest draft of a step."""
    steps = drafted(steps)
    proposed, accepted = sum(step.proposed for step in steps), sum(step.accepted for step in steps)
    longest = max([longest, *(step.accepted for step in steps)])
    counts = [step.accepted for step in steps]
    return {
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else 1.0,
        "draft_acceptance_rate": accepted / proposed if proposed else 0.0,
        "acceptance_histogram": [counts.count(length) for length in range(longest + 1)],
        "num_spec_steps": len(steps),
        "num_draft_tokens": proposed,
        "num_accepted_draft_tokens": accepted,
        "num_spec_tokens": longest,
    }
