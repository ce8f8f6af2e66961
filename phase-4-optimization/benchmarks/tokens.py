"""Tokenising 10,000 prompts, many of which come again: one by one or together, looked up or not.

Texts that come for the first time and texts that were there before are timed apart, then all in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np

from common.benchmark import median, refuse_if_different
from common.checkpoint import open_checkpoint
from common.harness import Bench
from common.prompts import load_prompts
from common.tokenizer import Tokenizer
from engine.tokenizer_cache import TokenizerCache

TOKENS = {
    "tokenizer": "us_per_text: wall time per text; speedup: that of `one by one` over this way's, same texts, taking "
    "turns; median of the paired rounds with its bootstrap 95% interval. The prompts are code, from one of its lines "
    "on; rank r is drawn with a chance that goes as 1/r. `first seen`: the first time each comes, the store empty; "
    "`repeated`: the other times, the store full; `all`: in their order. The library remembers words in any case",
    "tokenizer_limit": "hit_share: share of all texts, in their order, that are found in a store of so many KiB",
}
PROMPTS = 10_000
TOGETHER = 64  # texts that a batch holds
Encode = Callable[[list[str]], list[list[int]]]


def prompts(count: int, seed: int) -> list[str]:
    """Texts as a service might see them: few come often, many come once (Zipf's law, with exponent 1)."""
    lines = [prompt.text.splitlines(keepends=True) for prompt in load_prompts("code")]
    texts = list(dict.fromkeys("".join(each[at:]) for each in lines for at in range(len(each))))
    generator = np.random.default_rng(seed)
    generator.shuffle(texts)
    weights = 1 / np.arange(1, len(texts) + 1)
    return [texts[rank] for rank in generator.choice(len(texts), count, p=weights / weights.sum())]


def batches(texts: list[str]) -> list[list[str]]:
    return [texts[at : at + TOGETHER] for at in range(0, len(texts), TOGETHER)]


def one_by_one(encode: Encode) -> Encode:
    return lambda texts: [encode([text])[0] for text in texts]


def together(encode: Encode) -> Encode:
    return lambda texts: [ids for batch in batches(texts) for ids in encode(batch)]


def measure_tokens(lab: Bench) -> None:
    checkpoint = open_checkpoint(lab.options.model)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    every = prompts(PROMPTS // 10 if lab.options.quick else PROMPTS, lab.options.seed)
    first = list(dict.fromkeys(every))
    places = {text: at for at, text in reversed(list(enumerate(every)))}  # where each comes first
    repeated = [text for at, text in enumerate(every) if places[text] < at]
    measure_part(lab, tokenizer, "first seen", first)
    measure_part(lab, tokenizer, "repeated", repeated, known=first)
    measure_part(lab, tokenizer, "all", every)
    measure_limits(lab, tokenizer, every)


def measure_part(lab: Bench, tokenizer: Tokenizer, part: str, texts: list[str], known: list[str] | None = None) -> None:
    """With `known` in the store beforehand, or with a new, empty store in every round."""
    key = {"kind": "tokenizer", "part": part}
    if lab.done(**key, way="cached, together"):
        return
    full = TokenizerCache(tokenizer)
    full.encode(known or [])

    def cached(texts: list[str], how: Callable[[Encode], Encode]) -> list[list[int]]:
        return how((full if known else TokenizerCache(tokenizer)).encode)(texts)

    one, batch = one_by_one(lambda texts: [tokenizer.encode(text) for text in texts]), together(tokenizer.encode_batch)
    runs: dict[str, Callable[[], list[list[int]]]] = {
        "one by one": lambda: one(texts),
        "together": lambda: batch(texts),
        "cached, one by one": lambda: cached(texts, one_by_one),
        "cached, together": lambda: cached(texts, together),
    }
    if not lab.options.dry_run:
        right = list(chain(*runs["one by one"]()))
        for name, run in runs.items():
            refuse_if_different(f"{part}, {name}", right, list(chain(*run())))
    times = lab.times(f"tokenizer, {part}", runs, lab.options.repeats)
    for name, seconds in times.items():
        us = median(seconds) / len(texts) * 1e6
        lab.add(**key, way=name, texts=len(texts), us_per_text=us, **lab.ratio("speedup", times["one by one"], seconds))


def measure_limits(lab: Bench, tokenizer: Tokenizer, every: list[str]) -> None:
    for kib in (64, 256, 1024, 4096):
        if not lab.done(kind="tokenizer_limit", kib=kib):
            cache = TokenizerCache(tokenizer, kib * 1024)
            if not lab.options.dry_run:
                one_by_one(cache.encode)(every)
            found = cache.stats
            lab.add(
                kind="tokenizer_limit",
                kib=kib,
                texts=len(every),
                hit_share=found.hits / len(every),
                evictions=found.evictions,
                entries=found.entries,
            )
