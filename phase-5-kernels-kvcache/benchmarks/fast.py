"""Loops whose steps run in C++: what speculation gives in each number format, on a small model and on a large one.

The baseline is plain decoding by the same kernels in the same format. Greedy drafts must write its tokens, and so must
drafts that share its noise (`coupled`): in C++ a token's bits do not depend on how many are verified together. The
draft model's weights are int8 throughout. Beside them: plain decoding inside one call, and the time from the start of
the process to the first token.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common.benchmark import median
from common.checkpoint import open_checkpoint
from common.errors import UserError
from common.models.inflate import inflate
from engine import SamplingParams, load
from engine.kernels.cpp import CppModel, default_threads
from engine.kernels.cpp.weights import Weights

from .runs import Lab, Variant

FAST = {
    "format": "of the weights; with the kernels of engine/kernels/cpp; a draft's are int8",
    "loop_per_s": "tokens per second of plain greedy decoding inside one call, 256 tokens",
    "first_token_s": "seconds from the start of generate.py to the first token, kernels built before; median",
    "over_plain": "plain decoding's wall time per token over this one's, taking turns; median of the paired rounds "
    "with its bootstrap 95% interval",
    "equal": "texts whose tokens are those of plain decoding (of `cost, coupled` and of temperature 0)",
}
FORMATS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quant": "int8"},
}
LARGE = "100M inflation"  # of the embedded model: the same function at the cost of a large one
DRAFT = "stdlib-1m"
FIXED = (1, 2, 3, 4, 5, 6)


def measure_fast(lab: Lab) -> None:
    measure_loops(lab)
    measure_cold_start(lab)
    measure_drafters(lab)
    grid = [(lab.options.model, format) for format in FORMATS] + [(LARGE, "bfloat16")]
    missing = [
        (model, format, temperature)
        for model, format in (grid[:1] if lab.options.quick else grid)
        for temperature in (0.0, 1.0)
        if not lab.done(kind="fast", model=model, format=format, temperature=temperature, variant="plain")
    ]
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        if not lab.options.dry_run and any(model == LARGE for model, _, _ in missing):
            inflate(open_checkpoint(lab.options.model).folder, large, layers=12, width=768, ffn_width=3072)
        for model, format, temperature in missing:
            one(lab, model, format, temperature, large if model == LARGE else None)


def one(lab: Lab, model: str, format: str, temperature: float, folder: Path | None) -> None:
    texts = lab.texts()
    options: dict[str, Any] = {"kernels": "cpp", "temperature": temperature, "draft_quant": "int8", **FORMATS[format]}
    if folder is not None:
        options |= {"model": str(folder), "draft": DRAFT}
    runs: dict[str, Variant] = {
        "plain": lab.variant("plain", texts, **{**options, "draft": "none", "draft_quant": "none"})
    }
    ks = FIXED[2:3] if lab.options.quick else FIXED
    for k in ks:
        runs[f"K = {k}"] = lab.variant(f"K = {k}", texts, k=k, **options)
    runs["cost"] = lab.variant("cost", texts, controller="cost", **options)
    if temperature:
        runs["cost, coupled"] = lab.variant("cost, coupled", texts, controller="cost", policy="coupled", **options)
    if not lab.options.dry_run:
        for run in runs.values():
            run()
    same = [name for name in runs if not temperature or name in ("plain", "cost, coupled")]
    for name in same:
        runs[name].same_as = None if name == "plain" else runs["plain"]
    times = lab.times(f"{model}, {format}, temperature {temperature:g}", runs, lab.options.repeats)
    rates = {name: [t / (run.count or 1) for t in times[name]] for name, run in runs.items()}
    for name in reversed(runs):
        lab.add(
            kind="fast",
            model=model,
            format=format,
            temperature=temperature,
            variant=name,
            tokens_per_s=1 / median(rates[name]),
            tokens_per_forward=runs[name].tokens_per_forward,
            equal=f"{len(texts)} of {len(texts)}" if name in same else "",
            **lab.ratio("over_plain", rates["plain"], rates[name]),
        )


def measure_drafters(lab: Lab) -> None:
    """EAGLE and Medusa, whose steps are one call for the draft and one for the target; n-grams, which are no call."""
    for temperature in (0.0, 1.0):
        if lab.done(kind="fast_drafters", temperature=temperature, variant="plain"):
            continue
        options: dict[str, Any] = {"kernels": "cpp", "temperature": temperature}
        runs = {"plain": lab.variant("plain", lab.texts(), draft="none", **options)}
        for name in ("eagle", "medusa", "ngram"):
            runs[f"{name}, cost"] = lab.variant(name, lab.texts(), drafter=name, controller="cost", **options)
        times = lab.times(f"drafters, temperature {temperature:g}", runs, lab.options.repeats)
        rates = {name: [t / (run.count or 1) for t in times[name]] for name, run in runs.items()}
        for name in reversed(runs):
            lab.add(
                kind="fast_drafters",
                format="float32",
                temperature=temperature,
                variant=name,
                tokens_per_s=1 / median(rates[name]),
                tokens_per_forward=runs[name].tokens_per_forward,
                **lab.ratio("over_plain", rates["plain"], rates[name]),
            )


def measure_loops(lab: Lab) -> None:
    """What is left when nothing but the kernels runs."""
    weights: Weights
    for model in (lab.options.model, DRAFT):
        if lab.done(kind="loop", model=model):
            continue
        if lab.options.dry_run:
            lab.add(kind="loop", model=model, format="float32", threads=1, loop_per_s=1.0)
            continue
        loaded = load(model, torch.float32, torch.device("cpu"))
        prompt = loaded.tokenizer.encode(lab.texts()[0])
        for weights in ("float32", "bfloat16", "int8"):
            for threads in range(1, default_threads() + 1):
                fast, taken = CppModel(loaded.model, weights, threads), list[float]()
                cache = fast.new_cache(1, len(prompt) + 256)
                for _ in range(2 * lab.options.repeats):
                    cache.truncate(0, 0)
                    fast.step(cache, [prompt[:-1]], logits=False)
                    cache.keep(0, list(range(len(prompt) - 1)))
                    began = time.perf_counter()
                    fast.generate_plain(cache, 0, prompt[-1:], 256, SamplingParams(max_new_tokens=256))
                    taken.append(time.perf_counter() - began)
                lab.add(kind="loop", model=model, format=weights, threads=threads, loop_per_s=256 / median(taken))


def measure_cold_start(lab: Lab) -> None:
    if lab.done(kind="cold_start"):
        return
    taken = list[float]()
    command = [sys.executable, "generate.py", "--kernels", "cpp", "--prompt", "import ", "--max-tokens", "16"]
    for _ in range(0 if lab.options.dry_run else 2 * lab.options.repeats + 1):
        began = time.perf_counter()
        with subprocess.Popen(
            [*command, "--model", lab.options.model],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            if not process.stdout.read(len("import ") + 1):
                raise UserError("generate.py --kernels cpp gave no token")
            taken.append(time.perf_counter() - began)
            process.communicate()
    lab.add(kind="cold_start", model=lab.options.model, first_token_s=median(taken[1:]) if taken else 1.0)
