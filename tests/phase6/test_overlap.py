"""Drafting ahead changes no token and no draft; what was drafted for another text is not used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

import phase6
from common.errors import UserError
from phase6.drafting import Draft
from phase6.overlap import OverlapDrafter, OverlapStats, met
from tests.support.served import WHY_NOT_CPP

pytestmark = pytest.mark.skipif(WHY_NOT_CPP is not None, reason=f"no C++ backend here: {WHY_NOT_CPP}")
PROMPTS = ["def read_config(path):", "import os", "class A:"]


@pytest.fixture(scope="module")
def make(make_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """`make(**options)`: an LLM whose draft is its own model in int8, so that most blocks are accepted whole."""
    folder = str(make_checkpoint("llama", max_position_embeddings=64))

    def made(**options: Any) -> Any:
        chosen = {"model": folder, "draft": folder, "draft_quant": "int8", "k": 2, "max_tokens": 40, "device": "cpu"}
        return phase6.LLM(phase6.Options(**{"kernels": "cpp", "threads": 2, **chosen, **options}))

    return made


def decoded(llm: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    sequences = llm.sequences(PROMPTS)
    for _ in llm.run(sequences, multi_step=False):
        pass
    return [(each.tokens, [(step.proposed, step.accepted) for step in each.steps]) for each in sequences]


@pytest.mark.parametrize(("kv", "sync"), [("paged", "event"), ("static", "event"), ("paged", "barrier")])
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.0, "policy": "coupled"}, {"temperature": 0.8}], ids=["greedy", "coupled", "rejection"]
)
def test_no_token_and_no_draft_changes(how: dict[str, Any], kv: str, sync: str, make: Callable[..., Any]) -> None:
    overlapped = make(parallel_streams=True, sync_mode=sync, kv=kv, **how)
    assert decoded(overlapped) == decoded(make(kv=kv, **how))
    stats = overlapped.overlap
    assert stats.drafted > stats.used > 0


def test_a_draft_for_another_text_is_not_used(make: Callable[..., Any]) -> None:
    llm = make(parallel_streams=True)
    engine = phase6.LLMEngine(llm, 1, 64)
    drafter, (sequence,) = engine.drafters["model"], llm.sequences(PROMPTS[:1])
    assert isinstance(drafter, OverlapDrafter)
    sequence.policy, sequence.tokens = llm.policy, [5, 6]
    draft = drafter.propose([sequence], [2])
    with met(drafter), drafter.ahead([sequence], draft):
        pass
    ahead = drafter.kept[sequence]
    assert sequence.tokens == [5, 6]
    assert ahead.output[:4] == [5, 6, *draft.tokens[0].tolist()]
    other = OverlapDrafter(drafter.inner, OverlapStats())
    for tokens, used in ((ahead.output, 1), ([*ahead.output[:-1], 1 - min(1, ahead.output[-1])], 0), ([5, 6], 0)):
        sequence.tokens, other.kept, other.stats.used = list(tokens), {sequence: ahead}, 0
        found: Draft = other.propose([sequence], [2])
        assert other.stats.used == used
        assert torch.equal(found.tokens, drafter.inner.propose([sequence], [2]).tokens)


@pytest.mark.parametrize(("sync", "waits"), [("event", False), ("barrier", True)])
def test_when_the_target_waits(
    sync: str, waits: bool, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that takes long holds up the accept rule with `barrier`, and what changes the texts with both."""
    llm = make(parallel_streams=True, sync_mode=sync)
    drafter, (sequence,) = phase6.LLMEngine(llm, 1, 64).drafters["model"], llm.sequences(PROMPTS[:1])
    assert isinstance(drafter, OverlapDrafter)
    sequence.policy, sequence.tokens = llm.policy, [5, 6]
    draft, slow, inner = drafter.propose([sequence], [2]), Event(), drafter.inner.propose

    def propose(*arguments: Any) -> Draft:
        assert slow.wait(60)
        return inner(*arguments)

    monkeypatch.setattr(drafter.inner, "propose", propose)
    with ThreadPoolExecutor(1) as other:

        def verify() -> None:
            with drafter.ahead([sequence], draft):
                pass

        verified = other.submit(verify)
        if waits:
            with pytest.raises(TimeoutError):
                verified.result(1)
        else:
            verified.result(60)
        slow.set()
        verified.result(60)
    drafter.meet()
    assert sequence.tokens == [5, 6]
    assert sequence in drafter.kept
    assert llm.overlap.waited_ms > 100 or not waits


@pytest.mark.parametrize("sync", ["event", "barrier"])
def test_after_an_error_nobody_drafts_any_more(sync: str, make: Callable[..., Any]) -> None:
    llm = make(parallel_streams=True, sync_mode=sync)
    drafter, (sequence,) = phase6.LLMEngine(llm, 1, 64).drafters["model"], llm.sequences(PROMPTS[:1])
    assert isinstance(drafter, OverlapDrafter)
    sequence.policy, sequence.tokens = llm.policy, [5, 6]
    draft = drafter.propose([sequence], [2])
    with pytest.raises(ZeroDivisionError), met(drafter), drafter.ahead([sequence], draft):
        raise ZeroDivisionError
    assert drafter.work is None
    assert sequence.tokens == [5, 6]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernels": "torch"}, "the models do not run in C"),
        ({"draft": "none", "draft_quant": "none"}, "there is no draft model"),
        ({"drafter": "ngram", "draft_quant": "none", "draft": "auto"}, "there is no draft model"),
        ({"tree": "static"}, "--tree static drafts no chain"),
        ({"controller": "adaptive"}, "--controller adaptive does not know the next block yet"),
    ],
)
def test_where_it_cannot_be_it_is_an_error(options: dict[str, Any], said: str, make: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=f"--parallel-streams .*, and {said}"):
        make(parallel_streams=True, **options)


def test_a_way_to_wait_needs_something_to_wait_for(make: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="--sync-mode barrier is for --parallel-streams, which is off"):
        make(sync_mode="barrier")
