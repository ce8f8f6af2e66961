"""One process against two that share the model: time per token, and how much of it is communication.

The predicted communication is the number of messages of a step times the latency of one message of this machine, which
two processes measure alone, with nothing to compute in between.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

import engine
from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine.cost import bubble
from engine.parallel.messages import Ping

from .runs import Format, Lab, forget

PARALLEL = {
    "parallel": "time per token of `rows` greedy requests: one process, or two that share the model",
    "exchanges": "messages between the processes in a step",
    "communication_ms": "time of a step in which process 0 waits for messages, those that it waits for included",
    "predicted_ms": "messages of a step x the latency of one of about their size, measured alone",
    "bubble": "share of a step in which a process waits for the other one's micro-batch, by the formula",
    "waiting": "share of a step in which process 0 waits for messages",
}
SPLITS: dict[str, dict[str, Any]] = {
    "gather": {"tensor_parallel": 2},
    "reduce": {"tensor_parallel": 2, "tensor_mode": "reduce"},
    "layers": {"pipeline_parallel": 2, "micro_batches": 1},
    "layers, 2 micro-batches": {"pipeline_parallel": 2, "micro_batches": 2},
}
PINGS = 200


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
        group = llm.group
        before = dataclasses.replace(group.traffic) if group else None
        began = time.perf_counter()
        steps = [step for step in llm.run(sequences, multi_step=False) if step is not None]
        seconds = time.perf_counter() - began
        outputs = [token for sequence in sequences for token in sequence.tokens]
        figures = dict[str, Any]()
        if group is not None and before is not None:
            exchanges = group.traffic.exchanges - before.exchanges
            floats = (group.traffic.floats - before.floats) // exchanges
            waited = group.traffic.seconds - before.seconds
            figures = {
                "exchanges": exchanges / len(steps),
                "communication_ms": waited / len(steps) * 1e3,
                "predicted_ms": exchanges / len(steps) * latency_ms(group, floats),
                "waiting": waited / seconds,
            }
            if "micro_batches" in options:
                figures["bubble"] = bubble(group.ranks, min(rows, options["micro_batches"]))
        return Outcome(len(outputs), figures, output=outputs, seconds=seconds)

    return run


def latency_ms(group: Any, floats: int) -> float:
    """Return the mean time of an exchange of so many numbers while nothing is computed."""
    mine, gathered = torch.zeros(floats), torch.zeros(group.ranks, floats)
    group.tell(Ping(floats, PINGS))
    group.gather(mine, gathered)  # the other process is ready
    began = time.perf_counter()
    for _ in range(PINGS - 1):
        group.gather(mine, gathered)
    return (time.perf_counter() - began) / (PINGS - 1) * 1e3
