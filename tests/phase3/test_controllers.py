"""K controllers: given acceptances give expected Ks; the cost controller against brute force on simulated costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean
from typing import Any

import pytest
import torch

import phase3
from common.errors import UserError
from phase3 import AdaptiveController, Bounds, ConfidenceController, CostController, FixedController, StepStats
from phase3.controllers import CostModel


def seen(k: int, accepted: int, length: int = 100, draft_ms: float = 1.0, verify_ms: float = 10.0) -> StepStats:
    """Make the stats of a step with k draft tokens."""
    return StepStats(
        k=k, proposed=k, depth=k, accepted=accepted, emitted=accepted + 1, length=length, draft_ms=draft_ms * k,
        verify_ms=verify_ms, accept_ms=0.0,
    )  # fmt: skip


def trajectory(controller: Any, accepted: Iterable[int]) -> list[int]:
    """Return the K of each step if at most the given numbers of draft tokens are accepted."""
    ks = []
    for most in accepted:
        ks.append(controller.next_k())
        controller.observe(seen(ks[-1], min(most, ks[-1])))
    return [*ks, controller.next_k()]


@pytest.mark.parametrize(
    ("start", "accepted", "expected"),
    [
        (4, [9, 9, 9, 9, 9, 9], [4, 5, 6, 6, 6, 6, 6]),  # up to the bound
        (4, [0, 0, 0, 0], [4, 3, 2, 2, 2]),  # down to the bound
        (4, [2, 2, 2], [4, 4, 4, 4]),  # the exact target rate changes nothing
        (9, [9], [6, 6]),  # a start beyond the bounds is clipped
        (1, [9], [2, 3]),
    ],
)
@pytest.mark.about("engine/controllers.py, AdaptiveController.observe")
def test_adaptive(start: int, accepted: list[int], expected: list[int]) -> None:
    assert trajectory(AdaptiveController(start, Bounds(2, 6), 0.5, window=3), accepted) == expected


def test_adaptive_looks_at_a_window_of_steps() -> None:
    """Acceptance in the last two steps, by hand: 3/3, 3/7, 0/8, 0/7, 2/6, 5/6."""
    controller = AdaptiveController(3, Bounds(1, 8), 0.5, window=2)
    assert trajectory(controller, [3, 0, 0, 0, 9, 9]) == [3, 4, 3, 2, 1, 1, 2]
    assert trajectory(AdaptiveController(2, Bounds(1, 8), 0.5, step=3), [9, 9, 0]) == [2, 5, 8, 5]
    before = controller.next_k()
    controller.observe(seen(0, 0))  # a step without a draft is ignored
    assert controller.next_k() == before


def test_confidence_asks_before_every_token_after_the_first_few() -> None:
    controller = ConfidenceController(Bounds(1, 4), confidence=0.5)
    sure, unsure = torch.tensor([0.8, 0.2]), torch.tensor([0.4, 0.3, 0.3])
    for ask, drafted in (([sure] * 4, 4), ([unsure] * 4, 1), ([unsure, sure, unsure, sure], 2), ([sure, unsure], 1)):
        assert controller.next_k() == 4
        assert sum(1 for _ in itertools.takewhile(lambda probs: not controller.stop(probs), ask)) == drafted
    patient = ConfidenceController(Bounds(3, 4), confidence=1.0)
    assert patient.next_k() == 4
    assert [patient.stop(unsure) for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize("name", ["adaptive", "confidence", "cost"])
@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 5), (3, 3)])
def test_bounds_are_kept(name: Any, low: int, high: int) -> None:
    generator = random.Random(3)
    controller = phase3.make_controller(name, k=4, min_k=low, max_k=high)
    ks = trajectory(controller, (generator.choice([0, 0, 2, 9]) for _ in range(200)))
    allowed = {*range(low, high + 1), *([0] if name == "cost" else [])}
    assert set(ks) <= allowed
    assert max(ks) == high


def test_wrong_values_are_named() -> None:
    for make, words in (
        (lambda: Bounds(0, 3), "min_k"),
        (lambda: Bounds(4, 3), "max_k"),
        (lambda: AdaptiveController(2, Bounds(1, 3), 1.0), "target_acceptance"),
        (lambda: AdaptiveController(2, Bounds(1, 3), 0.0), "target_acceptance"),
        (lambda: ConfidenceController(Bounds(1, 3), 1.1), "confidence"),
    ):
        with pytest.raises(UserError, match=words):
            make()


# The cost controller, with simulated costs and acceptance.


def run(
    controller: Any,
    chances: Callable[[int], list[float]],
    tokens: int,
    draft_ms: float = 1.0,
    cold: float = 1.0,
    seed: int = 0,
) -> tuple[float, list[int]]:
    """Return tokens per millisecond, and the Ks. A target forward costs 3 ms plus 0.07 ms per position, with noise.

    chances(n)[i] is the acceptance of draft token i after n tokens, the last also for later tokens; the first draft is
    `cold` times as slow.
    """
    generator = random.Random(seed)

    def noisy(milliseconds: float) -> float:
        return milliseconds * (1 + 0.05 * generator.random())

    ks: list[int] = []
    done, total = 0, 0.0
    while done < tokens:
        k, length, chance = min(controller.next_k(), tokens - done - 1), 100 + done, chances(done)
        accepted = 0
        while accepted < k and generator.random() < chance[min(accepted, len(chance) - 1)]:
            accepted += 1
        draft = noisy(k * draft_ms * (cold if k and not any(ks) else 1))
        verify, rule = noisy(3 + 0.07 * (length + k)), noisy(0.3 if k else 0.1)
        controller.observe(StepStats(k, k, k, accepted, accepted + 1, length, draft, verify, rule))
        done, total = done + accepted + 1, total + draft + verify + rule
        ks.append(k)
    return done / total, ks


def cost() -> CostController:
    return CostController(Bounds(1, 8))


def speed(make: Callable[[], Any], chances: Callable[[int], list[float]], tokens: int, **costs: float) -> float:
    return mean(run(make(), chances, tokens, seed=seed, **costs)[0] for seed in range(20))


WORLDS: dict[str, tuple[Any, int, dict[str, float]]] = {
    "even chances": (lambda n: [0.8], 256, {}),
    "short texts": (lambda n: [0.8], 64, {}),
    "worse chances": (lambda n: [0.6], 256, {}),
    "heads that see less and less far": (lambda n: [0.65, 0.45, 0.3, 0.2, 0.1], 256, {"draft_ms": 0.3}),
    "a dear draft": (lambda n: [0.8], 256, {"draft_ms": 4.0}),
    "good and hopeless stretches": (lambda n: [0.0 if n // 50 % 2 else 0.9], 400, {}),
    "a draft that no K makes pay": (lambda n: [0.2], 256, {"draft_ms": 5.0}),
    "a first draft of twenty times the cost": (lambda n: [0.8], 256, {"cold": 20.0}),
}


@pytest.mark.parametrize("name", list(WORLDS))
def test_cost_comes_close_to_the_best_fixed_k(name: str) -> None:
    """It comes within 5% of the best K, from a start without measurements; K may be 0."""
    chances, tokens, settings = WORLDS[name]
    fixed = [speed(partial(FixedController, k), chances, tokens, **settings) for k in range(9)]
    assert speed(cost, chances, tokens, **settings) > 0.95 * max(fixed)


def test_cost_loses_next_to_nothing_where_every_draft_fails() -> None:
    for tokens in (64, 256):
        plain = speed(lambda: FixedController(0), lambda n: [0.0], tokens)
        assert speed(cost, lambda n: [0.0], tokens) > 0.97 * plain


@pytest.mark.parametrize(("draft_ms", "chance"), [(0.2, 1.0), (1.0, 0.75), (3.0, 0.75), (1.0, 0.4), (9.0, 0.5)])
@pytest.mark.about("engine/controllers.py, CostController.best")
def test_cost_chooses_the_brute_force_maximum(draft_ms: float, chance: float) -> None:
    """After many steps with exact times, and acceptance shares that are exact in every run of steps."""
    controller = CostController(Bounds(1, 8), decay=1.0, overhead=0)
    for step in range(4000):
        accepted = next((i for i in range(8) if (step * (i + 1) * 0.618) % 1 >= chance), 8)
        controller.observe(seen(8, accepted, length=100, draft_ms=draft_ms, verify_ms=0.1 * 108))

    def shares() -> list[float]:
        steps = [next((i for i in range(8) if (s * (i + 1) * 0.618) % 1 >= chance), 8) for s in range(4000)]
        return [mean(accepted >= j for accepted in steps) for j in range(1, 9)]

    survival, length = shares(), controller.length
    rates = {k: (1 + sum(survival[:k])) / (0.1 * (length + k) + draft_ms * k) for k in range(9)}
    assert controller.next_k() == max(rates, key=lambda k: rates[k])


def test_cost_knows_from_the_text_before_what_things_cost() -> None:
    """Times are shared, acceptance is not: the second sequence's first draft is short, its second has the best K."""
    costs = CostModel()
    first, second = (CostController(Bounds(1, 8), costs=costs) for _ in range(2))
    trajectory(first, [3, 4, 8, 8, 8, 8])
    assert second.next_k() == second.first_k
    second.observe(seen(4, 4))
    assert second.next_k() == second.best() > 5


def test_cost_declines_and_looks_again_later_and_later() -> None:
    ks = trajectory(cost(), [0] * 300)
    begins = ks.index(0)
    assert begins < 10
    runs = [(k, len(list(same))) for k, same in itertools.groupby(ks[begins:])]
    assert runs[:8] == [(0, 16), (1, 1), (0, 32), (1, 1), (0, 64), (1, 1), (0, 128), (1, 1)]


@pytest.mark.parametrize("begins", [100, 1000])
def test_cost_recovers_when_drafts_stand_again(begins: int) -> None:
    """Old observations have little weight by then: after one accepted test draft, K grows within a few steps."""
    _, ks = run(cost(), lambda n: [0.0 if n < begins else 0.9], 3 * begins)
    back = next(i for i, k in enumerate(ks) if i >= begins and k == 1)
    assert any(k >= 4 for k in ks[back : back + 16])
    assert mean(ks[back + 16 :]) > 3


# On a model.


@pytest.mark.parametrize("name", ["adaptive", "confidence"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_batch_choose_as_they_would_alone(name: Any, temperature: float) -> None:
    """Controllers are per sequence: each row has the same tokens and the same K in every step as alone."""
    model, draft = phase3.FakeModel(40, 256), phase3.FakeModel(40, 256, agreement=0.7)
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=40, seed=3)

    def decode(prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
        source = phase3.GreedySource() if params.greedy else phase3.KeyedSource()
        drafter = phase3.ModelDrafter(draft, source)
        sequences = [phase3.Sequence(prompt, params, phase3.Ending()) for prompt in prompts]
        widths: dict[Any, list[int]] = {sequence: [] for sequence in sequences}
        for step in phase3.decode(
            model, drafter, sequences, None, lambda: phase3.make_controller(name, confidence=0.5), source
        ):
            for sequence, stats in zip(step.sequences, step.stats, strict=True):
                widths[sequence].append(stats.proposed)
        return [(sequence.tokens, widths[sequence]) for sequence in sequences]

    prompts = [[1], [5, 6, 7, 8], [30] * 20]
    together = decode(prompts)
    assert together == [decode([prompt])[0] for prompt in prompts]
    assert len({tuple(widths) for _, widths in together}) == 3
