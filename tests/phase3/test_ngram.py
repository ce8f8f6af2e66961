"""Prompt lookup: the longest suffix wins, and the cost of a lookup does not grow with the text."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import phase3
from common.errors import UserError
from phase3 import NgramDrafter, NgramIndex, SamplingParams, Sequence


def search(text: list[int], low: int, high: int, count: int) -> list[int]:
    """Search the expected continuation: it follows the last earlier occurrence of the longest suffix that has one."""
    for size in range(min(high, len(text)), low - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                return text[end : end + count]
    return []


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    low=st.integers(1, 5),
    more=st.integers(0, 4),
    count=st.integers(0, 6),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
)
def test_the_index_finds_what_a_search_finds(text: list[int], low: int, more: int, count: int, cuts: list[int]) -> None:
    """The text may be added in one piece or several, with lookups in between or without."""
    index = NgramIndex(low, low + more)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        index.extend(text[start:end])
        assert index.continuation(count) == search(text[:end], low, low + more, count)


@pytest.mark.about("engine/drafters/ngram.py, NgramIndex.continuation")
def test_the_longest_suffix_wins_and_of_equals_the_last() -> None:
    index = NgramIndex(1, 3)
    index.extend([1, 2, 3, 7, 9, 3, 8, 1, 2, 3])
    assert index.continuation(2) == [7, 9]  # 1 2 3, not the later 3
    assert NgramDrafter(1, 1).propose(
        [Sequence(index.text, SamplingParams(), phase3.Ending())], [2]
    ).tokens.tolist() == [[8, 1]]
    index.extend([5, 2, 3])
    assert index.continuation(1) == [5]  # 2 3 followed by 7 first, by 5 last
    index.extend([6])
    assert index.continuation(3) == []


def test_a_drafter_keeps_its_sequences_apart() -> None:
    """Two sequences with the same beginning in one batch, and a third one later."""
    params, ending = SamplingParams(max_new_tokens=50), phase3.Ending()
    drafter = NgramDrafter(1, 3)
    one, two = Sequence([1, 2], params, ending), Sequence([1, 2], params, ending)
    for token in (3, 1, 2):
        one.append(token)
    for token in (4, 5, 1, 2):
        two.append(token)
    draft = drafter.propose([one, two], [4, 2])
    assert draft.probs is None
    assert draft.widths == [3, 2]
    assert [row[:width] for row, width in zip(draft.tokens.tolist(), draft.widths, strict=True)] == [[3, 1, 2], [4, 5]]
    two.append(9)
    assert drafter.propose([two, one], [4, 1]).widths == [0, 1]
    late = Sequence([1, 2], params, ending)
    assert drafter.propose([late], [4]).widths == [0]  # nothing from the other sequences


@pytest.mark.parametrize(("low", "high"), [(0, 3), (3, 2), (-1, -1)])
def test_wrong_bounds_are_named(low: int, high: int) -> None:
    with pytest.raises(UserError, match="ngram_min"):
        NgramDrafter(low, high)


class Counted(dict[Any, Any]):
    """Counts its operations."""

    done = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.done += 1
        super().__setitem__(key, value)

    def get(self, key: Any, default: Any = None) -> Any:
        self.done += 1
        return super().get(key, default)


def tokens(count: int) -> list[int]:
    """Make text of few words, with many repetitions."""
    generator = random.Random(0)
    words = [[generator.randrange(4000) for _ in range(generator.randrange(1, 6))] for _ in range(2000)]
    text: list[int] = []
    while len(text) < count:
        text += words[min(generator.randrange(2000), generator.randrange(2000))]
    return text[:count]


def test_a_bounded_number_of_operations_per_token() -> None:
    index = NgramIndex(1, 3)
    index._after = counted = Counted()
    for token in tokens(100_000):
        index.extend([token])
        index.continuation(4)
    assert counted.done <= 6 * 100_000  # three n-grams entered and three looked up


def per_call(action: Callable[[int], object], counts: range) -> float:
    """Measure the median seconds."""
    taken = []
    for number in counts:
        began = time.perf_counter()
        action(number)
        taken.append(time.perf_counter() - began)
    return median(taken)


def test_a_long_text_costs_no_more_per_token_than_a_short_one() -> None:
    """A call at 100,000 tokens takes less than three times the time at 1,000, which allows for cache misses."""
    text = tokens(101_000)
    sequence = Sequence(text[:1], SamplingParams(max_new_tokens=200_000), phase3.Ending())
    drafter = NgramDrafter(1, 3)

    def step(number: int) -> None:
        sequence.append(text[number])
        drafter.propose([sequence], [4])

    gc.disable()  # a collection walks the whole index, which is not part of the lookup
    try:
        per_call(step, range(1, 500))
        early = per_call(step, range(500, 1500))
        for token in text[1500:100_000]:
            sequence.append(token)
        drafter.propose([sequence], [4])  # reads the tokens added in between
        late = per_call(step, range(100_000, 101_000))
    finally:
        gc.enable()
    assert late < 3 * early
