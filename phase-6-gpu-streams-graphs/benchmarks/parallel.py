"""One process against two that share the model: time per token, and how much of it is communication.

The predicted communication is the number of messages of a step times the latency of a message, by kind and size. The
latency is measured right after each run: two processes exchange as many numbers with nothing to compute, as often as in
a step. A message takes from when the last process has come to it, so that a wait for the other process's computation
is no communication.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import engine
from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine.parallel.messages import Ping
from engine.parallel.traffic import busy, ping, seconds_of, trace

from .cards import bubble
from .runs import Format, Lab, forget, mean

PARALLEL = {
    "parallel": "time per token of `rows` greedy requests: one process, or two that share the model",
    "messages": "messages between the processes in a step, process 0's plan included",
    "communication_ms": "time of a step's messages, each from when the last process has come to it",
    "predicted_ms": "messages of a step x the latency of one, by kind and size, measured with nothing to compute",
    "waiting": "share of a step in which process 0 waits for numbers, or for the other process that computes them",
    "bubble": "the same by the formula, for equal micro-batches and messages that take no time",
}
SPLITS: dict[str, dict[str, Any]] = {
    "gather": {"tensor_parallel": 2},
    "reduce": {"tensor_parallel": 2, "tensor_mode": "reduce"},
    "layers": {"pipeline_parallel": 2, "micro_batches": 1},
    "layers, 2 micro-batches": {"pipeline_parallel": 2, "micro_batches": 2},
}
ROUNDS, PINGS = 10, 10  # so many times so many exchanges measure the latency of one size


def measure_parallel(lab: Lab) -> None:
    for name in lab.options.formats:
        for rows in (1,) if lab.options.quick else (1, 8):
            cell = {"model": lab.options.model, "format": name, "instruction_set": lab.instruction_set}
            runs = {"one process": decode(lab, name, rows, {"threads": 1})}
            for split, options in SPLITS.items():
                if rows > 1 or options.get("micro_batches") != 2:
                    runs[split] = decode(lab, name, rows, {"threads": 1, **options})
            exact = [split for split in runs if split not in ("one process", "reduce")]
            lab.compare("parallel", {**cell, "rows": rows}, runs, exact=exact)


def decode(lab: Lab, name: Format, rows: int, options: dict[str, Any]) -> Variant:
    def run(prompt: Prompt | None, round_: int) -> Outcome:
        llm = lab.llm(name, draft="none", **options)
        params = dataclasses.replace(llm.params, max_new_tokens=lab.options.max_tokens // 3, ignore_eos=True)
        sequences = [engine.Sequence([7 + at, 8, 9], params, llm.loaded.ending) for at in range(rows)]
        forget(llm)
        group, waited = llm.group, 0.0
        if group is not None:
            trace(group, True)
            waited = -group.traffic.seconds
        began = time.perf_counter()
        steps = [step for step in llm.run(sequences, multi_step=False) if step is not None]
        seconds = time.perf_counter() - began
        outputs = [token for sequence in sequences for token in sequence.tokens]
        figures = dict[str, Any]()
        if group is not None:
            waited += group.traffic.seconds
            found = seconds_of(trace(group, False))
            messages = sum(map(len, found.values()))
            turns = options.get("micro_batches") == 1
            alone = latencies(group, list(found), (seconds - waited) / messages, turns)
            figures = {
                "messages": messages / len(steps),
                "communication_ms": sum(map(sum, found.values())) / len(steps) * 1e3,
                "predicted_ms": sum(len(found[kind]) * alone[kind] for kind in found) / len(steps) * 1e3,
                "waiting": waited / seconds,
            }
            if "micro_batches" in options:
                figures["bubble"] = bubble(group.ranks, min(rows, options["micro_batches"]))
        return Outcome(len(outputs), figures, output=outputs, seconds=seconds)

    return run


def latencies(group: Any, kinds: list[tuple[str, int]], pause: float, turns: bool) -> dict[tuple[str, int], float]:
    """Return the mean seconds of a message of each kind and size. The processes are busy for `pause` before each.

    turns: one process is busy at a time.
    """
    trace(group, True)
    for _ in range(ROUNDS):
        for kind, floats in kinds:
            if kind != "plan":
                busy(pause)
                group.tell(what := Ping(kind == "all", floats, PINGS, pause, turns))
                ping(group, what)
    return {kind: mean(seconds) for kind, seconds in seconds_of(trace(group, False)).items()}
