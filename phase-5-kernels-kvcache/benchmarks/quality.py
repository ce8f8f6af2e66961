"""What fewer bits cost in perplexity of held-out text: in a cache, and in what the C++ kernels multiply.

The second half of each window of 512 tokens counts. For the caches, windows are fed in pieces of 32, so that all but a
piece's own tokens were stored and read again.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from common.benchmark import progress
from common.models.corpus import read_corpus
from engine.kernels import registry
from engine.kernels.cpp import CppModel
from engine.kernels.cpp.weights import Weights
from engine.kv_cache import KVOptions
from engine.runner import NO_DRAFT, CachedRunner, make_runner

from .runs import Lab

QUALITY = {
    "kv_dtype": "format in which keys and values are kept; the weights are float32",
    "perplexity": "of held-out tokens that are the second half of windows of 512",
    "loss": "perplexity over that with a float32 cache, less 1; of quality_cpp: over float32 in both",
    "weights": "format of the matrices, in the C++ kernels; int4 in groups of 64, nearest",
    "activations": "format in which activations meet them; sums are float32, of int8 whole numbers",
}
FORMATS = ("float32", "float16", "bfloat16", "int8")
WINDOW, PIECE = 512, 32
PRODUCTS: tuple[tuple[Weights, bool | None], ...] = (  # weights, whether activations stay float32
    ("float32", None),
    ("float16", None),
    ("bfloat16", True),
    ("bfloat16", False),
    ("int8", True),
    ("int8", False),
    ("int4", False),
)


def measure_quality(lab: Lab) -> None:
    of_caches(lab)
    of_products(lab)


def of_products(lab: Lab) -> None:
    """Quantised to the nearest level: a calibrated int4 (phase 4) loses less."""
    if lab.done(kind="quality_cpp"):
        return
    if lab.options.dry_run:
        lab.add(kind="quality_cpp", weights="float32", activations="float32", tokens=1, perplexity=1.0, loss=0.0)
        return
    if (reason := registry.why_not("cpp", lab.device)) is not None:
        print(f"note: the C++ kernels' perplexity is left out: {reason}", file=sys.stderr)
        return
    windows, exact = heldout(lab), math.nan
    for weights, exact_activations in PRODUCTS:
        model = CppModel(lab.load().model, weights, lab.options.threads, exact_activations=exact_activations)
        if weights == "bfloat16" and exact_activations is False and model.activations != "bfloat16":
            continue  # the processor has no such dot product
        cache, total = model.new_cache(1, WINDOW), 0.0
        with progress(f"perplexity, {weights}, {model.activations}", len(windows)) as show:
            for window in windows:
                logits = model.step(cache, [window.tolist()], wanted=range(WINDOW // 2 - 1, WINDOW - 1)).logits
                assert logits is not None
                total += float(torch.nn.functional.cross_entropy(logits, window[WINDOW // 2 :]))
                show("")
        nll = total / len(windows)
        exact = nll if weights == "float32" else exact
        lab.add(
            kind="quality_cpp",
            weights=weights,
            activations=model.activations,
            tokens=len(windows) * WINDOW // 2,
            perplexity=math.exp(nll),
            loss=math.exp(nll - exact) - 1,
        )


def of_caches(lab: Lab) -> None:
    wanted = [name for name in FORMATS if not lab.done(kind="quality", kv_dtype=name)]
    if not wanted:
        return
    if lab.options.dry_run:
        for name in wanted:
            lab.add(kind="quality", kv_dtype=name, tokens=1, perplexity=1.0, loss=0.0)
        return
    windows = heldout(lab)
    found: dict[str, float] = {row["kv_dtype"]: math.log(row["perplexity"]) for row in lab.rows("quality")}
    for name in wanted:
        found[name] = mean_nll(lab, windows, name)
        row = {"tokens": len(windows) * WINDOW // 2, "perplexity": math.exp(found[name])}
        lab.add(kind="quality", kv_dtype=name, **row, loss=math.exp(found[name] - found["float32"]) - 1)


def heldout(lab: Lab) -> torch.Tensor:
    tokenizer, stream = lab.load().tokenizer, list[int]()
    for file in read_corpus("heldout"):
        stream += tokenizer.encode(file.text)
        if len(stream) > 2 * lab.options.tokens:
            break
    count = max(1, min(2 * lab.options.tokens // WINDOW, len(stream) // WINDOW))
    return torch.tensor(stream[: count * WINDOW]).view(count, WINDOW)


@torch.inference_mode()
def mean_nll(lab: Lab, windows: torch.Tensor, name: Any) -> float:
    model, total = lab.load().model, 0.0
    with progress(f"perplexity, {name}", len(windows)) as show:
        for window in windows:
            runner = make_runner(model, KVOptions("static", name), 1, WINDOW)
            assert isinstance(runner, CachedRunner)
            hidden = [fed(runner, window[: at + PIECE].tolist()) for at in range(0, WINDOW, PIECE)]
            logits = model.logits(torch.cat(hidden)[WINDOW // 2 - 1 : -1]).float()
            total += float(torch.nn.functional.cross_entropy(logits, window[WINDOW // 2 :]))
            show("")
    return total / len(windows)


def fed(runner: CachedRunner, text: list[int]) -> torch.Tensor:
    """The hidden states of the last piece, which goes along with one step."""
    runner.together = PIECE
    held = len(text) - PIECE
    return runner.step(["window"], [text], [NO_DRAFT], known=[held]).states_of(0, [], 0)
