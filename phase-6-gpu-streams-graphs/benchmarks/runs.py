"""Options of the bench, and bursts of requests that an engine serves; used by all sections."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

import engine
from common.benchmark import BenchOptions, Outcome
from common.harness import Bench
from engine.kernels import cpp
from engine.steps import Step

Section = Literal["requests", "sampled", "crossover", "prefix", "overlap", "parallel", "peers"]
Format = Literal["float32", "bfloat16", "float16", "int8", "int4"]
FIGURES = {
    "speedup": "the baseline's seconds per token / this variant's, in pairs of the same round",
    "queue_ms": "from arrival until a request is first scheduled; mean over the requests",
    "ttft_ms": "from arrival to the first token; mean over the requests",
    "itl_ms": "gap between two chunks of tokens of a request; mean over the requests",
    "tokens_per_forward": "new tokens / rows of all target forwards",
    "schedule_share": "time in Scheduler.schedule / time of all steps",
    "schedule_us": "time of one call of Scheduler.schedule",
    "schedule_us_per_step": "time in Scheduler.schedule / steps; one call may make several steps",
    "calls": "calls of LLMEngine.step; one call may make several steps",
    "instruction_set": "instruction set of the C++ kernels (SPECDEC_CPU_ISA forces one)",
}


class Options(BenchOptions):
    """Measure an engine that serves many requests: throughput, latency, and what scheduling costs."""

    max_tokens: int = Field(96, ge=8, description="new tokens of the longest request; the shortest has a quarter")
    budget: float = Field(25, gt=0, description="or until one comparison has taken so many seconds; see also --rounds")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    requests: list[int] = Field([1, 2, 4, 8, 16], min_length=1, description="that arrive together; repeatable")
    formats: list[Format] = Field(["float32", "bfloat16"], min_length=1, description="of the weights; repeatable")
    draft: str = Field("auto", description="the draft model; auto: the model's own")


@dataclass(frozen=True)
class Lab(Bench):
    """A bench with loaded models."""

    options: Options
    loaded: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def instruction_set(self) -> str:
        return "none" if self.options.dry_run else cpp.chosen_isa()

    def llm(self, of_format: Format, **wanted: Any) -> engine.LLM:
        """Return an LLM of a number format; it is loaded once."""
        key = (of_format, *sorted(wanted.items()))
        if key not in self.loaded:
            numbers = {"quant": of_format, "dtype": "float32"} if of_format.startswith("int") else {"dtype": of_format}
            chosen: dict[str, Any] = {
                "model": self.options.model,
                "seed": self.options.seed,
                "device": self.device.type,
            }
            chosen |= {"threads": self.options.threads or 0, "draft": self.options.draft, **numbers, **wanted}
            self.loaded[key] = engine.LLM(engine.Options(**chosen))
        found: engine.LLM = self.loaded[key]
        return found

    def texts(self, count: int) -> list[str]:
        """Return so many prompts, from the beginning again if there are fewer."""
        found = [prompt.text for prompt in self.prompts(count)]
        return [found[at % len(found)] for at in range(count)]


def lengths(count: int, longest: int) -> list[int]:
    """Return the new tokens of every request: between a quarter of the longest and all, in a mixed order."""
    return [longest // 4 + (at * 5 % 8) * (longest - longest // 4) // 7 for at in range(count)]


def forget(llm: engine.LLM) -> None:
    """Empty the prefix caches, so that every run computes its prompts."""
    for manager in llm.caches.values():
        assert isinstance(manager.cache, engine.PagedCache)
        manager.cache.forget_all()


def serve(
    llm: engine.LLM,
    texts: Sequence[str | list[int]],
    tokens: list[int],
    rows: int,
    static: bool = False,
    k: int = 0,
    temperature: float = 0.0,
) -> Outcome:
    """Serve requests that arrive together, at most `rows` at once; return all tokens, and means over the requests.

    static: a batch ends with its slowest request, and only then the next one begins. k: 0 drafts nothing.
    """
    forget(llm)
    served = engine.LLMEngine(llm, rows=rows)
    schedule, spent = served.scheduler.schedule, list[float]()

    def timed() -> Any:
        began = time.perf_counter()
        found = schedule()
        spent.append(time.perf_counter() - began)
        return found

    advance, steps = served.advance, 0

    def counted() -> Iterator[Step]:
        nonlocal steps
        for step in advance():
            steps += 1
            yield step

    served.scheduler.schedule, served.advance = timed, counted  # type: ignore[method-assign]
    waiting = deque(enumerate(zip(texts, tokens, strict=True)))
    numbers, stats, outputs = dict[int, int](), list[Any](), [list[int]() for _ in texts]
    began = time.perf_counter()
    while waiting or served.busy:
        while waiting and not (static and (served.busy and len(numbers) % rows == 0)):
            at, (text, count) = waiting.popleft()
            params = dataclasses.replace(
                llm.params, max_new_tokens=count, ignore_eos=True, temperature=temperature, seed=llm.params.seed + at
            )
            numbers[served.add_request(text, params, k=k)] = at
            sequence = served.requests[max(numbers)][0]
            sequence.progress.began = began  # it arrived with all others
        for output in served.step():
            outputs[numbers[output.request]] += output.tokens
            stats += [output.stats] if output.stats is not None else []
    seconds = time.perf_counter() - began
    figures = {
        "queue_ms": mean([each.queue_ms for each in stats]),
        "ttft_ms": mean([each.ttft_ms for each in stats]),
        "itl_ms": mean([each.itl_ms for each in stats]),
        "tokens_per_forward": sum(tokens) / sum(each.target_forwards for each in stats),
        "schedule_share": sum(spent) / seconds,
        "schedule_us": mean(spent) * 1e6,
        "schedule_us_per_step": sum(spent) / steps * 1e6,
        "calls": len(spent),
    }
    served.close()
    return Outcome(sum(tokens), figures, output=[token for each in outputs for token in each], seconds=seconds)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
