"""What a cache in fewer bits costs: perplexity of held-out text whose keys and values are read from it.

Windows of 512 tokens are fed in pieces of 32, so that all but a piece's own tokens were stored and read again; the
second half of each window counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from common.benchmark import progress
from common.models.corpus import read_corpus
from engine.kv_cache import KVOptions
from engine.runner import NO_DRAFT, CachedRunner, make_runner

from .runs import Lab

QUALITY = {
    "kv_dtype": "format in which keys and values are kept; the weights are float32",
    "perplexity": "of held-out tokens that are the second half of windows of 512",
    "loss": "perplexity over that with a float32 cache, less 1",
}
FORMATS = ("float32", "float16", "bfloat16", "int8")
WINDOW, PIECE = 512, 32


def measure_quality(lab: Lab) -> None:
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
