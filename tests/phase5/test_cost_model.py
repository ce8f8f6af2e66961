"""The measured cost of a step, and the K that follows from it."""

from __future__ import annotations

import dataclasses

import pytest

from phase5 import Bounds, CostController, StepStats
from phase5.cost_model import CostModel
from phase5.multi_step import steps_ahead

pytestmark = pytest.mark.no_exercise  # part draft is given


def step(k: int, verify: float, draft: float = 0.5, accepted: int = 0, computed: int | None = None) -> StepStats:
    """Make the stats of a step with a cache: the forward computes one token and the draft."""
    return StepStats(
        k=k,
        proposed=k,
        depth=k,
        accepted=accepted,
        emitted=accepted + 1,
        length=100,
        computed=1 + k if computed is None else computed,
        plain=1,
        draft_ms=k * draft,
        verify_ms=verify,
        accept_ms=0.1,
    )


def told(*steps: StepStats) -> CostModel:
    cost_model = CostModel()
    for each in steps:
        cost_model.observe(each)
    return cost_model


def test_what_was_tried_is_known_and_what_lies_between_is_on_a_line() -> None:
    cost_model = told(step(0, 2.0), step(2, 3.0), step(6, 4.0))
    assert cost_model.verify_ms(0, 1) == pytest.approx(2.0)
    assert cost_model.verify_ms(2, 1) == pytest.approx(3.0)
    assert cost_model.verify_ms(4, 1) == pytest.approx(3.5)
    assert cost_model.verify_ms(8, 1) == pytest.approx(4 + 2 / 3)


def test_fewer_tokens_never_cost_more() -> None:
    cost_model = told(step(0, 2.0), step(1, 9.0), step(4, 3.0))
    assert cost_model.verify_ms(1, 1) == pytest.approx(3.0)


def test_a_stalled_forward_and_a_prefill_teach_nothing() -> None:
    cost_model = told(*[step(3, 3.0)] * 6, step(3, 300.0), step(3, 50.0, computed=200))
    assert cost_model.verify_ms(3, 1) == pytest.approx(3.0)


def test_without_a_cache_a_longer_text_costs_more() -> None:
    whole = [dataclasses.replace(step(0, 10.0), computed=36, plain=36) for _ in range(3)]
    assert told(*whole).verify_ms(0, 136) == pytest.approx(20.0)


def test_a_plain_step_is_wanted_until_it_is_known_and_again_after_a_while() -> None:
    cost_model = told(step(0, 2.0), step(0, 2.0))
    assert not cost_model.wants_plain
    for _ in range(65):
        cost_model.observe(step(2, 3.0))
    assert cost_model.wants_plain


@pytest.mark.parametrize(
    ("verify", "draft", "chosen"),
    [
        (lambda k: 2.0, 0.01, 8),  # verifying and drafting are nearly free
        (lambda k: 2.0 * (1 + k), 0.01, 0),  # a draft token costs what a token costs
        (lambda k: 2.0 if k < 4 else 9.0, 0.05, 3),  # a cliff after three
    ],
)
def test_the_controller_goes_by_what_verifying_costs(verify: object, draft: float, chosen: int) -> None:
    assert callable(verify)
    controller = CostController(Bounds(1, 8))
    for _ in range(4):
        for k in range(9):
            controller.observe(step(k, verify(k), draft, accepted=max(0, k - 1) if k < 8 else 8))
    assert controller.best() == chosen


def test_its_answer_holds_for_the_steps_that_it_declines_and_then_it_looks_again() -> None:
    controller = CostController(Bounds(1, 8), retry=6)
    for _ in range(4):
        for k in (0, 0, 2, 4):
            controller.observe(step(k, 2.0 * (1 + k)))  # a draft token costs as much as a token, and is rejected
    assert controller.next_k() == 0
    assert steps_ahead(controller) == 6
    for _ in range(4):
        controller.observe(step(0, 2.0))
    assert controller.next_k() == 0
    assert steps_ahead(controller) == 2
    for _ in range(2):
        controller.observe(step(0, 2.0))
    assert controller.next_k() > 0
    assert steps_ahead(controller) == 1  # while measuring, K is chosen for every step


def test_a_settled_answer_holds_for_several_steps() -> None:
    controller = CostController(Bounds(1, 8))
    assert steps_ahead(controller) == 1
    for _ in range(4):
        for k in (0, 0, 2, 4):
            controller.observe(step(k, 2.0, 0.1, accepted=k))
    assert controller.next_k() > 0
    assert steps_ahead(controller) > 1
