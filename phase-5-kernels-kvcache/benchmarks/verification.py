"""What verification costs: a forward over m new tokens against one over a single token, without a cache and with one.

Without a cache a text of 128 tokens is computed anyway, and m more hardly count. With one, a token costs one token: m
of them cost what the weights' way through memory costs, once, and then arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from common.benchmark import median
from engine.kv_cache import KVOptions
from engine.runner import Runner, make_runner
from engine.tree import Tree

from .runs import Lab

VERIFICATION = {
    "new_tokens": "tokens whose logits one forward gives behind a text of `length` tokens: one, and a draft",
    "ms": "median of the rounds; all sizes take turns",
    "over_one": "the time of m new tokens / of one, by the same runner",
}
NEW = (1, 2, 3, 4, 5, 6, 8, 12, 16)
TEXTS = (128, 512)


def measure_verification(lab: Lab) -> None:
    for length in TEXTS[:1] if lab.options.quick else TEXTS:
        for name in ("off", "static"):
            if not lab.done(kind="verification", cache=name, length=length, new_tokens=NEW[-1]):
                of_cache(lab, name, length)


def of_cache(lab: Lab, name: Any, length: int) -> None:
    runs: dict[str, Any] = {str(m): None for m in NEW}
    if not lab.options.dry_run:
        model = lab.load().model
        generator = torch.Generator().manual_seed(lab.options.seed)
        text = torch.randint(1, model.config.vocab_size, (length + 16,), generator=generator).tolist()
        runner = make_runner(model, KVOptions(name), 1, length + 32)
        runs = {str(m): partial(step, runner, text[:length], text[length : length + m - 1]) for m in NEW}
    times = lab.times(f"{name}, {length} tokens", runs, 5 * lab.options.repeats)
    for m in NEW:
        ratio = lab.ratio("over_one", times[str(m)], times["1"])
        row = {"cache": name, "length": length, "new_tokens": m, "ms": median(times[str(m)]) * 1e3}
        lab.add(kind="verification", **row, **ratio)


def step(runner: Runner, text: list[int], draft: list[int]) -> None:
    runner.step(["text"], [text], [Tree.chain(draft)])
