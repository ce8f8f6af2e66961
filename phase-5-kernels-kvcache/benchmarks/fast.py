"""Loops whose steps run in C++: what speculation gives in each number format, on a small model and on a large one.

The baseline is plain decoding by the same kernels in the same format. Greedy drafts must write its tokens, and so must
drafts that share its noise (`coupled`): in C++ a token's bits do not depend on how many are verified together.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common.benchmark import median
from common.checkpoint import open_checkpoint
from common.models.inflate import inflate

from .runs import Lab, Variant

FAST = {
    "format": "of the weights; with the kernels of engine/kernels/cpp",
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
FIXED = (1, 2, 3, 4, 5, 6)


def measure_fast(lab: Lab) -> None:
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
    options: dict[str, Any] = {"kernels": "cpp", "temperature": temperature, **FORMATS[format]}
    if folder is not None:
        options |= {"model": str(folder), "draft": "stdlib-1m"}
    runs: dict[str, Variant] = {"plain": lab.variant("plain", texts, **{**options, "draft": "none"})}
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
