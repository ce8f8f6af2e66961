"""Sections of the bench: predicted and measured cells, real and synthetic; latency under load; the cost of HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from common.figures import GREY, figure, look
from common.harness import Bench
from instruments.cell import Task, measure
from instruments.executors import local
from instruments.grid import Cell, cells, parse
from instruments.latency import DEFINITIONS as LATENCIES
from instruments.latency import LatencyOptions
from instruments.latency import measure as measure_load
from instruments.predict import PREDICTIONS, survey
from instruments.sweep import DEFINITIONS, SweepOptions, run_cells, tasks

from .serving import SERVING, measure_peers, measure_serving

Section = Literal["sweep", "synthetic", "latency", "serving", "peers"]
FIGURES = DEFINITIONS | PREDICTIONS | LATENCIES | SERVING
GRID = ["k=1,2,4,6,8", "drafter=model,ngram,eagle", "temperature=0,1", "dtype=float32,bfloat16"]
# The seed tells these cells from those of the sweep.
SYNTHETIC = ["k=1,2,4,8", "synthetic_acceptance=0.3,0.6,0.9", "temperature=1", "dtype=float32,bfloat16", "seed=1"]
QUICK = (["k=2,4", "drafter=ngram", "temperature=0"], ["k=2", "synthetic_acceptance=0.6", "temperature=0", "seed=1"])


class Options(SweepOptions):
    """Predict and measure cells of a grid, and latency under load."""

    prompts: int = Field(100, ge=1, description="how many prompts of each half are decoded")
    max_tokens: int = Field(32, ge=1, description="new tokens per prompt")
    budget: float = Field(100, gt=0, description="or until one comparison has taken this many seconds")
    only: list[Section] = Field([], description="measure this section alone; repeatable")
    requests: int = Field(300, ge=1, description="of latency: requests at each rate")
    rates: list[float] = Field([2, 4, 8, 16], description="of latency: requests per second; repeatable")


def measure_sweep(bench: Bench, options: Options) -> None:
    measure_cells(bench, options, QUICK[0] if options.quick else options.grid or GRID)


def measure_synthetic(bench: Bench, options: Options) -> None:
    measure_cells(bench, options, QUICK[1] if options.quick else SYNTHETIC)


def measure_cells(bench: Bench, options: Options, grid: Sequence[str]) -> None:
    """Predict every cell of a grid, then measure it."""
    found: list[Cell] = cells(parse(grid))
    if options.dry_run:
        for cell in found:
            survey(bench, Task(cell, {}, options.half))
            measure(bench, Task(cell, {}, options.half))
        return
    of_grid = options.model_copy(
        update={"predict": True, **({"prompts": min(options.prompts, 4)} if options.quick else {})}
    )
    left = tasks(of_grid, bench.results, found)
    run_cells(bench, local(left, options.cell_timeout), len(left))


def measure_latency(bench: Bench, options: Options) -> None:
    """Load the engine at every rate."""
    if options.dry_run:
        return
    quick = options.quick
    given: dict[str, Any] = {name: getattr(options, name) for name in ("model", "dtype", "device", "threads", "seed")}
    given |= {"max_tokens": options.max_tokens, "prompts": min(options.prompts, 50), "ignore_eos": True}
    given |= {"requests": 10 if quick else options.requests, "rate": [4.0] if quick else options.rates}
    load = LatencyOptions(**given, slo_ttft=500, slo_tpot=50)
    measure_load(bench, load)


def measure_server(bench: Bench, options: Options) -> None:
    """Compare the server with the engine that it serves."""
    measure_serving(bench, ("serving",) if options.quick else ("serving", "first"), (1,) if options.quick else (1, 8))


def measure_servers(bench: Bench, options: Options) -> None:
    """Compare the server with others."""
    if not options.dry_run:
        measure_peers(bench)


def draw_predictions(lines: Sequence[Mapping[str, Any]], file: Path, mark: str = "") -> None:
    """Draw measured against predicted speed-ups, with both intervals."""
    if not lines:
        return
    with figure(file, size=(6.4, 6.0), title=f"Speed-up: predicted before, measured after{mark}") as [axes]:
        groups = dict.fromkeys(f"{line.get('dtype', '')}, temperature {line.get('temperature', 0):g}" for line in lines)
        for at, group in enumerate(groups):
            mine = [
                line
                for line in lines
                if group == f"{line.get('dtype', '')}, temperature {line.get('temperature', 0):g}"
            ]
            x, y = [line["predicted"] for line in mine], [line["measured"] for line in mine]
            across = [
                [line["predicted"] - line["predicted_low"] for line in mine],
                [line["predicted_high"] - line["predicted"] for line in mine],
            ]
            axes.errorbar(x, y, xerr=across, linestyle="none", capsize=2, label=group, **look(at))
        ends = [min(line["measured"] for line in lines), max(line["measured"] for line in lines)]
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        axes.set_xlabel("predicted, with its 90% interval")
        axes.set_ylabel("measured")
        axes.legend(fontsize=8)
