"""Speculative decoding with C++ steps in each number format, on a small and a large model.

The baseline is plain decoding by the same kernels in the same format. Greedy and `coupled` speculation must give its
tokens: in C++ a token's bits do not depend on how many are verified in one forward pass. The draft model's weights are
always int8. Also measured: plain decoding inside one call, and the time from the start of the process to the first
token.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from common.benchmark import Outcome
from common.checkpoint import open_checkpoint
from common.errors import UserError
from common.harness import Variant
from common.models.inflate import inflate
from common.prompts import Prompt
from engine import SamplingParams, load
from engine.kernels import cpp
from engine.kernels.cpp import CppModel, default_threads
from engine.kernels.cpp.weights import Weights

from .runs import Decoder, Lab, sharing

FAST = {
    "fast": "speculative against plain decoding, both with C++ steps; format: of the target's weights, the draft's are "
    "int8; best K: the draft length that was fastest on the calibrate half (fast_k)",
    "fast_k": "fixed draft lengths on the calibrate half, from which `best K` is chosen",
    "fast_drafters": "other drafters, with C++ steps",
    "loop": "plain greedy decoding of 256 tokens inside one C++ call, by format and threads",
    "cold_start": "from the start of generate.py to its first token, with compiled kernels",
}
LARGE = "100M inflation"  # the embedded model's function at the cost of a large model
DRAFT = "stdlib-1m"
CALIBRATE = 12  # prompts for choosing K
LOOP_TOKENS = 256


def measure_fast(lab: Lab) -> None:
    if lab.refused("fast", cpp.why_not(lab.device)):
        return
    for format in lab.options.formats:
        for temperature in lab.options.temperatures:
            of_format(lab, lab.options.model, format, temperature, {})
    for temperature in lab.options.temperatures:
        of_drafters(lab, temperature)
    measure_loops(lab)
    if not lab.options.quick:
        of_large(lab.one_round())
        measure_cold_start(lab)


def of_large(lab: Lab) -> None:
    with large_model(lab) as folder:
        draft = DRAFT if lab.options.draft == "auto" else lab.options.draft
        for temperature in lab.options.temperatures:
            of_format(lab, LARGE, "bfloat16", temperature, {"model": str(folder), "draft": draft})


@contextmanager
def large_model(lab: Lab) -> Iterator[Path]:
    """Write the large model to a temporary folder; a dry run writes nothing."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "large"
        if not lab.options.dry_run:
            inflate(open_checkpoint(lab.options.model).folder, folder, layers=12, width=768, ffn_width=3072)
        yield folder


def of_format(lab: Lab, model: str, format: str, temperature: float, wanted: dict[str, Any]) -> None:
    """Measure one cell: choose K on the calibrate half, and time it and the controller on the test half."""
    cell: dict[str, Any] = {
        "model": model, "format": format, "temperature": temperature, "instruction_set": lab.instruction_set
    }  # fmt: skip
    options = {"kernels": "cpp", "temperature": temperature, **number_format(format), **wanted}
    llm = cache(lambda: lab.llm(**{**options, "draft": "none"}))
    draft = {"draft": wanted.get("draft", lab.options.draft), "draft_quant": "int8"}

    def drafting(figures: dict[str, int] | None = None, **how: Any) -> Variant:
        return Decoder(partial(sharing, llm, **draft, **how), figures)

    fixed = {f"K = {k}": drafting({"k": k}, k=k) for k in lab.options.k}
    plain = Decoder(llm)
    # In C++ a token's bits do not depend on the batch, so tokens are equal in every format.
    exact = [] if temperature else [*fixed, "best K", "cost"]
    once = lab.with_options(rounds=lab.options.rounds or 1)
    once.compare("fast_k", cell, {"plain": plain, **fixed}, lab.prompts(CALIBRATE, "calibrate"), exact=exact)
    runs: dict[str, Variant] = {
        "plain": plain,
        "best K": fixed[fastest(lab, cell)],
        "cost": drafting(controller="cost"),
    }
    if temperature:
        runs["cost, coupled"] = drafting(controller="cost", policy="coupled")
    lab.compare("fast", cell, runs, lab.prompts(), exact=[*exact, "cost, coupled"])


def number_format(format: str) -> dict[str, str]:
    return {"dtype": "float32", "quant": format} if format.startswith("int") else {"dtype": format}


def fastest(lab: Lab, cell: dict[str, Any]) -> str:
    """Return the fixed K with the best ratio on the calibrate half. UserError if none ran."""
    lines = [line for line in lab.table("fast_k") if all(line[name] == value for name, value in cell.items())]
    ratios = {line["variant"]: line["speedup"] for line in lines if "K" in line["variant"] and "speedup" in line}
    if not ratios:
        raise UserError(f"no draft length could be timed: {next((x['reason'] for x in lines if 'reason' in x), cell)}")
    return str(max(ratios, key=lambda name: float(ratios[name])))


def of_drafters(lab: Lab, temperature: float) -> None:
    """Measure n-grams, EAGLE and Medusa; the heads are int8, as the draft model is."""
    llm = cache(lambda: lab.llm(draft="none", kernels="cpp", temperature=temperature))
    runs: dict[str, Variant] = {"plain": Decoder(llm)}
    for drafter in lab.options.drafters:
        if drafter != "model":
            quant = "int8" if drafter in ("medusa", "eagle") else "none"
            how = {"draft": "auto", "drafter": drafter, "draft_quant": quant, "controller": "cost"}
            runs[f"{drafter}, cost"] = Decoder(partial(sharing, llm, **how))
    cell: dict[str, Any] = {"temperature": temperature, "instruction_set": lab.instruction_set}
    lab.compare("fast_drafters", cell, runs, lab.prompts(), exact=[] if temperature else list(runs))


def measure_loops(lab: Lab) -> None:
    """Measure plain decoding with nothing but the kernels."""
    formats: tuple[Weights, ...] = ("float32", "bfloat16", "int8")
    for model in dict.fromkeys((lab.options.model, DRAFT)):
        loaded = cache(lambda name=model: load(name, torch.float32, torch.device("cpu")))
        runs: dict[str, Variant] = {}
        for weights in formats:
            for threads in range(1, default_threads() + 1):
                runs[f"{weights}, {threads} thread{'s' * (threads > 1)}"] = loop(loaded, weights, threads)
        cell = {"model": model, "instruction_set": lab.instruction_set}
        lab.short().compare("loop", cell, runs, lab.prompts(1))


def loop(loaded: Any, weights: Weights, threads: int) -> Variant:
    fast = cache(lambda: CppModel(loaded().model, weights, threads))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        tokens = loaded().tokenizer.encode(prompt.text)
        kept = fast().new_cache(1, len(tokens) + LOOP_TOKENS)
        if len(tokens) > 1:
            fast().step(kept, [tokens[:-1]], logits=False)
            kept.keep(0, list(range(len(tokens) - 1)))
        began = time.perf_counter()
        fast().decode([fast().sequence(kept, 0, tokens[-1:], SamplingParams())], None, [0], LOOP_TOKENS)
        return Outcome(LOOP_TOKENS, seconds=time.perf_counter() - began)

    return run


def measure_cold_start(lab: Lab) -> None:
    """Measure the start with C++ kernels, and with torch alone."""
    cell = {"model": lab.options.model, "instruction_set": lab.instruction_set}
    lab.compare("cold_start", cell, {name: first_token(lab.options.model, name) for name in ("cpp", "torch")})


def first_token(model: str, kernels: str) -> Variant:
    text = "from pathlib import"
    command = [sys.executable, "generate.py", "--kernels", kernels, "--prompt", text, "--max-tokens", "16"]

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        began = time.perf_counter()
        with subprocess.Popen(
            [*command, "--model", model],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            if not process.stdout.read(1):
                raise UserError(f"generate.py --kernels {kernels} gave no token")
            seconds = time.perf_counter() - began
            process.communicate()
        return Outcome(1, seconds=seconds)

    return run
