"""Measures the index of the n-gram drafter: the cost of adding a token and of a lookup, for texts of growing length."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine.drafters import NgramIndex

from .runs import Lab

LOOKUP = {
    "index": "of the n-gram index, in a text of so many tokens: tokens added per second, and look-ups of 4 tokens per "
    "second; speedup: over the shortest text",
}
LENGTHS = (1_000, 10_000, 100_000)
LOOKUPS = 10_000
SHARE = 0.02  # of --budget: the times are short


def measure_ngram(lab: Lab) -> None:
    @cache
    def text(length: int) -> list[int]:
        tokens = [token for prompt in lab.prompts(100) for token in lab.target.tokenizer.encode(prompt.text)]
        return (tokens * (1 + length // len(tokens)))[:length]

    @cache
    def index(length: int) -> NgramIndex:
        made = NgramIndex(1, 3)
        made.extend(text(length))
        return made

    def add(length: int, prompt: Prompt | None, round_: int) -> Outcome:
        """Index the text repeatedly, so that every run adds as many tokens as the longest text has."""
        for _ in range(LENGTHS[-1] // length):
            NgramIndex(1, 3).extend(text(length))
        return Outcome(LENGTHS[-1])

    def look_up(length: int, prompt: Prompt | None, round_: int) -> Outcome:
        found = index(length)
        for _ in range(LOOKUPS):
            found.continuation(4)
        return Outcome(LOOKUPS)

    operations: dict[str, Callable[[int, Prompt | None, int], Outcome]] = {"add a token": add, "look up": look_up}
    for name, run in operations.items():
        runs: dict[str, Variant] = {f"{length} tokens": partial(run, length) for length in LENGTHS}
        lab.within(SHARE).compare("index", {"operation": name}, runs)
