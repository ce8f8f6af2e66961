"""Latency under load: requests arrive at times that were fixed before, and every latency counts from the arrival.

    lab latency --rate 2 --rate 8 --requests 300
    lab latency --target http://127.0.0.1:8000 --arrivals bursts --slo-ttft 200 --slo-tpot 50
    lab latency --output latency --vllm latency/serving.json

Without `--rate`, the rate is doubled until the target no longer keeps up. Every request is a row. TTFT: from arrival to
the first token. TPOT: (end to end - TTFT) / (tokens - 1). ITL: gap between two chunks, with the tokens per chunk. A
percentile needs so many requests that one of them lies beyond it with 95% confidence: 5, 29 and 299 for p50, 90, 99.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

import engine
from common.benchmark import BenchOptions, print_document
from common.checkpoint import open_checkpoint
from common.device import resolve_device
from common.errors import UserError
from common.harness import Bench, open_results
from common.options import parse_options, run_main
from common.prompts import Prompt
from common.results import Row
from common.terminal import progress

from .arrivals import Arrivals, schedule
from .formats import llama_document, vllm_document
from .loads import SECTION, draw, report, summary
from .targets import Ask, LocalTarget, Target, UrlTarget

REQUEST = "request"
DEFINITIONS = {
    "latency": "an open loop: requests are sent at times fixed before; latency counts from the scheduled arrival",
    "ttft_ms": "from the scheduled arrival to the first token",
    "tpot_ms": "(end to end - ttft) / (tokens - 1)",
    "itl_ms": "gaps between two chunks",
    "tokens_per_chunk": "output tokens / chunks",
    "late_ms": "time by which the client itself sent too late",
    "goodput": "requests per second that met all stated objectives",
}
SATURATED = 0.9  # a target that completes less than this share of the offered rate does not keep up
MOST_RATES = 10  # of a search without --rate


class LatencyOptions(BenchOptions):
    """Measure latency and goodput under an open-loop load."""

    target: str | None = Field(None, description="address of an OpenAI-compatible server; none: the engine here")
    target_model: str | None = Field(None, description="of --target: the model's name; none: its first")
    rate: list[float] = Field([], description="requests per second; repeatable; none: doubled until saturation")
    requests: int = Field(100, ge=1, description="requests at each rate")
    arrivals: Arrivals = Field("poisson", description="how requests arrive")
    temperature: float = Field(0.0, ge=0, description="of every request")
    ignore_eos: bool = Field(False, description="decode all --max-tokens tokens")
    draft: str = Field("auto", description="of the engine here: the draft model; none; auto: the model's own")
    controller: str = Field("cost", description="of the engine here: how many tokens to draft")
    batch_size: int = Field(16, ge=1, description="of the engine here: sequences that are decoded at once")
    timeout: float = Field(120, gt=0, description="a request fails if nothing comes for so many seconds")
    slo_ttft: float | None = Field(None, gt=0, description="objective: milliseconds to the first token")
    slo_tpot: float | None = Field(None, gt=0, description="objective: milliseconds per further token")
    slo_e2e: float | None = Field(None, gt=0, description="objective: milliseconds to the end")
    vllm: Path | None = Field(None, description="write the last rate in the format of `vllm bench serve`, to this file")
    llama: Path | None = Field(None, description="write all rates in the format of llama-bench, to this file")
    budget: float = Field(600, gt=0, description="no further rate is begun after so many seconds")

    @property
    def objectives(self) -> dict[str, float]:
        found = {"ttft_ms": self.slo_ttft, "tpot_ms": self.slo_tpot, "e2e_ms": self.slo_e2e}
        return {name: limit for name, limit in found.items() if limit is not None}


@dataclass
class Served:
    """One request, with times in seconds from the beginning of the load."""

    prompt: Prompt
    scheduled: float
    sent: float = math.nan
    chunks: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    total: int | None = None
    prompt_tokens: int | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        return self.total if self.total is not None else sum(tokens for _, tokens in self.chunks)

    def figures(self) -> dict[str, Any]:
        """Return the latencies, in milliseconds; for a request with at least one token."""
        times = [time for time, _ in self.chunks]
        first, last = times[0] - self.scheduled, times[-1] - self.scheduled
        found: dict[str, Any] = {
            "scheduled_s": self.scheduled,
            "late_ms": 1e3 * (self.sent - self.scheduled),
            "ttft_ms": 1e3 * first,
            "e2e_ms": 1e3 * last,
            "itl_ms": [1e3 * (after - before) for before, after in pairwise(times)],
            "tokens_per_chunk": self.tokens / len(times),
            "prompt_tokens": self.prompt_tokens,
        }
        if self.tokens > 1:
            found["tpot_ms"] = 1e3 * (last - first) / (self.tokens - 1)
        return found


def load(target: Target, asks: Sequence[tuple[Prompt, Ask]], times: Sequence[float], step: Any) -> list[Served]:
    """Send every request at its time, whatever became of the earlier ones; return all when they have ended."""
    served = [Served(prompt, at) for (prompt, _), at in zip(asks, times, strict=True)]

    def one(mine: Served, ask: Ask) -> None:
        mine.sent = time.perf_counter() - began
        try:
            for chunk in target.stream(ask):
                if chunk.tokens:
                    mine.chunks.append((time.perf_counter() - began, chunk.tokens))
                    mine.text += chunk.text
                mine.total = chunk.total if chunk.total is not None else mine.total
                mine.prompt_tokens = chunk.prompt if chunk.prompt is not None else mine.prompt_tokens
            if not mine.chunks:
                mine.error = "the answer had no token"
        except UserError as error:
            mine.error = str(error)
        step(mine.prompt.id)

    with ThreadPoolExecutor(len(asks)) as threads:  # as many as there are requests at once: an open loop has no limit
        began = time.perf_counter()
        sent = []
        for mine, (_, ask) in zip(served, asks, strict=True):
            time.sleep(max(0.0, began + mine.scheduled - time.perf_counter()))
            sent.append(threads.submit(one, mine, ask))
    for each in sent:
        each.result()
    return served


def rows_of(served: Sequence[Served], cell: dict[str, Any]) -> list[Row]:
    """Return a row for every request; one that failed has the reason."""
    found = []
    for number, each in enumerate(served):
        row = Row(kind="count", section=SECTION, cell=cell, variant=REQUEST, prompt=f"{number} {each.prompt.id}")
        if each.error is not None:
            row = row.model_copy(update={"status": "failed", "reason": each.error})
        else:
            figures = each.figures()
            update = {"seconds": figures["e2e_ms"] / 1e3, "tokens": float(each.tokens), "figures": figures}
            row = row.model_copy(update=update | {"load": round(os.getloadavg()[0], 2)})
        found.append(row)
    return found


def keeps_up(line: dict[str, Any], times: Sequence[float]) -> bool:
    """Return whether a target completed about as many requests per second as arrived."""
    offered = len(times) / max(times[-1], 1e-9)
    return not line["failed"] and line.get("completed_per_s", 0.0) >= SATURATED * min(offered, line["rate"])


@contextlib.contextmanager
def opened(options: LatencyOptions) -> Iterator[Target]:
    if options.target is not None:
        with contextlib.closing(UrlTarget(options.target, options.target_model, options.timeout)) as target:
            yield target
        return
    chosen: dict[str, Any] = {
        "model": options.model, "draft": options.draft, "controller": options.controller, "dtype": options.dtype,
        "device": options.device, "threads": options.threads or 0, "batch_size": options.batch_size,
        "max_tokens": options.max_tokens, "seed": options.seed,
    }  # fmt: skip
    with contextlib.closing(LocalTarget(engine.Options(**chosen))) as local:
        yield local


def measure(bench: Bench, options: LatencyOptions) -> str:
    """Load the target at every rate, and add a row per request; return the model's name."""
    prompts = bench.prompts(options.prompts)
    began = time.monotonic()
    with opened(options) as target:
        print(f"note: {target.where}, model {target.name}", file=sys.stderr)
        asks = [
            (prompt, Ask(prompt.text, options.max_tokens, options.temperature, options.seed + at, options.ignore_eos))
            for at, prompt in enumerate(prompts[number % len(prompts)] for number in range(options.requests))
        ]
        with progress("warm-up", 2) as step:
            first = load(target, asks[:2], [0.0, 0.0][: len(asks[:2])], step)
        if all(each.error for each in first):
            raise UserError(f"{target.where} answers no request: {first[0].error}")
        rates, number = list(options.rate), 0
        rate = rates[0] if rates else 1.0
        while True:
            cell = {"arrivals": options.arrivals, "rate": rate}
            times = schedule(options.arrivals, rate, options.requests, options.seed)
            if not any(row.cell == cell for row in bench.results.rows):
                with progress(f"{rate:g} requests/s", options.requests) as step:
                    served = load(target, asks, times, step)
                for row in rows_of(served, cell):
                    bench.results.add(row)
            number += 1
            (line,) = [each for each in summary(bench.results.rows) if each["rate"] == rate]
            if rates:
                if number == len(rates):
                    break
                rate = rates[number]
            else:
                if number == MOST_RATES or not keeps_up(line, times):
                    break
                rate *= 2
            if time.monotonic() - began > options.budget:
                print(f"note: --budget {options.budget:g} is spent; {rate:g} requests/s was not begun", file=sys.stderr)
                break
        return target.name


def run(arguments: list[str]) -> int:
    options = parse_options(LatencyOptions, arguments, program="lab latency")
    if options.dry_run or options.quick:
        raise UserError("--dry-run and --quick are no options of latency: give fewer --requests")
    if bad := [rate for rate in options.rate if not 0 < rate < math.inf]:
        raise UserError(f"--rate {bad[0]:g}: a rate is above 0")
    hashes = {} if options.target else {options.model: open_checkpoint(options.model).content_hash()}
    with open_results(options, DEFINITIONS, resolve_device(options.device), options.dtype, hashes) as results:
        bench = Bench(options, results, resolve_device(options.device))
        model = measure(bench, options)
        lines = summary(results.rows, options.objectives)
        report(lines)
        if options.output:
            draw(lines, options.output / "latency.png")
        if options.vllm:
            options.vllm.write_text(json.dumps(vllm_document(results.rows, lines[-1], model)) + "\n", encoding="utf-8")
        if options.llama:
            entries = llama_document(results.rows, lines, model, results.environment)
            options.llama.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        print_document(
            {"schema_version": results.manifest()["schema_version"], "environment": results.environment, "lines": lines}
        )
        return 1 if results.failures else 0


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
