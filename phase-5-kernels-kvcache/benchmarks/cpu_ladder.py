"""The ladder on a CPU: one decode step five ways, against what memory and arithmetic allow.

For every rung: tokens per second, bytes of weights read per second, and what share that is of the speed at which this
machine reads as much memory, measured in the same run. `bench.py --ladder`, or

    python -m benchmarks.cpu_ladder --output results
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import BaseSettings

from common.benchmark import WrongResult, interleave, print_document, print_table, ratio_interval
from common.errors import UserError
from common.figures import figure
from common.options import parse_options, run_main
from engine import SamplingParams, load
from engine.kernels.cpp import CppModel, default_threads, why_not
from engine.kernels.cpp.ladder import RUNGS, Rung
from engine.kernels.cpp.weights import Weights
from engine.model import Transformer

DEFINITIONS = {
    "tokens_per_s": "greedy tokens of one text per second of the step alone, median of the rounds",
    "weight_mb": "MB of matrices that one token reads",
    "gb_per_s": "weight_mb x tokens_per_s",
    "of_read_speed": "gb_per_s / the speed at which the same threads read that much memory over and over, same run",
    "gflop_per_s": "2 x weights x tokens_per_s",
}
CHECKED = 12  # tokens whose logits are compared with the torch model before a rung is timed
# Weights and activations of 8 bits of mantissa; relative to the largest logit.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 3e-2}
FUSED: tuple[Weights, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
FUSED_BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-3, "int8": 0.1, "int4": 0.6}
LEVELS = {"L2": 2**20, "L3": 24 * 2**20, "DRAM": 2**29}  # bytes that all threads read together


class LadderOptions(BaseSettings):
    """Time every rung of the CPU ladder."""

    model: str = Field("stdlib-10m", description="a Llama checkpoint")
    threads: int = Field(0, ge=0, description="0: physical cores")
    tokens: int = Field(64, ge=8, description="tokens per timed round")
    repeats: int = Field(7, ge=2, description="timed rounds")
    output: Path | None = Field(None, description="folder for cpu-ladder.png")


def run(
    model: str = "stdlib-10m", threads: int = 0, tokens: int = 64, repeats: int = 7, output: Path | None = None
) -> dict[str, Any]:
    """All rungs, checked and then timed in turns: {"rungs": rows, "read_gb_per_s": ..., "peak_gflop_per_s": ...}.

    WrongResult where a rung's logits are not the model's; UserError without a compiler. With `output` the roofline is
    drawn there.
    """
    if (reason := why_not()) is not None:
        raise UserError(f"the ladder cannot be built: {reason}")
    threads = threads or default_threads()
    target = load(model, torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    text = torch.randint(1, target.config.vocab_size, (CHECKED,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = target(torch.tensor([text]))[0]

    steppers: dict[str, Callable[[], float]] = {}
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for kind in RUNGS:
        if (reason := kind.why_not()) is not None:
            skipped[kind.title] = reason
            continue
        rung = Rung(kind, target, CHECKED + tokens + 1, 1 if kind is RUNGS[0] else threads)
        got = torch.stack([rung.step(token, at).clone() for at, token in enumerate(text)])
        refuse(kind.title, got, expected, BOUNDS[kind.weights])
        steppers[kind.title] = stepper(rung, expected[-1], tokens)
        rows.append({"rung": kind.title, "weight_mb": rung.weight_bytes / 1e6})
    machine: CppModel | None = None
    for format in FUSED:
        fused = CppModel(target, format, threads)
        machine = machine or fused
        cache = fused.new_cache(1, CHECKED + tokens + 1)
        logits = fused.step(cache, [text], wanted=range(CHECKED)).logits
        assert logits is not None
        title = f"fused step, {format}"
        refuse(title, logits, expected, FUSED_BOUNDS[format])
        cache.keep(0, list(range(CHECKED)))
        steppers[title] = fused_stepper(fused, cache, int(logits[-1].argmax()), tokens)
        rows.append({"rung": title, "weight_mb": fused.weight_bytes / 1e6})
    assert machine is not None

    read = {name: read_speed(machine, size) for name, size in LEVELS.items()}
    weights = sum(m.weight.numel() for m in target.modules() if isinstance(m, torch.nn.Linear))
    timed = interleave(steppers, repeats)
    seconds = {name: [each.value for each in of_name] for name, of_name in timed.items()}
    first = next(iter(seconds))
    for row in rows:
        took = seconds[row["rung"]]
        speed = tokens / statistics.median(took)
        gb = row["weight_mb"] * speed / 1e3
        ratio = ratio_interval(seconds[first], took)
        row |= {
            "tokens_per_s": speed,
            "gb_per_s": gb,
            "of_read_speed": gb / read_speed(machine, int(row["weight_mb"] * 1e6)),
            "gflop_per_s": 2 * weights * speed / 1e9,
            "over_first": ratio.median,
            "over_first_low": ratio.low,
            "over_first_high": ratio.high,
        }
    found = {
        "model": model,
        "threads": threads,
        "isa": machine.isa,
        "definitions": DEFINITIONS,
        "read_gb_per_s": read,
        "peak_gflop_per_s": peak(machine),
        "rungs": rows,
        "skipped": skipped,
    }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        draw(found, weights, output / "cpu-ladder.png")
    return found


def refuse(title: str, got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < bound:
        raise WrongResult(f"{title}: logits differ from the torch model's by {error:.2g} of the largest ({bound})")


def stepper(rung: Rung, logits: torch.Tensor, tokens: int) -> Callable[[], float]:
    """Decodes greedily behind what was checked; the seconds that the steps took."""

    def decode() -> float:
        token, spent = int(logits.argmax()), 0.0
        for at in range(CHECKED, CHECKED + tokens):
            began = time.perf_counter()
            following = rung.step(token, at)
            spent += time.perf_counter() - began
            token = int(following.argmax())
        return spent

    return decode


def fused_stepper(model: CppModel, cache: Any, token: int, tokens: int) -> Callable[[], float]:
    def decode() -> float:
        began = time.perf_counter()
        model.generate_plain(cache, 0, [token], tokens, SamplingParams())
        return time.perf_counter() - began

    return decode


def read_speed(model: CppModel, size: int) -> float:
    """GB/s at which the model's threads read so many bytes again and again; the best of five."""
    memory = torch.ones(max(1024, size // 4))
    count = memory.numel()
    repeats = max(1, 200_000_000 // size)
    return max(float(model._engine.read_speed(memory.data_ptr(), count, repeats)) for _ in range(5)) / 1e9


def peak(model: CppModel) -> float:
    """GFLOP/s of float32 products whose weights are in the nearest cache: the roof of arithmetic; the best of five."""
    from engine.kernels.cpp.library import library

    rows, outputs, inputs = 8 * 64, 64 * model.threads, 128
    shape = library().Shape(
        kind=0, outputs=outputs, inputs=inputs, wide=True, pair=False, scale_group=0, zeros=False, factor=False,
        bias=False,
    )  # fmt: skip
    packed = library().Packed(library().Arena(shape.bytes), shape)
    x, y = torch.ones(rows, inputs), torch.empty(rows, outputs)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        model._engine.product(packed, x.data_ptr(), rows, y.data_ptr())
        best = min(best, time.perf_counter() - began)
    return 2 * rows * outputs * inputs / best / 1e9


def draw(found: dict[str, Any], weights: int, file: Path) -> None:
    """The roofline (Williams, Waterman, Patterson 2009): operations per second over operations per byte."""
    with figure(file, 1, 1, (8, 5), f"one token of {found['model']}: {found['threads']} threads") as (axes,):
        places = [0.25 * 2 ** (step / 8) for step in range(41)]
        for name, speed in found["read_gb_per_s"].items():
            roof = [min(speed * place, found["peak_gflop_per_s"]) for place in places]
            axes.plot(places, roof, "--", linewidth=1, label=f"read {name}: {speed:.0f} GB/s")
        axes.axhline(found["peak_gflop_per_s"], color="grey", linewidth=1, label="float32 arithmetic")
        named: list[tuple[float, float]] = []  # in the middle of a label
        for row in sorted(found["rungs"], key=lambda row: -row["gflop_per_s"]):
            intensity, rate = 2 * weights / (row["weight_mb"] * 1e6), row["gflop_per_s"]
            axes.plot(intensity, rate, "o")
            height = rate
            while any(abs(intensity / x - 1) < 0.3 and 0.9 < height / y < 1.1 for x, y in named):
                height /= 1.02
            named.append((intensity, height))
            axes.annotate(row["rung"], (intensity * 1.04, height), fontsize=7, va="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
        axes.set_xlabel("operations per byte of weights")
        axes.set_ylabel("10^9 operations per second")
        axes.legend(fontsize=7)


COLUMNS = ("rung", "tokens_per_s", "weight_mb", "gb_per_s", "of_read_speed", "gflop_per_s", "over_first")


def report(found: dict[str, Any]) -> None:
    """The human table."""
    speeds = ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in found["read_gb_per_s"].items())
    print(f"{found['threads']} threads, {found['isa']}; read speed: {speeds}")
    for title, reason in found["skipped"].items():
        print(f"left out: {title} ({reason})")
    print_table("CPU ladder", COLUMNS, [[row[name] for name in COLUMNS] for row in found["rungs"]])


def main(arguments: list[str]) -> int:
    options = parse_options(LadderOptions, arguments, program="cpu_ladder.py")
    found = run(options.model, options.threads, options.tokens, options.repeats, options.output)
    report(found)
    print_document(found)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
