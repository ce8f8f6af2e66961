"""Models of real sizes on a CPU, against llama.cpp on the same weights (part of `--peers`).

Weights are random: speed does not depend on them. Both engines hold keys and values in float16. llama.cpp is the
package as built, with its default options, at its fastest thread count; its own quantiser makes q8_0 and q4_0. A rate
of arithmetic is reported with that of float32 products from cached memory, a rate of bytes with the read speed of
memory, measured before each run by the same threads.

    python bench.py --peers --output results
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from common.benchmark import Outcome, WrongResult
from common.harness import Variant
from common.prompts import Prompt
from common.random_checkpoint import random_checkpoint
from engine import SamplingParams, load
from engine.config import ModelConfig
from engine.kernels.cpp import CppModel, default_threads
from engine.kernels.cpp.weights import Weights

from . import llama_cpp
from .cpu_ladder import peak, read_speed
from .runs import Lab

SIZES = {
    "sizes": "work: prefill of 512 tokens in one call, or greedy tokens one by one after 64 tokens",
    "of_roofline": "time at the rate of float32 products from cached memory / measured time",
    "machine_gflop_per_s": "rate of float32 products from cached memory, measured before each run",
    "machine_gb_per_s": "read speed of memory, measured before each run",
}
SHAPES = ("tinyllama-1.1b", "qwen3-0.6b")
WORK = ("decode", "prefill")
PROMPT, HELD, STEPS, CHECKED = 512, 64, 16, 16
DRAM = 2**29  # bytes that are read to measure the read speed
# Bits per weight -> formats of llama.cpp, whose first is the baseline, and ours.
FORMATS: dict[int, tuple[tuple[llama_cpp.Format, ...], Weights]] = {
    16: (("f16", "bf16"), "bfloat16"),
    8: (("q8_0",), "int8"),
    4: (("q4_0",), "int4"),
}
# Bounds of the difference from the float32 torch model's logits, relative to the largest logit.
BOUNDS = {"f16": 3e-2, "bf16": 5e-2, "bfloat16": 3e-2, "q8_0": 0.2, "int8": 0.2, "q4_0": 0.8, "int4": 0.8}


@dataclass
class Timed:
    """A loaded model of one engine."""

    logits: Callable[[list[int]], torch.Tensor]  # tokens -> logits of the last one
    prefill: Callable[[list[int]], float]  # tokens -> seconds
    decode: Callable[[int], float]  # steps after the cached tokens -> seconds
    gb: float  # of matrices that a step reads
    note: str


class Size:
    """One shape: its weights in a temporary folder, in the formats of both engines. All is created on first use."""

    def __init__(self, lab: Lab, shape: str, stack: ExitStack) -> None:
        self.lab = lab
        self.threads = lab.options.threads or default_threads()
        self.folder = cache(lambda: stack.enter_context(random_checkpoint(shape, "bfloat16")))
        self.files = cache(lambda: Path(stack.enter_context(tempfile.TemporaryDirectory())))
        self.loaded = cache(lambda: load(str(self.folder()), torch.bfloat16, torch.device("cpu"), as_stored=True))
        self.machine = cache(self._machine)
        self.expected = cache(self._expected)

    @property
    def config(self) -> ModelConfig:
        return self.loaded().config

    def tokens(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.lab.options.seed)
        found: list[int] = torch.randint(1, self.config.vocab_size, (count,), generator=generator).tolist()
        return found

    def _machine(self) -> CppModel:
        small = load("stdlib-1m", torch.float32, torch.device("cpu")).model
        return CppModel(small, "float32", self.threads)

    @torch.inference_mode()
    def _expected(self) -> torch.Tensor:
        model = load(str(self.folder()), torch.float32, torch.device("cpu")).model
        logits: torch.Tensor = model(torch.tensor([self.tokens(CHECKED)]))[0, -1]
        return logits

    def gguf(self, format: llama_cpp.Format) -> Path:
        file = self.files() / f"{format}.gguf"
        if file.is_file():
            return file
        if format in ("q8_0", "q4_0"):
            llama_cpp.quantize_gguf(self.gguf("bf16"), file, format)
        else:
            llama_cpp.write_gguf(self.folder(), self.config, file, format)
        return file

    def ours(self, weights: Weights) -> Timed:
        fast = CppModel(self.loaded().model, weights, self.threads)
        kept = fast.new_cache(1, PROMPT + STEPS + 1, torch.float16)

        def logits(tokens: list[int]) -> torch.Tensor:
            kept.truncate(0, 0)
            found = fast.step(kept, [tokens]).logits
            assert found is not None
            kept.keep(0, list(range(len(tokens))))
            return found[-1]

        def prefill(tokens: list[int]) -> float:
            began = time.perf_counter()
            logits(tokens)
            return time.perf_counter() - began

        def decode(steps: int) -> float:
            began = time.perf_counter()
            fast.decode([fast.sequence(kept, 0, [7], SamplingParams())], None, [0], steps)
            return time.perf_counter() - began

        return Timed(logits, prefill, decode, fast.weight_bytes / 1e9, f"{self.threads} threads")

    def llama(self, format: llama_cpp.Format, stack: ExitStack) -> Timed:
        config, file = self.config, self.gguf(format)
        repack = llama_cpp.repacks(file, config.vocab_size)
        made = llama_cpp.LlamaCpp(file, config.vocab_size, PROMPT + HELD, default_threads(), repack)
        stack.callback(made.close)
        best = made.use_best_threads(4)

        def logits(tokens: list[int]) -> torch.Tensor:
            made.cut(0)
            made.decode(tokens)
            return torch.from_numpy(made.logits())[-1]

        def prefill(tokens: list[int]) -> float:
            made.cut(0)
            began = time.perf_counter()
            made.decode(tokens)
            made.wait()
            return time.perf_counter() - began

        table = 0 if config.tied else llama_cpp.table_bytes(file)  # of an untied embedding a step reads one row
        gb = (file.stat().st_size - table) / 1e9
        note = f"{best} threads" + ("" if repack else "; weights not repacked: its own kernels crash on this machine")
        return Timed(logits, prefill, lambda steps: steps * made.time_steps(1, steps), gb, note)

    def timed(self, name: str, make: Callable[[], Timed], work: str) -> Variant:
        """Return a variant. WrongResult if its logits differ from the float32 torch model's."""
        bound = BOUNDS[name.split()[-1]]
        prompt_tokens = 64 if self.lab.options.quick else PROMPT

        def run(prompt: Prompt | None, round_: int) -> Outcome:
            engine, expected = make(), self.expected()
            off = float((engine.logits(self.tokens(CHECKED)) - expected).abs().max() / expected.abs().max())
            if not off < bound:
                raise WrongResult(f"{name}: logits differ by {off:.2g} of the largest: not the same model")
            if work == "prefill":
                arithmetic = peak(self.machine())
                rate = arithmetic.figures["gflop"] / arithmetic.seconds
                gflop = 2 * self.products(prompt_tokens) / 1e9
                seconds = engine.prefill(self.tokens(prompt_tokens))
                figures = {"gflop": gflop, "roofline_s": gflop / rate, "machine_gflop_per_s": rate}
                return Outcome(prompt_tokens, {**figures, "logits": off, "note": engine.note}, seconds=seconds)
            engine.logits(self.tokens(HELD))
            read = read_speed(self.machine(), DRAM)
            seconds, gb = engine.decode(STEPS), engine.gb * STEPS
            figures = {"gb": gb, "bandwidth_s": gb / read, "machine_gb_per_s": read}
            return Outcome(STEPS, {**figures, "logits": off, "note": engine.note}, seconds=seconds)

        return run

    def products(self, tokens: int) -> float:
        """Count the multiplications with weights that a prefill makes; the output matrix multiplies one token."""
        linear = [m.weight.numel() for m in self.loaded().model.modules() if isinstance(m, torch.nn.Linear)]
        head = self.config.vocab_size * self.config.width
        return (sum(linear) - head) * tokens + head


def measure_sizes(lab: Lab) -> None:
    """Compare decoding and prefill. The models of one format are in memory together, and freed before the next."""
    for shape in ("100m",) if lab.options.quick else SHAPES:
        with ExitStack() as of_shape:
            size = Size(lab, shape, of_shape)
            for bits in FORMATS:
                with ExitStack() as of_format:
                    of_bits(size, f"random-{shape}", bits, of_format)


def of_bits(size: Size, model: str, bits: int, stack: ExitStack) -> None:
    makers: dict[str, Callable[[], Timed]] = {}
    reason = None if size.lab.options.dry_run else llama_cpp.why_not()
    theirs, ours = FORMATS[bits]
    for format in theirs:
        if reason is None:
            makers[f"llama.cpp {format}"] = cache(partial(size.llama, format, stack))
        else:
            size.lab.refuse("sizes", {"model": model, "bits": bits}, f"llama.cpp {format}", reason)
    makers[f"ours {ours}"] = cache(partial(size.ours, ours))
    for work in WORK:
        runs = {name: size.timed(name, make, work) for name, make in makers.items()}
        size.lab.compare("sizes", {"model": model, "bits": bits, "work": work}, runs)
