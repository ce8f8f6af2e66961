"""Measured times of steps, and the K of a batch that follows from them and from the acceptance of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest

from phase5 import Bounds, CostController, Ending, SamplingParams, Sequence, StepStats
from phase5.controllers import ALWAYS, FIRST, LOOKS, MARGIN, PROBE, SETTLED, choose, observe
from phase5.cost_model import ALLOWANCE, LOOK, STALE, STALL, START, Acceptance, CostModel, Table
from phase5.drafters import NgramDrafter
from phase5.multi_step import AT_ONCE, steps_ahead
from phase5.speculative import plan

pytestmark = pytest.mark.no_exercise  # part draft is given


def step(
    k: int, verify: float, draft: float = 0.5, accepted: int = 0, computed: int | None = None, accept: float = 0.1
) -> StepStats:
    """Make the stats of a step with a cache: the forward computes one token and the draft of each row."""
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
        accept_ms=accept if k else 0.0,
    )


def priced(
    plain: Callable[[int], float], verify: Callable[[int], float], draft: Callable[[int], float], accept: float = 0.1
) -> CostModel:
    """Make a cost model that knows these times, of 1 to 8 rows and of 1 to 80 tokens."""
    made = CostModel()
    for rows in range(1, 9):
        for table, time in ((made.plain, plain(rows)), (made.draft, draft(rows)), (made.accept, accept)):
            table.observe(rows, time)
    for tokens in range(1, 81):
        made.verify.observe(tokens, verify(tokens))
    return made


Times = tuple[Callable[[int], float], Callable[[int], float], Callable[[int], float]]
CHEAP: Times = (lambda rows: 2.0, lambda tokens: 2.0 + 0.05 * tokens, lambda rows: 0.1)
ARITHMETIC: Times = (lambda rows: 2.0 + rows, lambda tokens: 2.0 + tokens, lambda rows: 0.5 + 0.1 * rows)  # may pay
HOPELESS: Times = (
    lambda rows: 1.0 * rows,
    lambda tokens: 1.0 * tokens,
    lambda rows: 0.3 * rows,
)  # a draft token costs 1.3


def rows_of(cost_model: CostModel, acceptances: list[float], high: int = 8) -> list[CostController]:
    """Make controllers that have seen drafts of which these shares were accepted at every position."""
    controllers = []
    for share in acceptances:
        mine = CostController(Bounds(1, high), cost_model, Acceptance(1.0), prior_weight=1e-9, drafts=9)
        mine.acceptance.tried, mine.acceptance.passed = [1e3] * high, [1e3 * share] * high
        controllers.append(mine)
    return controllers


# Times.


def test_what_was_tried_is_known_and_what_lies_between_is_on_a_line() -> None:
    table = Table()
    for size, time in ((1, 2.0), (3, 3.0), (7, 4.0)):
        table.observe(size, time)
    assert [table.at(size) for size in (1, 3, 5)] == pytest.approx([2.0, 3.0, 3.5])
    assert table.at(9) == pytest.approx(4 + 2 / 3)  # beyond the largest, with the mean slope
    assert table.at(0) == pytest.approx(2.0)


def test_fewer_tokens_never_cost_more() -> None:
    table = Table()
    for size, time in ((1, 2.0), (2, 9.0), (5, 3.0)):
        table.observe(size, time)
    assert table.at(2) == table.at(5) == 3.0
    slow_plain = priced(lambda rows: 50.0, lambda tokens: 2.0 + tokens, lambda rows: 0.5)
    assert slow_plain.time([0]) == slow_plain.verify.at(1) + slow_plain.accept.at(1)


@pytest.mark.about("engine/cost_model.py, CostModel.time")
def test_the_time_of_a_step_is_that_of_its_parts() -> None:
    """Ragged: three rows draft at the first two positions, one of them at the third too, one not at all."""
    model = priced(lambda rows: 7.0, lambda tokens: 2.0 + tokens, lambda rows: 0.5 * rows, accept=0.25)
    assert model.time([0, 0, 0, 0]) == pytest.approx(min(7.0, 6.25))
    assert model.time([2, 3, 0, 2]) == pytest.approx((2 + 4 + 7) + 0.25 + (1.5 + 1.5 + 0.5))


def test_a_step_of_a_batch_is_observed_once() -> None:
    model = CostModel()
    model.observe([step(0, 4.0)] * 3)
    model.observe([step(2, 6.0, draft=0.5), step(4, 6.0, draft=0.25), step(0, 6.0)])
    load = START
    assert {name: table.usual() for name, table in model.tables.items()} == {
        "plain": {3: 4.0 / load},
        "verify": {9: 6.0 / load},
        "draft": {2: pytest.approx(1.0 / 4 / load)},  # 6 of 12 positions of 3 rows by 4 positions
        "accept": {3: 0.1 / load},
    }
    assert [len(times) for table in model.tables.values() for times in table.recent.values()] == [1] * 4


def test_a_stalled_forward_and_a_prefill_teach_nothing() -> None:
    model = CostModel()
    for each in (*[step(3, 3.0)] * 6, step(3, 300.0), step(3, 50.0, computed=200)):
        model.observe([each])
    assert model.verify.at(4) * START == pytest.approx(3.0)
    assert len(model.verify.recent[4]) == 7


def test_a_draft_after_plain_steps_has_no_usual_time() -> None:
    """The drafter has also read the tokens in between."""
    controllers = [CostController(Bounds(1, 8))]
    model = controllers[0].cost_model
    for each in (step(2, 3.0), step(2, 3.0), step(0, 2.0), step(2, 3.0, draft=9.0), step(2, 3.0, draft=0.5)):
        observe(controllers, [each])
    assert list(model.draft.recent[1]) == pytest.approx([0.5 / START] * 3)


def test_without_a_cache_a_longer_text_costs_more() -> None:
    model = CostModel()
    for each in (dataclasses.replace(step(0, 10.0), computed=36, plain=36),) * 3:
        model.observe([each])
    assert model.plain.at(1) * (START + 136 - 1) == pytest.approx(10.0 * (START + 135) / (START + 35))


def test_nodes_of_a_tree_are_tokens_of_the_forward() -> None:
    model = priced(*ARITHMETIC)
    model.observe([dataclasses.replace(step(3, 20.0), proposed=16, computed=17)])
    assert model.time([3]) == pytest.approx(model.verify.at(17) + model.accept.at(1) + 3 * model.draft.at(1))


# The choice.


@pytest.mark.parametrize("times", [CHEAP, ARITHMETIC, HOPELESS])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_the_choice_is_the_brute_force_maximum(times: tuple[Callable[[int], float], ...], rows: int) -> None:
    """Over K for the batch, with ragged acceptances and limits."""
    generator, plain, verify, draft = random.Random(rows), *times
    for _ in range(40):
        acceptances = [generator.random() for _ in range(rows)]
        limits = [generator.choice([0, 1, 3, 8, 8, 8]) for _ in range(rows)]

        def rate(k: int, shares: list[float] = acceptances, limits: list[int] = limits) -> float:
            widths = [min(k, limit) for limit in limits]
            tokens = sum(share**j for share, width in zip(shares, widths, strict=True) for j in range(width + 1))
            time = verify(rows + sum(widths)) + 0.1
            time += sum(draft(sum(width >= level for width in widths)) for level in range(1, max(widths) + 1))
            return tokens / (time if any(widths) else plain(rows))

        chosen = choose(rows_of(priced(plain, verify, draft), acceptances), limits)
        best = max(rate(k) for k in range(9))
        assert rate(max(chosen)) == pytest.approx(best if best > MARGIN * rate(0) else rate(0))
        assert chosen == [min(max(chosen), limit) for limit in limits]


def test_one_row_alone_may_draft_where_a_batch_may_not() -> None:
    """Rows share the reading of weights, so drafts gain less in a batch."""
    model = priced(lambda rows: 4.0 + 0.5 * rows, lambda tokens: 4.0 + 0.5 * tokens, lambda rows: 0.3 + 0.2 * rows)
    assert choose(rows_of(model, [0.7]), [8]) != [0]
    assert choose(rows_of(model, [0.7] * 8), [8] * 8) == [0] * 8


def test_bounds_are_kept() -> None:
    for low, high in ((1, 1), (2, 5), (3, 3)):
        for share, times in ((1.0, CHEAP), (0.0, CHEAP), (0.6, ARITHMETIC)):
            model = priced(*times)
            (mine,) = rows_of(model, [share], high)
            mine.bounds = Bounds(low, high)
            assert mine.next_k() in (0, *range(low, high + 1))


def test_what_was_accepted_before_is_the_prior_of_the_next_text() -> None:
    model = priced(*CHEAP)
    fresh = CostController(Bounds(1, 8), model).tokens(model.chances(8))
    assert fresh == pytest.approx(list(itertools.accumulate(0.8**j for j in range(9))))
    earlier = CostController(Bounds(1, 8), model)
    for _ in range(200):
        observe([earlier], [step(4, 2.0, accepted=1)])
    later = CostController(Bounds(1, 8), model).tokens(model.chances(8))
    assert later[1] == pytest.approx(2.0, abs=0.02)
    assert later[2] == pytest.approx(2.0, abs=0.1)


def test_without_prices_it_drafts_and_then_measures_a_plain_step() -> None:
    controller = CostController(Bounds(1, 8))
    assert controller.next_k() == 3
    observe([controller], [step(3, 3.0, accepted=3)])
    assert controller.next_k() == 0
    observe([controller], [step(0, 2.0)])
    assert controller.next_k() > 3


@pytest.mark.parametrize("gain", [-0.05, 0.3])
def test_drafts_that_lose_time_are_given_up_whatever_was_expected(gain: float) -> None:
    """The times in the tables are those of an idle machine; verification takes longer than they say."""
    model = priced(lambda rows: 4.0, lambda tokens: 4.0 + 0.1 * tokens, lambda rows: 0.1)
    for table in (model.verify, model.draft, model.accept):
        table.observe = lambda size, time: None  # type: ignore[method-assign]
    (mine,) = rows_of(model, [0.5], 2)
    took, drafted, steps = 1.5 * 4.0 / (1 + gain), 0, 4000
    for at in range(steps):
        (k,) = choose([mine], [2])
        drafted += k > 0
        verify = (took - k * 0.1 - 0.1 if k else 4.0) * START
        observe([mine], [step(k, verify, 0.1 * START, accepted=at % 2 if k else 0, accept=0.1 * START)])
    lost = drafted * (took - 1.5 * 4.0)
    if gain > 0:
        assert drafted > 0.9 * steps
    else:
        assert ALLOWANCE * 4.0 < lost < (ALLOWANCE + 2) * 4.0 + 1.1 * LOOK * 4.0 * steps


def test_an_interrupted_step_says_nothing_about_drafts() -> None:
    """Other programs stop a step as often with a draft as without one."""
    model = priced(*CHEAP)
    (mine,) = rows_of(model, [0.8])
    for at in range(200):
        k = mine.next_k()
        assert k > 0 or model.age > STALE or not mine.drafted
        stall = 100.0 if at % 10 == 0 else 0.0
        time = 2.0 + 0.05 * (1 + k) + stall if k else 2.0
        observe([mine], [step(k, time * START, 0.1 * START, accepted=min(k, 3), accept=0.1 * START)])
    assert model.balance > -ALLOWANCE * 2.0
    assert model.spent > 20 * 100.0


def test_reading_the_prompt_is_a_cost_of_drafts() -> None:
    """The draft model reads the prompt only because there is a draft; the target reads it anyway."""
    model = priced(*ARITHMETIC)  # a plain step takes 3, a forward over three tokens 5; the drafter takes 2 * 3
    first = step(2, 90.0 * START, 3.0 * START, accepted=1, accept=1.0 * START, computed=50)
    observe(rows_of(model, [0.5]), [first])
    gain = 2 * 3.0 - (5.0 + 2 * 3.0 + 0.1)
    assert model.balance == pytest.approx(gain)
    assert model.credit == 0.0
    model.looking, model.credit = True, 2.0
    observe(rows_of(model, [0.5]), [first])
    assert model.balance == pytest.approx(2 * gain)
    assert model.credit == pytest.approx(2.0 + gain)


def test_a_drafter_that_reads_what_it_missed_is_not_interrupted() -> None:
    """After plain steps, drafting may take many times the usual time, and all of it counts."""
    model = priced(*ARITHMETIC)  # 5 + 2 * 0.6 + 0.1 with two draft tokens
    usual, missed = 5.0 + 2 * 0.6 + 0.1, 40.0
    for drafted, most in ((False, missed + usual), (True, STALL * usual)):
        model.balance, mine = 0.0, rows_of(model, [0.5])
        mine[0].drafted = drafted
        observe(mine, [step(2, 5.0 * START, (0.6 + missed / 2) * START, accept=0.1 * START)])
        assert model.balance == pytest.approx(3.0 - most, abs=0.5)


def test_gains_make_up_for_losses_before_them_alone() -> None:
    """And a draft that is no test has no part in what tests may cost."""
    model = priced(*ARITHMETIC)  # a plain step takes 3, one with two draft tokens 5 + 1.2 + 0.1
    took = 5.0 + 2 * 0.6 + 0.1

    def draft(accepted: int) -> None:
        observe(rows_of(model, [0.5]), [step(2, 5.0 * START, 0.6 * START, accepted, accept=0.1 * START)])

    draft(2)
    assert model.balance == 0.0
    draft(0)
    assert model.balance == pytest.approx(LOOK * took + 3.0 - took, abs=0.1)
    assert model.credit == pytest.approx(2 * LOOK * took)
    model.looking = True
    draft(0)
    assert model.credit == pytest.approx(3 * LOOK * took + 3.0 - took)


def test_a_test_that_cannot_be_paid_for_waits() -> None:
    (mine,) = rows_of(priced(*ARITHMETIC), [0.0])
    mine.cost_model.credit = -10.0
    assert mine.next_k() == 0
    assert mine.holds > 10.0 / (LOOK * 3.0) > ALWAYS


def test_before_drafts_are_given_up_plain_steps_are_measured() -> None:
    """They were measured long ago, and the machine may have become slower since."""
    (mine,) = rows_of(priced(*ARITHMETIC), [0.0])
    mine.cost_model.age = 20
    assert (mine.next_k(), mine.holds) == (0, PROBE)
    mine.cost_model.age = 0
    assert mine.next_k() == 0
    assert mine.holds >= ALWAYS


# Looking again.


def simulate(times: Times, acceptances: list[float], steps: int) -> list[list[int]]:
    """Return the widths of each step of a batch."""
    model, generator, chosen = priced(*times), random.Random(0), list[list[int]]()
    controllers = [CostController(Bounds(1, 8), model) for _ in acceptances]
    plain, verify, draft = times
    for _ in range(steps):
        widths = choose(controllers, [8] * len(acceptances))
        stats, rows, drafted = [], len(widths), sum(widths)
        for width, share in zip(widths, acceptances, strict=True):
            accepted = next((i for i in range(width) if generator.random() >= share), width)
            time = (verify(rows + drafted) if drafted else plain(rows)) * START
            stats.append(step(width, time, draft(rows) * START, accepted, accept=0.1 * START))
        observe(controllers, stats)
        chosen.append(widths)
    return chosen


@pytest.mark.parametrize("rows", [1, 4])
def test_it_never_looks_where_drafting_cannot_pay(rows: int) -> None:
    assert simulate(HOPELESS, [1.0] * rows, 2000) == [[0] * rows] * 2000
    (controller,) = rows_of(priced(*HOPELESS), [1.0])
    assert controller.next_k() == 0
    assert steps_ahead(controller) == ALWAYS


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_looking_costs_one_percent_of_the_time(rows: int) -> None:
    """Nothing is accepted, though full acceptance would pay: after the first drafts only tests are left."""
    plain, verify, draft = ARITHMETIC
    chosen = simulate(ARITHMETIC, [0.0] * rows, 5000)[100:]
    drafts = [widths[0] for widths in chosen if widths[0]]
    assert drafts
    lost = sum(verify(rows * (1 + k)) + k * draft(rows) + 0.1 - plain(rows) for k in drafts)
    total = sum(plain(rows) for _ in chosen) + lost
    assert 0.3 * LOOK < lost / total < 1.1 * LOOK


def test_drafts_that_are_accepted_again_are_noticed() -> None:
    model = priced(*ARITHMETIC)
    (mine,) = rows_of(model, [0.0])
    mine.acceptance.decay = 0.95
    mine.acceptance.tried, mine.acceptance.passed = [10.0], [0.0]
    for _ in range(3000):
        k = mine.next_k()
        observe([mine], [step(k, (2.0 + 1 + k) * START, 0.6 * START, accepted=k, accept=0.1 * START if k else 0.0)])
    assert mine.next_k() >= 4


def test_a_plain_step_is_measured_again_after_a_while() -> None:
    (mine,) = rows_of(priced(*CHEAP), [1.0])
    for _ in range(STALE + 1):
        assert mine.next_k() > 0
        observe([mine], [step(8, 3.0 * START, 0.1 * START, accepted=8)])
    assert (mine.next_k(), mine.holds) == (0, PROBE)
    observe([mine], [step(0, 2.0 * START)])
    assert mine.next_k() > 0


def test_the_first_plain_step_that_is_faster_counts() -> None:
    """While drafts are made, plain steps are measured once in STALE steps: the controller cannot wait for several."""
    model = priced(*CHEAP)
    (controller,) = rows_of(model, [0.5])
    for _ in range(9):
        model.observe_plain(1, 2.0)
    assert choose([controller], [8]) != [0]
    model.observe_plain(1, 0.8)
    assert choose([controller], [8]) == [0]


def test_for_how_many_steps_an_answer_holds() -> None:
    model = priced(*CHEAP)
    new, old = CostController(Bounds(1, 8), model), CostController(Bounds(1, 8), model, drafts=2)
    assert choose([new, old], [8, 8])[0] > 0
    assert steps_ahead(new) == steps_ahead(old) == FIRST  # the new text may be another
    choose([old], [8])
    assert steps_ahead(old) == SETTLED
    choose([old], [0])  # nothing was found to draft: plain steps cost less if several are made at once
    assert 1 < steps_ahead(old) <= AT_ONCE
    (poor,) = rows_of(priced(*ARITHMETIC), [0.0])
    assert poor.next_k() == 0
    assert steps_ahead(poor) > SETTLED
    poor.cost_model.credit = 1e3
    assert poor.next_k() > 0
    assert steps_ahead(poor) == LOOKS


def test_nothing_is_asked_again_while_an_answer_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the cost model nor, for drafts that cannot pay, the index of n-grams."""
    asked = list[str]()

    def decline(*arguments: object) -> tuple[list[int], int]:
        asked.append("choose")
        return [0], 5

    monkeypatch.setattr("phase5.controllers._choose", decline)
    monkeypatch.setattr(NgramDrafter, "find", lambda *arguments: asked.append("find"))
    sequence = Sequence([1, 2], SamplingParams(max_new_tokens=99), Ending())
    sequence.controller = CostController(Bounds(1, 8), priced(*HOPELESS))
    for _ in range(10):
        assert plan(NgramDrafter(), [sequence], 512) == [0]
        observe([sequence.controller], [step(0, 2.0)])
    assert asked == ["choose"] * 2
