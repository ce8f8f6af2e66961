"""Measures a grid of options: every cell is a comparison in a process of its own, and every run is a row.

    lab sweep --grid k=1..8 drafter=model,eagle temperature=0,1
    lab sweep --config phase-7-bench/grids/k-sweep.yaml
    lab sweep --resume --output sweeps/2026-11-30-09-00-00
    lab sweep --grid k=2,4 --ray auto

A cell times plain decoding twice (the second time is the null arm) and its variants, in turns. A cell that crashes,
lacks memory or is killed costs itself alone, and is a row with the reason. The folder holds results.jsonl, tables.csv,
MANIFEST.json and pictures (common/results.md).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator

from common.benchmark import BenchOptions, print_document
from common.checkpoint import open_checkpoint
from common.device import resolve_device
from common.errors import UserError
from common.harness import Bench, open_results
from common.options import parse_options, run_main
from common.results import Results, Row, read_manifest
from common.terminal import print_table, progress

from .cell import QUALITY, SECTION, Task, measure
from .executors import WHOLE, Event, local, on_ray
from .grid import Cell, cells, parse
from .pictures import draw
from .predict import PREDICTIONS, compared, verdict

DEFINITIONS = {
    SECTION: "a comparison per cell: the baseline's seconds per token / this variant's, prompt by prompt in turns; at "
    "temperature > 0 the seed of round r is --seed + r",
    QUALITY: "perplexity of the prompts' true continuations, computed by the cell's own kernels and cache",
    "tokens_per_forward": "new tokens / target forwards",
    "acceptance": "accepted / proposed draft tokens",
    "survival": "share of the drafts whose first 1, 2, ... tokens were all accepted",
    "draft_share": "time spent drafting / time of all steps",
    "loop_share": "share of the tokens that end an 8-gram which the same output held before",
    "ttft_ms": "from the start of a run to the first token",
    "tpot_ms": "(end - first token) / (tokens - 1)",
    "peak_rss_mib": "most memory of the cell's process, which holds the models of all variants",
    "synthetic_acceptance": "acceptance was forced at this rate: the times are real, the texts are not",
}


class SweepOptions(BenchOptions):
    """Measure a grid of options, a comparison per cell."""

    grid: list[str] = Field([], description="axis: an option with its values, as in k=1..8 or dtype=float32,bfloat16")
    prompts: int = Field(20, ge=1, description="how many prompts are timed")
    half: Literal["test", "calibrate"] = Field("test", description="half of the prompt suite")
    compare_baseline: bool = Field(True, description="compare with plain decoding, in every cell; no: with the first")
    eval_perplexity: bool = Field(False, description="judge the prompts' true continuations, in every cell")
    predict: bool = Field(False, description="first predict every variant, from the other half of the prompts")
    plots: bool = Field(True, description="draw pictures")
    ray: str | None = Field(None, description="run the cells on a Ray cluster: its address, `auto`, or `local`")
    cell_timeout: float = Field(3600, gt=0, description="end a cell that takes longer, in seconds")
    config: Path | None = Field(None, description="YAML file with these options, such as a grid file")

    @field_validator("grid", mode="before")
    @classmethod
    def _grid_is_a_mapping(cls, value: object) -> object:
        """Read the axes of a YAML file: `k: 1..8`, `dtype: [float32, bfloat16]`, `model+draft: [[a, b], [c, d]]`."""
        if not isinstance(value, dict):
            return value
        lines = []
        for name, values in value.items():
            listed = values if isinstance(values, list) else [values]
            words = ["+".join(map(str, each)) if isinstance(each, list) else str(each) for each in listed]
            lines.append(f"{name}={','.join(words)}")
        return lines


def spread(arguments: Sequence[str]) -> list[str]:
    """Give every axis a flag of its own: `--grid a=1 b=2` is `--grid a=1 --grid b=2`."""
    found: list[str] = []
    inside = False
    for word in arguments:
        if word.startswith("--") or not inside:
            inside = word == "--grid"
            found.append(word)
        else:
            found += [word] if found[-1] == "--grid" else ["--grid", word]
    return found


def saved(folder: Path, **changed: Any) -> SweepOptions:
    """Return the options of a sweep's folder, with some of them changed. UserError for another kind of folder."""
    options = read_manifest(folder)["invocations"][-1]["options"]
    if "grid" not in options:
        raise UserError(f"{folder} holds the results of a bench, not of a sweep")
    try:
        return SweepOptions(**{**options, "config": None, **changed})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{folder}: its manifest has no options of a sweep ({first['loc']}: {first['msg']})") from None


def read_options(arguments: Sequence[str]) -> SweepOptions:
    """Parse a command line. `--resume` without a grid goes on with the grid of the folder."""
    options = parse_options(SweepOptions, spread(arguments), program="lab sweep")
    if options.resume and not options.grid:
        assert options.output is not None
        changes = {
            name: getattr(options, name)
            for name in ("ray", "plots", "cell_timeout")
            if name in options.model_fields_set
        }
        options = saved(options.output, output=options.output, resume=True, **changes)
    if options.output is None:
        options.output = Path("sweeps") / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    return options


def model_hashes(options: SweepOptions, found: Sequence[Cell]) -> dict[str, str]:
    """Hash the models of a grid. One that cannot be opened is refused later, by its cells."""
    names = {options.model}
    for cell in found:
        for settings in (cell.settings, *cell.variants.values()):
            names |= {settings[name] for name in ("model", "draft") if settings.get(name) not in (None, "auto", "none")}
    hashes = {}
    for name in sorted(names):
        try:
            hashes[name] = open_checkpoint(name).content_hash()
        except UserError:
            hashes[name] = "not opened"
    return hashes


def finished(results: Results, cell: Cell, synthetic: bool = False, section: str = SECTION) -> bool:
    """Return whether a cell was measured, or has a row that says why it could not be."""
    row = Row(kind="end", section=section, cell=cell.settings, synthetic=synthetic)
    return results.has(row) or results.has(row.model_copy(update={"kind": "count", "variant": WHOLE}))


def tasks(options: SweepOptions, results: Results, found: Sequence[Cell]) -> list[Task]:
    """List what is left to do, with the rows that unfinished cells have already."""
    of_bench = {
        name: value for name, value in options.model_dump(mode="json").items() if name in BenchOptions.model_fields
    }
    left = []
    for predict in (True, False) if options.predict else (False,):
        for cell in found:
            task = Task(cell, of_bench, options.half, options.eval_perplexity, predict)
            if not finished(results, cell, section=task.section):
                rows = [row.model_dump(exclude_defaults=True) for row in results.rows if row.cell == cell.settings]
                left.append(dataclasses.replace(task, rows=rows))
    return left


def run_cells(bench: Bench, events: Iterator[Event], total: int) -> None:
    """Write the rows that arrive, and show how many cells are left."""
    with progress("cells", total) as step:
        for cell, row in events:
            if row is None:
                step(str(cell))
            elif not bench.results.has(row):
                bench.results.add(row)


def success(results: Results, found: Sequence[Cell], synthetic: bool = False) -> dict[str, Any]:
    """Count the cells that were measured: all of their variants gave rows."""
    bad = {str(row.cell) for row in results.failures}
    good = [cell for cell in found if finished(results, cell, synthetic) and str(cell.settings) not in bad]
    return {"cells": len(found), "measured": len(good), "success_rate": len(good) / len(found)}


def events_of(options: SweepOptions, left: Sequence[Task], accelerators: int) -> Iterator[Event]:
    """Start the cells, here or on a cluster."""
    if options.ray is None:
        return local(left, options.cell_timeout)
    return on_ray(left, options.cell_timeout, options.ray, accelerators)


def sweep(options: SweepOptions) -> int:
    """Run a sweep and write its folder; return the exit status."""
    found = cells(parse(options.grid), options.compare_baseline)
    device = resolve_device(options.device)
    hashes = model_hashes(options, found)
    with open_results(options, DEFINITIONS | PREDICTIONS, device, options.dtype, hashes) as results:
        bench = Bench(options, results, device)
        if options.dry_run:
            for cell in found:
                measure(bench, Task(cell, {}, options.half, options.eval_perplexity))
        else:
            left = tasks(options, results, found)
            for predict in (True, False):  # no cell is measured before all are predicted
                stage = [task for task in left if task.predict is predict]
                if stage:
                    run_cells(bench, events_of(options, stage, int(device.type == "cuda")), len(stage))
        return finish(bench, options, found)


def finish(bench: Bench, options: SweepOptions, found: Sequence[Cell]) -> int:
    """Print the tables, draw the pictures, and print the document."""
    bench.report(SECTION, "Sweep")
    bench.report(QUALITY, "Perplexity of held-out text")
    predictions = compared(bench.results.rows)
    if predictions:
        names = list(dict.fromkeys(name for line in predictions for name in line))
        print_table("Predicted and measured", names, [[line.get(name) for name in names] for line in predictions])
    counted = success(bench.results, found, options.dry_run)
    status = bench.close()
    assert options.output is not None
    if options.plots:
        draw(bench.table(SECTION), options.output, bench.mark)
    print(f"{counted['measured']} of {counted['cells']} cells were measured; {options.output}")
    print_document(bench.document() | counted | verdict(predictions) | {"output": str(options.output)})
    return status


def run(arguments: list[str]) -> int:
    options = read_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return sweep(options)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
