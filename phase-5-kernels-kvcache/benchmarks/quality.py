"""The cost of fewer bits in perplexity of held-out text: in the cache, and in the C++ kernels.

The second half of each window of 512 tokens counts. For caches, a window is computed in pieces of 32 tokens, so that
each piece reads the earlier ones from the cache. A row is a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from common.benchmark import Outcome, progress
from common.errors import UserError
from common.models.corpus import read_corpus
from engine.kernels import registry
from engine.kernels.cpp import CppModel
from engine.kernels.cpp.weights import Weights
from engine.kv_cache import KVOptions
from engine.runner import CachedRunner, make_runner

from .runs import Lab

QUALITY = {
    "quality": "perplexity of held-out text by the format of cached keys and values; the weights are float32",
    "quality_cpp": "likewise, by the formats of matrices (int4: groups of 64, nearest) and of activations in "
    "the C++ kernels; sums are float32, of int8 integers",
    "nll": "mean of -ln of the probability of the tokens that are the second half of windows of 512",
    "nll_more": "nll, less that of float32 on the same tokens; small values are the relative change of the perplexity",
}
FORMATS = ("float32", "float16", "bfloat16", "int8")
WINDOW, PIECE = 512, 32
PRODUCTS: dict[str, tuple[Weights, bool]] = {  # weights; True: activations stay float32
    "float32": ("float32", True),
    "float16": ("float16", True),
    "bfloat16": ("bfloat16", True),
    "bfloat16, bfloat16 activations": ("bfloat16", False),
    "int8": ("int8", True),
    "int8, int8 activations": ("int8", False),
    "int4, int8 activations": ("int4", False),
}
Judge = Callable[[Tensor], Tensor]  # a window -> the logits that predict its second half


def measure_quality(lab: Lab) -> None:
    windows = [torch.zeros(1, dtype=torch.int64)] if lab.options.dry_run else heldout(lab)
    by_window(lab, "quality", {}, {name: of_cache(lab, name) for name in FORMATS}, windows)
    if lab.refused("quality_cpp", registry.why_not("cpp", lab.device)):
        return
    judges = {name: of_products(lab, *product) for name, product in PRODUCTS.items()}
    if not lab.options.dry_run and CppModel(lab.load().model, "bfloat16", 1).activations != "bfloat16":
        judges.pop("bfloat16, bfloat16 activations")  # the processor has no such dot product
    by_window(lab, "quality_cpp", {"instruction_set": lab.instruction_set}, judges, windows)


def by_window(
    lab: Lab, section: str, cell: dict[str, Any], judges: Mapping[str, Judge], windows: Sequence[Tensor]
) -> None:
    """Measure every judge on every window; the others are compared with the first judge."""
    first = next(iter(judges))

    def exact(number: int) -> float:
        name = f"window {number}"
        rows = (row for row in lab.rows(section) if row.variant == first and row.prompt == name and row.cell == cell)
        found = next((float(row.figures["nll_sum"]) for row in rows if row.status == "ok"), None)
        if found is None:
            raise UserError(f"{first} has no figure for {name}, so nothing can be compared with it")
        return found

    def one(name: str, number: int) -> Outcome:
        after = windows[number][WINDOW // 2 :]
        total = float(torch.nn.functional.cross_entropy(judges[name](windows[number]), after, reduction="sum"))
        more = 0.0 if name == first else total - exact(number)
        return Outcome(len(after), {"nll_sum": total, "nll_more_sum": more})

    with progress(section, len(judges) * len(windows)) as show:
        for name in judges:
            for number in range(len(windows)):
                lab.count(section, cell, name, f"window {number}", partial(one, name, number))
                show(name)


def of_products(lab: Lab, weights: Weights, exact_activations: bool) -> Judge:
    """Return a judge by C++ kernels. Weights are rounded to nearest; calibrated int4 (phase 4) loses less."""

    @cache
    def model() -> CppModel:
        return CppModel(lab.load().model, weights, lab.options.threads, exact_activations=exact_activations)

    def judge(window: Tensor) -> Tensor:
        kept = model().new_cache(1, WINDOW)
        logits = model().step(kept, [window.tolist()], wanted=range(WINDOW // 2 - 1, WINDOW - 1)).logits
        assert logits is not None
        return logits

    return judge


def of_cache(lab: Lab, name: Any) -> Judge:
    @torch.inference_mode()
    def judge(window: Tensor) -> Tensor:
        model = lab.load().model
        runner = make_runner(model, KVOptions("static", name), 1, WINDOW)
        assert isinstance(runner, CachedRunner)
        hidden = [fed(runner, window[: at + PIECE].tolist()) for at in range(0, WINDOW, PIECE)]
        return model.logits(torch.cat(hidden)[WINDOW // 2 - 1 : -1]).float()

    return judge


def heldout(lab: Lab) -> list[Tensor]:
    """Return windows of held-out text, with `--tokens` tokens in their second halves."""
    tokenizer, stream = lab.load().tokenizer, list[int]()
    for file in read_corpus("heldout"):
        stream += tokenizer.encode(file.text)
        if len(stream) > 2 * lab.options.tokens:
            break
    count = max(1, min(2 * lab.options.tokens // WINDOW, len(stream) // WINDOW))
    return list(torch.tensor(stream[: count * WINDOW]).view(count, WINDOW))


def fed(runner: CachedRunner, text: list[int]) -> Tensor:
    """Return the hidden states of the last piece, computed in one step."""
    runner.max_inline = PIECE
    held = len(text) - PIECE
    return runner.forward(["window"], [text], states_from=[held]).states_of(0, [], 0)
