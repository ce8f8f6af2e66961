"""Several prompts at a time, end to end: what plain decoding gains, and what speculation adds.

Unlike the steps alone (batch.py), a time includes the prompts, the loop in Python and prompts that end before others.

    python bench.py --only rows --output results
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine.kernels import cpp

from .fast import number_format
from .runs import Lab, sharing

ROWS = {
    "rows": "plain decoding of eight prompts, some at a time; the baseline is one at a time",
    "rows_cost": "speculation with `cost`, over plain decoding of as many rows; both with C++ steps",
    "outside_us": "time per token outside of the steps: the loop, the planning of steps and the text",
}
PLAIN, COST = (1, 2, 4, 8), (2, 4, 8)  # `fast` has one row
GROUP = max(PLAIN)


def measure_rows(lab: Lab) -> None:
    if lab.refused("rows", cpp.why_not(lab.device)):
        return
    for format in lab.options.formats:
        cell: dict[str, Any] = {
            "model": lab.options.model, "format": format, "instruction_set": lab.instruction_set
        }  # fmt: skip
        plain = cache(partial(lab.llm, kernels="cpp", draft="none", **number_format(format)))
        groups = groups_of(lab, GROUP)
        names = {rows: f"{rows} row{'s' * (rows > 1)}" for rows in PLAIN}
        runs = {name: together(plain, groups, rows) for rows, name in names.items()}
        lab.compare("rows", cell, runs, [group[0] for group in groups.values()], exact=list(runs))
        for temperature in lab.options.temperatures:
            for rows in COST:
                of_cost(lab, {**cell, "temperature": temperature, "rows": rows})


def of_cost(lab: Lab, cell: dict[str, Any]) -> None:
    """Measure one cell: `cost` at a format, a temperature and a number of rows."""
    rows, temperature = cell["rows"], cell["temperature"]
    options = {"kernels": "cpp", "temperature": temperature, **number_format(cell["format"])}
    groups = groups_of(lab, rows)
    plain = cache(partial(lab.llm, **options, draft="none"))
    drafting = cache(partial(sharing, plain, draft=lab.options.draft, controller="cost", draft_quant="int8"))
    runs = {"plain": together(plain, groups, rows), "cost": together(drafting, groups, rows)}
    half = lab.with_options(budget=lab.options.budget / 2)
    half.compare("rows_cost", cell, runs, [each[0] for each in groups.values()], exact=[] if temperature else ["cost"])


def groups_of(lab: Lab, size: int) -> dict[str, list[Prompt]]:
    """Return at least `--prompts` prompts in groups, by the id of the first of each."""
    prompts = lab.prompts(math.ceil(lab.options.prompts / size) * size)
    return {prompts[at].id: prompts[at : at + size] for at in range(0, len(prompts), size)}


def together(make: Callable[[], Any], groups: dict[str, list[Prompt]], rows: int) -> Variant:
    """Return a variant that decodes a group of prompts, `rows` of them at a time; every round has its own seed."""

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        llm, group = make(), groups[prompt.id]
        params = dataclasses.replace(llm.params, seed=llm.options.seed + round_)
        tokens: list[int] = []
        forwards, inside, began = 0, 0.0, time.perf_counter()
        for at in range(0, len(group), rows):
            sequences = llm.sequences([each.text for each in group[at : at + rows]], params)
            for step in llm.run(sequences):
                stats = step.stats[0]  # a batch shares the times of its steps
                inside += stats.draft_ms + stats.verify_ms + stats.accept_ms + stats.kv_ms
            for sequence in sequences:
                tokens += sequence.tokens
                forwards += sequence.progress.forwards
        seconds = time.perf_counter() - began
        figures = {"forwards": forwards, "outside_us": (seconds - inside / 1e3) * 1e6 / max(1, len(tokens))}
        return Outcome(len(tokens), figures, output=tokens, seconds=seconds)

    return run
