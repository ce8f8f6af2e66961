"""Random schedules: every request gets what it gets alone in phase 5, whatever runs beside it and however few blocks.

The cases end as quickly as they can: a model of 48 features, a context of 64 tokens, prompts with shared beginnings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import phase5
from phase6.kv_cache import PAGE, PagedCache
from tests.support.served import CONTEXT, DRAFTERS, Pair, Request, Result, add, asked, take

PREFIXES = [(), tuple(range(40, 57)), tuple(range(40, 80)), tuple(range(60, 110))]
POLICIES = ("coupled", "rejection", "longest_prefix", "typical")


class Event(NamedTuple):
    """A request that comes, then so many steps, then perhaps the end of an earlier one that is still there."""

    request: Request
    n: int
    steps: int
    abort: int | None


@st.composite
def requests(draw: st.DrawFn) -> Request:
    tail = draw(st.lists(st.integers(5, 9), min_size=1, max_size=20))
    prompt = (*draw(st.sampled_from(PREFIXES)), *tail)
    greedy, penalised = draw(st.booleans()), draw(st.integers(0, 5)) == 0
    params = phase5.SamplingParams(
        temperature=0.0 if greedy else 1.0,
        top_k=draw(st.sampled_from([0, 0, 5])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9])),
        repetition_penalty=1.3 if penalised else 1.0,
        seed=draw(st.integers(0, 3)),
        stop=draw(st.sampled_from([(), (), ("e",), ("in",)])),
        max_new_tokens=draw(st.integers(1, 24)),
        ignore_eos=draw(st.booleans()),
    )
    controller = draw(st.sampled_from(["fixed", "fixed", "adaptive", "confidence"]))
    return Request(prompt, params, draw(st.sampled_from(POLICIES)), controller, draw(st.integers(0, 5)))


@st.composite
def events(draw: st.DrawFn) -> Event:
    abort = draw(st.none() | st.none() | st.integers(0, 5))
    return Event(draw(requests()), draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 4)), abort)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[Event], int, int, int]:
    """Return events, rows, pages and the budget of a step; the pages suffice for the longest request, and a tree."""
    found = draw(st.lists(events(), min_size=1, max_size=6))
    longest = max(min(len(e.request.prompt) + e.request.params.max_new_tokens, CONTEXT) for e in found)
    pages = -(-(longest + 6) // PAGE) + draw(st.integers(0, 6))
    return found, draw(st.integers(1, 4)), pages, draw(st.sampled_from([4, 16, 40]))


def check_blocks(engine: Any) -> None:
    """Check that the users of every block are the rows that hold it, and that names are of blocks with contents."""
    for runner in filter(None, (engine.target, engine.draft)):
        cache = runner.manager.cache
        assert isinstance(cache, PagedCache)
        held = Counter(page for table in cache.tables for page in table)
        assert [held[page] for page in range(len(cache.blocks.users))] == cache.blocks.users
        unused = {page for page, users in enumerate(cache.blocks.users) if not users}
        assert unused == {*cache.blocks.empty, *cache.blocks.cached}
        assert len(cache.blocks.empty) + len(cache.blocks.cached) == len(unused)
        assert {name: page for page, name in cache.blocks.names.items()} == cache.blocks.named


def all_returned(engine: Any) -> None:
    """Check that nobody holds a row or a block any more."""
    check_blocks(engine)
    for runner in filter(None, (engine.target, engine.draft)):
        assert not runner.manager.rows
        assert len(runner.manager.free) == engine.rows
        assert not any(runner.manager.cache.blocks.users)


def work(request: Request, preemptions: int) -> int:
    """Return the most steps that a request needs while it is the oldest: see scheduler.py."""
    new: int = request.params.max_new_tokens
    length = len(request.prompt) + new
    jumps = max(0, -(-(length - CONTEXT) // (CONTEXT // 4)))
    return new + (1 + preemptions + jumps) * -(-length // PAGE)


def check(pair: Pair, schedule: tuple[list[Event], int, int, int]) -> None:
    planned, rows, pages, budget = schedule
    engine = pair.engine(rows, pages, budget)
    found, numbers, aborted = dict[tuple[int, int], Result](), list[int](), set[int]()
    steps, arrived, sequences = 0, dict[int, int](), list[tuple[int, Any]]()
    first = dict[Any, int]()

    def step() -> None:
        nonlocal steps
        take(engine, found)
        steps += 1
        check_blocks(engine)
        for _, sequence in sequences:
            if sequence.progress.scheduled is not None:
                first.setdefault(sequence, steps)

    for event in planned:
        number = add(engine, event.request, event.n)
        numbers.append(number)
        arrived[number] = steps
        sequences += [(number, sequence) for sequence in engine.requests[number]]
        for _ in range(event.steps):
            step()
        if event.abort is not None and event.abort < len(numbers):
            gone = numbers[event.abort]
            if engine.abort(gone):
                aborted.add(gone)
            check_blocks(engine)
    while engine.busy:
        step()
    all_returned(engine)

    for number, event in enumerate(planned):
        for sample in range(event.n):
            alone, got = pair.alone(event.request, sample), found.get((number, sample), Result([], "", "aborted"))
            if number in aborted and got.finish_reason == "aborted":
                assert got.tokens == alone.tokens[: len(got.tokens)]
            else:
                assert got == alone
    waited = 0
    for number, sequence in sequences:
        if sequence in first:
            assert first[sequence] - arrived[number] <= waited + 1
        waited += work(planned[number].request, sequence.progress.preemptions)


PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a schedule takes too long to be made smaller step by step
MANY = settings(
    max_examples=140, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES, report_multiple_bugs=False
)
FEW = settings(MANY, max_examples=8, derandomize=True)
HOW = list(DRAFTERS)


@pytest.mark.parametrize("how", HOW)
def test_every_request_gets_what_it_gets_alone(pair: Callable[..., Pair], how: str) -> None:
    given(schedules())(FEW(lambda schedule: check(pair("cpp", how), schedule)))()


@pytest.mark.parametrize("how", ["plain", "model"])
def test_every_request_gets_what_it_gets_alone_in_torch(pair: Callable[..., Pair], how: str) -> None:
    few = settings(FEW, max_examples=6)
    given(schedules())(few(lambda schedule: check(pair("torch", how), schedule)))()


@pytest.mark.parametrize("preempted_after", [1, 2])
@pytest.mark.parametrize("how", ["medusa", "eagle"])
def test_a_preempted_sequence_has_every_state_once(pair: Callable[..., Pair], how: str, preempted_after: int) -> None:
    """Its blocks are still known when it is resumed, and then the drafter lacks the state of one position alone."""
    made, kept = pair("cpp", how), list[torch.Tensor]()
    for preempted in (False, True):
        engine = made.engine()
        sequence = engine.requests[add(engine, asked(tokens=30, temperature=1.0, k=1))][0]
        while len(sequence.tokens) < preempted_after:
            engine.step()
        if preempted:
            assert sequence.finish_reason is None
            engine.scheduler.preempt(sequence)
        while engine.busy:
            engine.step()
        assert len(sequence.tokens) == 30
        states = sequence.drafter.memory.get(sequence)
        assert states is not None
        kept.append(states)
        engine.close()
    torch.testing.assert_close(*kept)
    assert len(kept[0]) == (2 if how == "medusa" else 62)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_every_request_gets_what_it_gets_alone_in_many_schedules(pair: Callable[..., Pair], how: str) -> None:
    given(schedules())(MANY(lambda schedule: check(pair("cpp", how), schedule)))()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "model", "medusa", "eagle"])
def test_many_schedules_in_torch(pair: Callable[..., Pair], how: str) -> None:
    many = settings(MANY, max_examples=40)
    given(schedules())(many(lambda schedule: check(pair("torch", how), schedule)))()
