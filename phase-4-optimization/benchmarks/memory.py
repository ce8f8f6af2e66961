"""Measures the memory of a loaded model, and the peak while loading: a new process for each storage format.

The checkpoint has GPT-2's shape and random weights, in float32: 124 million parameters, 85 of them in linear layers.
A process's growth is that of its resident size, without the mapped file (see common/weights.py). Its peak is the
largest resident size while loading, including pages of the file.

    python bench.py --only memory
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.benchmark import Outcome, progress
from common.checkpoint import open_checkpoint
from common.device import MIB, memory, reset_peak
from common.harness import Bench
from common.phases import ROOT
from common.random_checkpoint import random_checkpoint
from engine import LLM, Options
from engine.quantize import linears, stored_bytes

MEMORY = {
    "memory": "variant: how the matrices of the linear layers are stored; beside quantised ones the rest is float32. "
    "growth_mib: resident size of a fresh process after loading, less that before; the libraries are warm; peak_mib: "
    "highest resident size while loading, less that before: pages of the mapped file count; linear_mib: of the growth, "
    "what the matrices of the linear layers take: all other tensors are taken off; stored_mib: bytes of those matrices "
    "with their scales, as the engine counts them; scales_mib: of these, what scales take",
}
VARIANTS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quant": "int8"},
    "int4": {"dtype": "float32", "quant": "int4"},
}
PHASE = Path(__file__).resolve().parents[1]


def measure_memory(lab: Bench) -> None:
    wanted = {name: VARIANTS[name] for name in (("float32", "int8") if lab.options.quick else VARIANTS)}
    with checkpoint(lab) as folder, progress("memory", len(wanted)) as show:
        for variant, options in wanted.items():
            cell = {"checkpoint": folder.name}
            lab.count("memory", cell, variant, None, partial(in_a_fresh_process, folder, options))
            show(variant)


@contextmanager
def checkpoint(lab: Bench) -> Iterator[Path]:
    """Make a checkpoint in GPT-2's shape; with --quick and --dry-run, use the bench's model."""
    if lab.options.quick or lab.options.dry_run:
        yield open_checkpoint(lab.options.model).folder
        return
    with random_checkpoint("gpt2") as folder:
        yield folder


def in_a_fresh_process(folder: Path, options: dict[str, str]) -> Outcome:
    """Run `loading` in a new process, and return its figures. RuntimeError with the process's stderr if it fails."""
    program = (
        f"import sys; sys.path[:0] = {[str(PHASE), str(ROOT)]!r}; "
        f"from benchmarks.memory import loading; loading({str(folder)!r}, {options!r})"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"loading {folder.name} with {options} failed: {run.stderr}")
    return Outcome(1, json.loads(run.stdout.splitlines()[-1]))


def loading(folder: str, options: dict[str, str]) -> None:
    """Load a checkpoint in this process, and print the memory figures as JSON."""
    cpu = torch.device("cpu")
    wanted: dict[str, Any] = {"draft": "none", "device": "cpu", "max_tokens": 1, **options}
    LLM(Options(model="stdlib-1m", **wanted)).generate(["x"])  # load libraries, allocate the kernels' memory
    gc.collect()
    before = memory(cpu)["rss"]
    peak_is_ours = reset_peak(cpu)
    llm = LLM(Options(model=folder, **wanted))
    gc.collect()
    used, model = memory(cpu), llm.loaded.model
    values, scales = stored_bytes(model)
    layers = [linear for name, linear in linears(model) if name != "head"]
    inside = {id(tensor) for linear in layers for tensor in (*linear.parameters(), *linear.buffers())}
    others = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside)
    growth = used["rss"] - before
    found = {"growth_mib": growth, "linear_mib": growth - others / MIB}
    found |= {"stored_mib": (values + scales) / MIB, "scales_mib": scales / MIB}
    if peak_is_ours:  # otherwise the peak is that of the whole process
        found["peak_mib"] = used["peak_rss"] - before
    print(json.dumps(found))
