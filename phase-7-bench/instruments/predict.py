"""Predicts the speed-up of every variant of a cell before the cell is measured, from two measurements of other work.

    S = time of a plain text / time of a speculative one
      = (first(0) + (n - 1) step(0)) / (first(v) + (steps - 1) step(v))

- What steps cost on this machine: decoding loops with synthetic acceptance (engine/synthetic.py), in turns with plain
  decoding. step(v) is the time of a step after the first, first(v) that of all else: the prompts of the
  target and of the drafter, and a step. A step is K draft positions, a forward over K + 1 tokens, and the rule.
- How many steps a text takes: the variant decodes the prompts of the *other* half, at the cell's temperature, without
  looking at a clock. steps = tokens / (1 + sum of survival), with the shortened last step.

    lab sweep --predict --grid k=1..4 temperature=0,1

The 90% interval has three parts: the prompts of both halves, the noise of the costs, and DRIFT.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.errors import UserError
from common.harness import Bench
from common.prompts import Prompt
from common.results import Row
from common.tables import derive

from .cell import SECTION, Models, Task, base_settings, decode, way
from .grid import OWN, PLAIN

SURVIVAL, COST, PREDICTION = "survival", "cost", "prediction"
COST_PROMPTS, COST_ROUNDS = 20, 5
Z = 1.645  # of a 90% interval
DRIFT = 0.05  # standard deviation of the log of a ratio between two measurements, as seen on two machines
PREDICTIONS = {
    SURVIVAL: "steps and tokens of each variant on the other half of the prompts; no clock",
    COST: "loops with synthetic acceptance in turns with plain decoding, for the mean time of a step",
    PREDICTION: "the speed-up from survival and costs, with its 90% interval; written before the cells were run",
}


def survey(bench: Bench, task: Task) -> None:
    """Measure survival and costs of a cell, and add a row with the prediction of every variant."""
    cell = task.cell
    if cell.settings.get("phase", OWN) != OWN or PLAIN not in cell.variants:
        raise UserError("only variants of speculative decoding in this phase are predicted, beside plain decoding")
    models = Models(base_settings(bench, cell), cell.settings)
    prompts = bench.prompts(half="calibrate" if task.half == "test" else "test")
    drafting = {name: settings for name, settings in cell.variants.items() if name != PLAIN}
    for name, settings in drafting.items():
        for prompt in prompts:
            run = partial(lambda prompt, settings: decode(models.llm(settings), prompt, 0), prompt, settings)
            bench.count(SURVIVAL, cell.settings, name, prompt.id, run)
    forced = {}
    for name, settings in drafting.items():
        accepted = rate(rows_of(bench.results.rows, SURVIVAL, cell.settings, name))
        forced[name] = {"synthetic_acceptance": accepted, **settings}
    timed = bench.with_options(rounds=COST_ROUNDS)
    runs = {name: way(models, settings) for name, settings in {PLAIN: cell.variants[PLAIN], **forced}.items()}
    timed.compare(COST, cell.settings, runs, of_all_lengths(prompts, COST_PROMPTS), warmup=1)
    for name, found in {} if bench.options.dry_run else estimates(bench.results.rows, cell.settings).items():
        row = Row(kind="count", section=PREDICTION, cell=cell.settings, variant=name, figures=found)
        if not bench.results.has(row):
            bench.results.add(row)


def of_all_lengths(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Choose `count` prompts at equal steps through the lengths, so that their mean length is that of all."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.text))
    count = min(count, len(ordered))
    return [ordered[(2 * at + 1) * len(ordered) // (2 * count)] for at in range(count)]


def rows_of(rows: Sequence[Row], section: str, cell: Mapping[str, Any], variant: str) -> list[Row]:
    return [r for r in rows if (r.section, r.cell, r.variant, r.status) == (section, dict(cell), variant, "ok")]


def rate(rows: Sequence[Row]) -> float:
    """Return the share of draft tokens that are accepted if those before them were: the rate of a synthetic loop."""
    accepted = sum(row.figures.get("accepted", 0) for row in rows)
    rejections = sum(row.figures.get("drafts", 0) - fully(row) for row in rows)
    return accepted / (accepted + rejections) if accepted + rejections else 0.0


def fully(row: Row) -> int:
    """Return how many drafts of a run were accepted to their end, if all were as long as the longest."""
    survived = row.figures.get("survived") or [0]
    return int(survived[-1])


@dataclass(frozen=True)
class Cost:
    """Times of a variant in seconds: of each step after the first, and of all that is not one of these."""

    first: float
    step: float

    def text(self, steps: float) -> float:
        return self.first + max(0.0, steps - 1) * self.step


def cost(rows: Sequence[Row]) -> Cost:
    """Return the times of a variant: arithmetic means within a run, where times add up, geometric means over runs.

    A measured speed-up is a geometric mean of ratios of runs, so an interrupted run weighs here as it does there.
    """
    firsts = [(row.seconds or 0.0) - row.figures["later_ms"] / 1e3 for row in rows]
    longer = [
        (row.figures["later_ms"] / 1e3, row.figures["forwards"] - 1) for row in rows if row.figures["forwards"] > 1
    ]
    step = statistics.geometric_mean([seconds / count for seconds, count in longer]) if longer else 0.0
    return Cost(statistics.geometric_mean(firsts), step)


def estimates(rows: Sequence[Row], cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the prediction of every variant of a cell whose survival and costs have rows: a function of the rows."""
    plain = rows_of(rows, COST, cell, PLAIN)
    names = dict.fromkeys(row.variant for row in rows if row.section == SURVIVAL and row.cell == cell)
    found = {}
    for name in names:
        texts, timed = rows_of(rows, SURVIVAL, cell, name), rows_of(rows, COST, cell, name)
        if texts and timed and plain:
            found[name] = estimate(texts, timed, plain)
    return found


def estimate(texts: Sequence[Row], timed: Sequence[Row], plain: Sequence[Row]) -> dict[str, Any]:
    """Return the prediction of one variant, with its parts."""
    base, own = cost(plain), cost(timed)
    logs = [math.log(base.text(row.tokens or 1) / own.text(row.figures["forwards"])) for row in texts]
    between = statistics.stdev(logs) if len(logs) > 1 else 0.3
    error = math.sqrt(2 * between**2 / len(logs) + cost_error(timed, plain) ** 2 + DRIFT**2)
    center = statistics.fmean(logs)
    tokens, forwards = sum(row.tokens or 0 for row in texts), sum(row.figures["forwards"] for row in texts)
    return {
        "predicted": math.exp(center),
        "predicted_low": math.exp(center - Z * error),
        "predicted_high": math.exp(center + Z * error),
        "plain_step_ms": base.step * 1e3,
        "step_ms": own.step * 1e3,
        "first_ms": own.first * 1e3,
        "predicted_tokens_per_forward": tokens / forwards,
        "rate": rate(texts),
    }


def cost_error(timed: Sequence[Row], plain: Sequence[Row]) -> float:
    """Return the standard error of the log of a ratio of step times, from its pairs (same prompt, same round)."""
    steps = {(row.prompt, row.round): row.figures["later_ms"] / max(1, row.figures["forwards"] - 1) for row in plain}
    logs = [
        math.log(row.figures["later_ms"] / max(1, row.figures["forwards"] - 1) / steps[row.prompt, row.round])
        for row in timed
        if steps.get((row.prompt, row.round)) and row.figures["later_ms"]
    ]
    return statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.1


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Join predictions with what was measured afterwards: a line per cell and variant that has both."""
    measured = {}
    for line in derive([row for row in rows if row.section == SECTION]):
        names = list(line)
        cell = {name: line[name] for name in names[: names.index("variant")]}
        measured[json.dumps(cell), line["variant"]] = line
    lines = []
    for row in rows:
        if row.section != PREDICTION or (json.dumps(row.cell), row.variant) not in measured:
            continue
        line = measured[json.dumps(row.cell), row.variant]
        if line.get("speedup") is None:
            continue
        mine, forwards, ends = row.figures, line.get("tokens_per_forward"), ("", "_low", "_high")
        found = {**row.cell, "variant": row.variant, **{f"predicted{end}": mine[f"predicted{end}"] for end in ends}}
        found |= {f"measured{end}": line[f"speedup{end}"] for end in ends}
        found["error"] = mine["predicted"] / line["speedup"] - 1
        found["inside"] = mine["predicted_low"] <= line["speedup"] <= mine["predicted_high"]
        if forwards:
            found["tokens_per_forward"] = forwards
            found["tokens_error"] = mine["predicted_tokens_per_forward"] / forwards - 1
        lines.append(found)
    return lines


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that so many are not above."""
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def verdict(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise errors of predictions: median and 90th percentile, and the share inside their intervals."""
    if not lines:
        return {"predicted_cells": 0}
    errors = sorted(abs(line["error"]) for line in lines)
    tokens = sorted(abs(line["tokens_error"]) for line in lines if "tokens_error" in line)
    found = {
        "predicted_cells": len(lines),
        "error_median": statistics.median(errors),
        "error_p90": quantile(errors, 0.9),
        "inside": sum(bool(line["inside"]) for line in lines) / len(lines),
    }
    if tokens:
        found |= {"tokens_error_median": statistics.median(tokens), "tokens_error_p90": quantile(tokens, 0.9)}
    return found


def verdicts(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Summarise real cells, and apart from them those with synthetic acceptance, where only costs can be wrong."""
    forced = [line for line in lines if "synthetic_acceptance" in line["variant"]]
    return {"whole": verdict([line for line in lines if line not in forced]), "costs_alone": verdict(forced)}


def sentences(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say how good the predictions were: a sentence on whole cells, one on acceptance and one on costs alone."""
    found, said = verdicts(lines), list[str]()
    whole, costs = found["whole"], found["costs_alone"]
    if whole["predicted_cells"]:
        said.append(
            f"Of {whole['predicted_cells']} speed-ups {whole['inside']:.0%} were inside their 90% intervals; the error "
            f"was {whole['error_median']:.1%} at the median and {whole['error_p90']:.1%} at the 90th percentile."
        )
    if "tokens_error_median" in whole:
        said.append(
            f"Acceptance alone (tokens per target forward, no clock): {whole['tokens_error_median']:.1%} and "
            f"{whole['tokens_error_p90']:.1%}."
        )
    if costs["predicted_cells"]:
        said.append(
            f"Costs alone ({costs['predicted_cells']} with synthetic acceptance): {costs['error_median']:.1%} and "
            f"{costs['error_p90']:.1%}."
        )
    return said
