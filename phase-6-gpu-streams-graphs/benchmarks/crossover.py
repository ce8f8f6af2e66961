"""How many rows a batch may have before speculation no longer pays: predicted from step times, and measured.

A step for R rows with K draft tokens each gives 1 + s tokens a row, s of them accepted. So it gains

    (1 + s) time of a plain step for R rows / time of a step with R x K draft tokens

The step times are those that `--controller cost` goes by: measured on made-up texts for each number of rows
(engine/prices.py, engine/cost_model.py). s is that of the timed run.

    python bench.py --only crossover --output results
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.benchmark import Outcome
from common.figures import figure, look
from common.harness import Variant
from common.prompts import Prompt
from common.results import Scalar
from engine import LLM
from engine.cost_model import CostModel

from .runs import Format, Lab, serve

CROSSOVER = {
    "crossover": "at temperature 1, `rows` requests of equal length at once, K = 4 in every step; no baseline drafts",
    "predicted": "(1 + accepted tokens a step) x predicted time of a plain step / that of a step with drafts",
}
K, ROWS = 4, (1, 2, 4, 8, 16)
PLAIN, DRAFTED = "plain", f"speculative, K = {K}"


def measure_crossover(lab: Lab) -> None:
    most = 4 if lab.options.quick else ROWS[-1]
    for name in lab.options.formats:
        costs = CostModel()  # filled before the first run
        for rows in (count for count in ROWS if count <= most):
            cell: dict[str, Scalar] = {
                "model": lab.options.model,
                "format": name,
                "instruction_set": lab.instruction_set,
                "rows": rows,
            }
            run = partial(timed, lab, name, costs, rows, most)
            lab.compare("crossover", cell, {PLAIN: run(0), DRAFTED: run(K)}, exact=(DRAFTED,))


def timed(lab: Lab, name: Format, costs: CostModel, rows: int, most: int, k: int) -> Variant:
    def run(prompt: Prompt | None, round_: int) -> Outcome:
        llm = lab.llm(name, controller="fixed")
        if not costs.known:
            observe(llm, costs, most)
        tokens = [lab.options.max_tokens] * rows
        done = serve(llm, lab.texts(rows), tokens, rows=rows, k=k, temperature=1.0)
        if k:
            predicted = gain(costs, rows, k, float(done.figures["tokens_per_forward"]))
            return dataclasses.replace(done, figures={**done.figures, "predicted": predicted})
        return done

    return run


def observe(llm: LLM, costs: CostModel, most: int) -> None:
    """Measure steps of every number of rows, as the controller does when it meets one."""
    params = dataclasses.replace(llm.params, temperature=1.0)
    for rows in (count for count in ROWS if count <= most):
        for name, table in llm.prices.measure(params, rows).tables.items():
            for size, seconds in table.usual().items():
                costs.tables[name].observe(size, seconds)


def gain(costs: CostModel, rows: int, k: int, tokens_per_step: float) -> float:
    """Return the predicted speed-up of `rows` rows that draft k tokens and gain so many in every step."""
    return tokens_per_step * costs.time([0] * rows) / costs.time([k] * rows)


def crossing(rows: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Return the number of rows at which the speed-up falls to 1, linear between log2(rows); None if it does not."""
    for (before, high), (after, low) in pairwise(zip(rows, ratios, strict=True)):
        if high >= 1 > low:
            return float(2 ** (math.log2(before) + math.log2(after / before) * (high - 1) / (high - low)))
    return None


def crossings(lab: Lab) -> list[dict[str, Any]]:
    """Return, for each format, the numbers of rows at which speculation stops to pay: predicted, and measured."""
    found = list[dict[str, Any]]()
    lines = [line for line in lab.table("crossover") if line["variant"] == DRAFTED and "predicted" in line]
    for name in dict.fromkeys(line["format"] for line in lines):
        mine = [line for line in lines if line["format"] == name]
        at = [line["rows"] for line in mine]
        both = {
            key: crossing(at, [line[of] for line in mine])
            for key, of in (("predicted", "predicted"), ("measured", "speedup"))
        }
        found.append({"format": name, **both})
    return found


def draw_crossover(lab: Lab, file: Path) -> None:
    """Draw the predicted and the measured speed-up of speculation against the rows of a batch."""
    lines = [line for line in lab.table("crossover") if line["variant"] == DRAFTED and "predicted" in line]
    formats = list(dict.fromkeys(line["format"] for line in lines))
    if not formats:
        return
    title = (
        f"speculation in a batch, temperature 1, K = {K}: {lines[0]['model']}, {lines[0]['instruction_set']}{lab.mark}"
    )
    with figure(file, 1, len(formats), (5.6, 4.0), title) as panels:
        for axes, name in zip(panels, formats, strict=True):
            mine = [line for line in lines if line["format"] == name]
            at = [line["rows"] for line in mine]
            axes.plot(at, [line["speedup"] for line in mine], label="measured", **look(0))
            axes.plot(at, [line["predicted"] for line in mine], label="predicted", **look(1))
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_xlabel("rows of the batch")
            axes.set_ylabel(f"speed-up over plain decoding, {name}")
            axes.legend(fontsize="small")
