"""Measures tokenising 10,000 prompts, many of them repeated: one by one or in batches, with or without the cache.

New texts and repeated texts are timed separately, then all in their order.

    python bench.py --only tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import chain

import numpy as np

from common.benchmark import Outcome
from common.checkpoint import open_checkpoint
from common.prompts import Prompt
from common.tokenizer import Tokenizer
from engine.tokenizer_cache import TokenizerCache

from .runs import Lab

TOKENS = {
    "tokenizer": "ms_per_token: milliseconds per text (what is counted here are texts, not tokens); speedup: over `one "
    "by one`. The texts are the prompts, from one of their lines on; rank r is drawn with a chance that goes as 1/r. "
    "`first seen`: the first time each comes, the store empty; `repeated`: the other times, the store full; `all`: in "
    "their order. The library remembers words in any case",
    "tokenizer_limit": "hit_share: share of all texts, in their order, that are found in a store of so many KiB",
}
TEXTS = 10_000
TOGETHER = 64  # texts in a batch
ROUNDS = 5  # the least that give an interval
Encode = Callable[[list[str]], list[list[int]]]


def draw(sources: list[Prompt], count: int, seed: int) -> list[str]:
    """Draw texts as a service might see them: few often, many once (Zipf's law, with exponent 1)."""
    lines = [prompt.text.splitlines(keepends=True) for prompt in sources]
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


def measure_tokens(lab: Lab) -> None:
    checkpoint = open_checkpoint(lab.options.model)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    sources = lab.options.own_prompts or lab.options.load_prompts("calibrate") + lab.options.load_prompts("test")
    every = draw(sources, TEXTS // 10 if lab.options.quick else TEXTS, lab.options.seed)
    first = list(dict.fromkeys(every))
    first_at = {text: at for at, text in reversed(list(enumerate(every)))}
    repeated = [text for at, text in enumerate(every) if first_at[text] < at]
    measure_part(lab, tokenizer, "first seen", first)
    measure_part(lab, tokenizer, "repeated", repeated, cached_before=first)
    measure_part(lab, tokenizer, "all", every)
    for kib in (64, 256, 1024, 4096):
        lab.count("tokenizer_limit", {}, f"{kib} KiB", None, partial(looked_up, tokenizer, kib, every))


def measure_part(
    lab: Lab, tokenizer: Tokenizer, part: str, texts: list[str], cached_before: list[str] | None = None
) -> None:
    """Time with a cache that holds `cached_before`, or with a new, empty cache in every round."""
    full = TokenizerCache(tokenizer)
    full.encode(cached_before or [])
    plain, batch = (
        one_by_one(lambda texts: [tokenizer.encode(text) for text in texts]),
        together(tokenizer.encode_batch),
    )

    def cached(how: Callable[[Encode], Encode]) -> Encode:
        return lambda texts: how((full if cached_before else TokenizerCache(tokenizer)).encode)(texts)

    def timed(encode: Encode, prompt: Prompt | None, round_: int) -> Outcome:
        began = time.perf_counter()
        ids = encode(texts)
        seconds = time.perf_counter() - began
        return Outcome(len(texts), output=list(chain(*ids)), seconds=seconds)

    encoders = {"one by one": plain, "together": batch}
    encoders |= {"cached one by one": cached(one_by_one), "cached together": cached(together)}
    runs = {name: partial(timed, encode) for name, encode in encoders.items()}
    lab.with_rounds(ROUNDS).compare("tokenizer", {"part": part}, runs, exact=list(runs)[1:])


def looked_up(tokenizer: Tokenizer, kib: int, texts: list[str]) -> Outcome:
    """Count the hits of a cache of limited size."""
    cache = TokenizerCache(tokenizer, kib * 1024)
    one_by_one(cache.encode)(texts)
    found = cache.stats
    return Outcome(len(texts), {"hits": found.hits, "evictions": found.evictions, "entries": found.entries})
