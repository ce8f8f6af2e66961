"""One step for several sequences: rows that share a read of the weights (part of `--ladder`).

The baseline of a format is one row. A step for R rows is bound by the larger of two times: that of reading the weights
once, and that of R tokens of arithmetic. Both are measured in the same run, each by the same threads; arithmetic is
products from cached memory, of numbers in the format that the kernels give the activations: integers for weights of 8
and 4 bits, bfloat16 for such weights where the processor multiplies them, float32 otherwise. Verifying a draft of four
computes five tokens of a row.

    python bench.py --ladder --output results
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.benchmark import Outcome, WrongResult
from common.figures import GREY, figure, look
from common.harness import Variant
from common.prompts import Prompt
from engine import SamplingParams
from engine.kernels.cpp import CppModel
from engine.kernels.cpp.weights import Weights

from .runs import Lab

BATCH = {
    "batch": "greedy tokens of several sequences, the steps alone, 12 tokens in the cache; the baseline is one row",
    "of_roofline": "the larger of the times for reading the weights and for the products / measured time; products are "
    "of integers for int8 and int4, of bfloat16 for bfloat16 if the instruction set has them, else of float32",
}
FORMATS: tuple[Weights, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
ROWS, TOKENS = (1, 2, 4, 8, 16), 5
HELD, STEPS = 12, 24  # cached tokens of a row at first, and steps of a run
# format, bytes of weights -> bytes and operations per second
Limits = Callable[[Weights, int], tuple[float, float]]


def measure_batch(
    lab: Lab,
    cell: dict[str, Any],
    model: Callable[[Weights], CppModel],
    limits: Limits,
    weights: Callable[[], int],
    formats: Sequence[Weights] = FORMATS,
) -> None:
    """Time every format at every number of rows.

    model: makes the model of a format, once. limits: measures the machine. weights: counts those of a step.
    """
    for name in formats:
        fast, bound = partial(model, name), partial(roofline, partial(limits, name), weights)
        runs = {"1 row" if rows == 1 else f"{rows} rows": timed(fast, rows, bound) for rows in ROWS}
        runs[f"1 row, {TOKENS} tokens"] = timed(fast, 1, bound, TOKENS)
        lab.compare("batch", {**cell, "format": name}, runs)


def roofline(
    limits: Callable[[int], tuple[float, float]], weights: Callable[[], int], nbytes: int, tokens: int
) -> dict[str, float]:
    """Return the figures of STEPS steps over so many tokens, with the least time that the machine's limits allow."""
    operations = 2 * weights() * tokens
    read, computed = limits(nbytes)
    bound = STEPS * max(nbytes / read, operations / computed)
    return {"gb": nbytes * STEPS / 1e9, "gflop": operations * STEPS / 1e9, "roofline_s": bound}


def timed(
    model: Callable[[], CppModel], rows: int, bound: Callable[[int, int], dict[str, float]], m: int = 1
) -> Variant:
    """Return a variant that makes STEPS steps of `rows` equal texts: of the next token, or always of the same m."""

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        fast, params = model(), SamplingParams()
        kept, text = fast.new_cache(rows, HELD + STEPS + m), list(range(1, HELD + 1))
        fast.step(kept, [text] * rows, logits=False, wanted=[])
        for row in range(rows):
            kept.keep(row, list(range(HELD)))
        batch = [fast.sequence(kept, row, [HELD + 1], params) for row in range(rows)]
        began = time.perf_counter()
        if m == 1:
            made, _ = fast.decode(batch, None, [0] * rows, STEPS)
            if any(set(step.next) != {step.next[0]} for step in made):
                raise WrongResult("equal texts in one batch have different tokens")
        else:
            for _ in range(STEPS):
                fast.step(kept, [text[:m]] * rows, wanted=range(rows * m))
        seconds = time.perf_counter() - began
        return Outcome(rows * m * STEPS, bound(fast.weight_bytes, rows * m), seconds=seconds)

    return run


def draw_batch(lab: Lab, file: Path) -> None:
    """Draw the gain of rows over one row, by format, of the bench's model and the newest instruction set."""
    lines = [line for line in lab.table("batch") if "tokens_per_s" in line]
    lines = [line for line in lines if "tokens" not in line["variant"] and "again" not in line["variant"]]
    lines = [line for line in lines if line["model"] == lines[0]["model"]]
    lines = [line for line in lines if line["instruction_set"] == lines[-1]["instruction_set"]]
    formats = list(dict.fromkeys(line["format"] for line in lines))
    if not formats:
        return
    title = (
        f"rows that share a step of {lines[0]['model']}: {lines[0]['threads']} threads, {lines[0]['instruction_set']}"
    )
    with figure(file, 1, 1, (7.2, 4.2), title + lab.mark) as (axes,):
        for number, name in enumerate(formats):
            mine = [line for line in lines if line["format"] == name]
            at = [int(line["variant"].split()[0]) for line in mine]
            axes.plot(at, [line["tokens_per_s"] / mine[0]["tokens_per_s"] for line in mine], label=name, **look(number))
        axes.plot(ROWS, ROWS, color=GREY, linewidth=1, label="as many times as rows")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ROWS, [str(rows) for rows in ROWS])
        axes.set_xlabel("rows")
        axes.set_ylabel("tokens per second, x one row")
        axes.legend(fontsize="small")
