"""Throughput and latency against the number of requests that arrive together.

The baseline serves them one after the other. `static` waits for the slowest request of a batch before the next one
begins; continuous batching fills a row as soon as it is free. All variants must give the same tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from common.benchmark import Outcome
from common.figures import figure, look
from common.harness import Variant
from common.prompts import Prompt

from .runs import Format, Lab, lengths, serve

REQUESTS = {
    "requests": "greedy; `requests` arrive together, with 24 to 96 new tokens each; at most 8 run at once; seconds are "
    "those until the last has ended",
    "sampled": "the same at temperature 1: each request has a seed, and its drafts are accepted by `coupled`",
}
ROWS = 8


def measure_requests(lab: Lab, section: str = "requests", temperature: float = 0.0) -> None:
    for name in lab.options.formats:
        for count in lab.options.requests:
            cell = {"model": lab.options.model, "format": name, "instruction_set": lab.instruction_set}
            lab.compare(section, {**cell, "requests": count}, variants(lab, name, count, temperature), exact=EXACT)


def measure_sampled(lab: Lab) -> None:
    measure_requests(lab, "sampled", 1.0)


EXACT = ("continuous", "static", "continuous, speculative", "one at a time, speculative")


def variants(lab: Lab, name: Format, count: int, temperature: float) -> dict[str, Variant]:
    run = partial(timed, lab, name, count, temperature=temperature)
    found = {
        "one at a time": run(rows=1),
        "one at a time, speculative": run(rows=1, k=4),
        "continuous": run(rows=ROWS),
        "continuous, speculative": run(rows=ROWS, k=4),
    }
    return found | ({"static": run(rows=ROWS, static=True)} if count > ROWS else {})


def timed(lab: Lab, name: Format, count: int, **how: Any) -> Variant:
    def run(prompt: Prompt | None, round_: int) -> Outcome:
        # One LLM for all: two copies of the weights, at different places in memory, can differ by 4% in speed.
        return serve(lab.llm(name, controller="cost"), lab.texts(count), lengths(count, lab.options.max_tokens), **how)

    return run


def draw_requests(lab: Lab, file: Path) -> None:
    """Draw throughput and time to the first token against the number of requests, by format."""
    lines = [line for line in lab.table("requests") if "tokens_per_s" in line and not line["variant"].endswith("again")]
    formats = list(dict.fromkeys(line["format"] for line in lines))
    if not formats:
        return
    title = f"requests that arrive together: {lines[0]['model']}, {lines[0]['instruction_set']}{lab.mark}"
    with figure(file, len(formats), 2, (5.6, 4.0), title) as panels:
        for name, (rate, first) in zip(formats, zip(panels[::2], panels[1::2], strict=True), strict=False):
            of_format = [line for line in lines if line["format"] == name]
            for number, variant in enumerate(dict.fromkeys(line["variant"] for line in of_format)):
                mine = [line for line in of_format if line["variant"] == variant]
                at = [line["requests"] for line in mine]
                rate.plot(at, [line["tokens_per_s"] for line in mine], label=variant, **look(number))
                first.plot(at, [line.get("ttft_ms", 0.0) for line in mine], label=variant, **look(number))
            for axes, label in ((rate, f"tokens per second, {name}"), (first, f"ms to the first token, {name}")):
                axes.set_xscale("log", base=2)
                axes.set_xlabel("requests")
                axes.set_ylabel(label)
            first.legend(fontsize="small", loc="upper left")  # empty: the time to the first token only grows
