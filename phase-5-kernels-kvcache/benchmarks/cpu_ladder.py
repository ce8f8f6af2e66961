"""The CPU ladder: one decoding step in several versions, against the limits of memory and arithmetic (`--ladder`).

For every rung: tokens per second, bytes of weights read per second, and their share of this machine's read speed, which
is measured with every run. The logits of a rung are compared with the torch model's before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from common.benchmark import Outcome, WrongResult
from common.figures import GREY, figure, look
from common.harness import Variant
from common.prompts import Prompt
from engine import SamplingParams, load
from engine.kernels import cpp
from engine.kernels.cpp import CppModel, default_threads, library
from engine.kernels.cpp.weights import KINDS, Weights
from engine.model import Transformer
from ladder.cpp import RUNGS, Kind, Rung

from .batch import FORMATS, measure_batch
from .fast import LARGE, large_model
from .runs import Lab

LADDER = {
    "ladder": "greedy tokens of one sequence, the steps alone; the baseline is the first rung",
    "machine": "limits of the CPU, the best of five seconds each: reads of memory of a size, float32 products, "
    "the products of one token",
    "gb_per_s": "bytes of matrices read / time",
    "of_bandwidth": "time of the same threads for reading as many bytes repeatedly / measured time",
    "gflop_per_s": "2 x weights x tokens / time",
}
CHECKED = 12  # tokens whose logits are compared with the torch model before a rung is timed
TOKENS = 64  # of a run
LIMIT_SECONDS = 5.0  # for each limit of the CPU: other programs slow a CPU for seconds
# Bounds of the error, relative to the largest logit.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 3e-2}
FUSED: dict[Weights, float] = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-3, "int8": 0.1, "int4": 0.6}
LEVELS = {"L2": 2**20, "L3": 24 * 2**20, "DRAM": 2**29}  # bytes, over all threads
Timed = TypeVar("Timed", float, tuple[float, int])  # seconds; seconds and bytes
Steps = Callable[
    [int], float
]  # decodes a number of tokens after the checked ones, and returns the seconds of the steps


class Models:
    """Inputs of the rungs, created on first use."""

    def __init__(self, lab: Lab, model: str) -> None:
        self.lab, self.name, self.threads = lab, model, lab.options.threads or default_threads()
        self.target = cache(self._target)
        self.machine = cache(lambda: CppModel(self.target(), "float32", self.threads))
        self.text = cache(self._text)

    def _target(self) -> Transformer:
        model = load(self.name, torch.float32, torch.device("cpu")).model
        assert isinstance(model, Transformer)
        return model

    @torch.inference_mode()
    def _text(self) -> tuple[list[int], torch.Tensor]:
        """Return some tokens, and their logits computed by torch."""
        generator = torch.Generator().manual_seed(self.lab.options.seed)
        text = torch.randint(1, self.target().config.vocab_size, (CHECKED,), generator=generator).tolist()
        return text, self.target()(torch.tensor([text]))[0]

    @property
    def weights(self) -> int:
        return sum(m.weight.numel() for m in self.target().modules() if isinstance(m, torch.nn.Linear))

    def rung(self, kind: Kind) -> tuple[Steps, int]:
        rung = Rung(kind, self.target(), CHECKED + TOKENS + 1, 1 if kind is RUNGS[0] else self.threads)
        text, expected = self.text()
        got = torch.stack([rung.step(token, at).clone() for at, token in enumerate(text)])
        refuse_if_off(kind.title, got, expected, BOUNDS[kind.weights])
        first = int(expected[-1].argmax())

        def decode(tokens: int) -> float:
            token, spent = first, 0.0
            for at in range(CHECKED, CHECKED + tokens):
                began = time.perf_counter()
                following = rung.step(token, at)
                spent += time.perf_counter() - began
                token = int(following.argmax())
            return spent

        return decode, rung.weight_bytes

    def fused(self, weights: Weights) -> tuple[Steps, int]:
        """Return the engine's own step, checked, and its bytes of weights."""
        fast, (text, expected) = CppModel(self.target(), weights, self.threads), self.text()
        kept = fast.new_cache(1, CHECKED + TOKENS + 1)
        logits = fast.step(kept, [text], wanted=range(CHECKED)).logits
        assert logits is not None
        refuse_if_off(f"fused step, {weights}", logits, expected, FUSED[weights])
        kept.keep(0, list(range(CHECKED)))
        first = int(logits[-1].argmax())

        def decode(tokens: int) -> float:
            began = time.perf_counter()
            fast.decode([fast.sequence(kept, 0, [first], SamplingParams())], None, [0], tokens)
            return time.perf_counter() - began

        return decode, fast.weight_bytes


def measure_cpu_ladder(lab: Lab) -> None:
    if lab.refused("ladder", cpp.why_not(lab.device)):
        return
    models = Models(lab, lab.options.model)
    cell: dict[str, Any] = {
        "model": lab.options.model, "threads": models.threads, "instruction_set": lab.instruction_set
    }  # fmt: skip
    runs: dict[str, Variant] = {}
    for kind in RUNGS:
        if not lab.options.dry_run and (reason := kind.why_not()) is not None:
            lab.refuse("ladder", cell, kind.title, reason)
        else:
            runs[kind.title] = timed(models, partial(models.rung, kind))
    for weights in FUSED:
        runs[f"fused step, {weights}"] = timed(models, partial(models.fused, weights))
    lab.compare("ladder", cell, runs)

    def limit(variant: str, measure: Callable[[float], Outcome]) -> None:
        lasting = 0.0 if lab.options.quick else LIMIT_SECONDS
        lab.count("machine", cell, variant, None, lambda: measure(lasting))

    for name, size in LEVELS.items():
        limit(f"read {name}", partial(reading, models, size))
    limit("float32 arithmetic", lambda lasting: peak(models.machine(), lasting=lasting))
    for weights in FORMATS:
        limit(f"one token, {weights} in L2", partial(one_token, models, weights))

    rows_of(lab, cell, models)
    if not lab.options.quick:
        with large_model(lab) as folder:
            rows_of(lab, {**cell, "model": LARGE}, Models(lab, str(folder)), ["bfloat16"])


def rows_of(lab: Lab, cell: dict[str, Any], models: Models, formats: Sequence[Weights] = FORMATS) -> None:
    """Measure a model's steps for several rows against the limits of the machine."""

    def limits(name: Weights, size: int) -> tuple[float, float]:
        arithmetic = peak(models.machine(), name if model(name).activations != "float32" else "float32")
        return read_speed(models.machine(), size) * 1e9, arithmetic.figures["gflop"] * 1e9 / arithmetic.seconds

    @cache
    def model(weights: Weights) -> CppModel:
        return CppModel(models.target(), weights, models.threads)

    measure_batch(lab, cell, model, limits, lambda: models.weights, formats)


def timed(models: Models, make: Callable[[], tuple[Steps, int]]) -> Variant:
    made = cache(make)

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        decode, weight_bytes = made()
        seconds, gb = decode(TOKENS), weight_bytes * TOKENS / 1e9
        figures = {"gb": gb, "bandwidth_s": gb / read_speed(models.machine(), weight_bytes)}
        figures |= {"gflop": 2 * models.weights * TOKENS / 1e9, "weight_mb": weight_bytes / 1e6}
        return Outcome(TOKENS, figures, seconds=seconds)

    return run


def refuse_if_off(title: str, got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error < bound:
        raise WrongResult(f"{title}: logits differ from the torch model's by {error:.2g} of the largest ({bound})")


def read_speed(model: CppModel, size: int) -> float:
    """Return the GB/s at which the model's threads read `size` bytes repeatedly; the best of five."""
    memory = torch.ones(max(1024, size // 4))
    repeats = max(1, 200_000_000 // size)
    speeds = [model._engine.read_speed(memory.data_ptr(), memory.numel(), repeats) for _ in range(5)]
    return max(map(float, speeds)) / 1e9


def least(measure: Callable[[], Timed], lasting: float) -> Timed:
    """Return the least time of those that are measured in so many seconds, once at least."""
    until, found = time.monotonic() + lasting, measure()
    while time.monotonic() < until:
        found = min(found, measure())
    return found


def reading(models: Models, size: int, lasting: float) -> Outcome:
    seconds = least(lambda: size / 1e9 / read_speed(models.machine(), size), lasting)
    return Outcome(1, {"gb": size / 1e9}, seconds=seconds)


def product(
    model: CppModel, weights: Weights, rounded: bool, rows: int, outputs: int, inputs: int, repeats: int
) -> tuple[float, int]:
    """Time the product of `rows` tokens with a matrix; return the seconds of the best, and the matrix's bytes."""
    shape = library().Shape(
        kind=KINDS[weights], outputs=outputs, inputs=inputs, wide=not rounded, pair=False,
        scale_group=64 if weights == "int4" else 0, zeros=False, factor=False, bias=False,
    )  # fmt: skip
    packed = library().Packed(library().Arena(shape.bytes), shape)
    x, y = torch.ones(rows, inputs), torch.empty(rows, outputs)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        model._engine.product(packed, x.data_ptr(), rows, y.data_ptr())
        best = min(best, time.perf_counter() - began)
    return best, int(shape.bytes)


def one_token(models: Models, weights: Weights, lasting: float) -> Outcome:
    """Time the products of one token with weights in the L2 cache: its speed if memory took no time.

    The difference of two sizes counts, each at its best, so that the start of the threads does not.
    """
    model = CppModel(models.target(), weights, models.threads)
    rounded, inputs, bits = model.activations != "float32", 512, {"float32": 32, "int8": 8, "int4": 4}.get(weights, 16)
    panels = 6 * 2**20 // (bits * inputs) // 64  # of 64 outputs, 768 KB for each thread

    def of(panels: int) -> tuple[float, int]:
        outputs = 64 * panels * models.threads
        return least(lambda: product(model, weights, rounded, 1, outputs, inputs, 200), lasting / 2)

    (seconds, size), (few_seconds, few) = of(panels), of(1)
    return Outcome(1, {"gb": (size - few) / 1e9}, seconds=seconds - few_seconds)


def peak(model: CppModel, weights: Weights = "float32", lasting: float = 0.0) -> Outcome:
    """Time products with cached weights of a format, the limit of arithmetic; the best of twenty.

    Activations are rounded, but for float32. This is done once for all outputs, so many outputs hide its time.
    """
    rounded = weights != "float32"
    rows, outputs, inputs = 8 * 64, (512 if rounded else 64) * model.threads, 128
    best, _ = least(lambda: product(model, weights, rounded, rows, outputs, inputs, 20), lasting)
    return Outcome(1, {"gflop": 2 * rows * outputs * inputs / 1e9}, seconds=best)


def draw_roofline(lab: Lab, file: Path) -> None:
    """Draw the roofline (Williams, Waterman, Patterson 2009): operations per second over operations per byte."""
    rungs: list[dict[str, Any]] = [line for line in lab.table("ladder") if "gflop_per_s" in line]
    roofs = {line["variant"]: line for line in lab.table("machine")}
    if not rungs or "float32 arithmetic" not in roofs or "gflop_per_s" not in roofs["float32 arithmetic"]:
        return
    arithmetic = roofs.pop("float32 arithmetic")["gflop_per_s"]
    title = f"one token of {rungs[0]['model']}: {rungs[0]['threads']} threads, {rungs[0]['instruction_set']}"
    with figure(file, 1, 1, (9, 5), title + lab.mark) as (axes,):
        intensities = [0.25 * 2 ** (step / 8) for step in range(41)]
        for style, (name, line) in zip(("--", "-.", ":"), roofs.items(), strict=False):
            roof = [min(line["gb_per_s"] * intensity, arithmetic) for intensity in intensities]
            axes.plot(intensities, roof, style, color=GREY, linewidth=1, label=f"{name}: {line['gb_per_s']:.0f} GB/s")
        axes.axhline(arithmetic, color="black", linewidth=1, label="float32 arithmetic")
        for place, line in enumerate(rungs):
            intensity = line["gflop_per_s"] / line["gb_per_s"]
            axes.plot(intensity, line["gflop_per_s"], linestyle="", label=line["variant"], **look(place))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
        axes.set_xlabel("operations per byte of weights")
        axes.set_ylabel("10^9 operations per second")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
