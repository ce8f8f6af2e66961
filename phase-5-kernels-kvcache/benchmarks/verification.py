"""The cost of verification: a forward pass over m new tokens against one new token, with and without a cache.

Without a cache the whole sequence is computed anyway, and m more tokens cost little. With a cache the weights are read
once for all m tokens, and arithmetic grows with m.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine.kv_cache import KVOptions
from engine.runner import ModelRunner, make_runner
from engine.tree import Tree

from .runs import Lab

VERIFICATION = {
    "verification": "one forward with the logits of `variant` new tokens after `length` tokens: one, and a draft; "
    "speedup: of one token's forward over it, so its inverse is the cost of m tokens in single tokens",
}
NEW = (1, 2, 3, 4, 5, 6, 8, 12, 16)
TEXTS = (128, 512)


def measure_verification(lab: Lab) -> None:
    for length in TEXTS[:1] if lab.options.quick else TEXTS:
        for name in ("off", "static"):
            of_cache(lab.short(), name, length)


def of_cache(lab: Lab, name: Any, length: int) -> None:
    @cache
    def made() -> tuple[ModelRunner, list[int]]:
        model = lab.load().model
        generator = torch.Generator().manual_seed(lab.options.seed)
        text = torch.randint(1, model.config.vocab_size, (length + 16,), generator=generator).tolist()
        return make_runner(model, KVOptions(name), 1, length + 32), text

    def forward(m: int) -> Variant:
        def run(prompt: Prompt | None, round_: int) -> Outcome:
            runner, text = made()
            runner.forward(["text"], [text[:length]], [Tree.chain(text[length : length + m - 1])])
            return Outcome(1)

        return run

    lab.compare("verification", {"cache": name, "length": length}, {str(m): forward(m) for m in NEW})
