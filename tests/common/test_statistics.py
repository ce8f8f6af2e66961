"""Intervals hold their level on simulated rounds and prompts, claims need a null arm, planted effects are found."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from common.statistics import MIN_ROUNDS, Interval, Ratio, between, claims, holm, precision, ratio, williams

NULLS = 2000
QUICK, ROUNDS = (5, 8, 20), (5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 30, 40, 50, 60)
SPREAD = 0.04  # standard deviation of one run's log time on the machines that the lab was measured on


def _series(random: np.random.Generator, rounds: int, arms: int, correlation: float) -> NDArray[np.float64]:
    """Simulate log times [rounds, arms], each arm a stationary AR(1) process."""
    noise = random.normal(size=(rounds + 10, arms))
    series: NDArray[np.float64] = lfilter([math.sqrt(1 - correlation**2)], [1, -correlation], noise, axis=0)
    return SPREAD * series[10:]


def _drift(random: np.random.Generator, rounds: int) -> NDArray[np.float64]:
    """Simulate independent log times of three arms on a machine that gets slower, or faster, from run to run."""
    times, orders, slope = _series(random, rounds, 3, 0.0), williams(3), 0.01 * random.normal()
    for round_ in range(rounds):
        for place, arm in enumerate(orders[round_ % len(orders)]):
            times[round_, arm] += slope * (3 * round_ + place)
    return times


def _claimed(times: NDArray[np.float64], effect: float = 0.0) -> bool:
    null, other = ratio({"": times[:, 0] - times[:, 1]}), ratio({"": times[:, 0] - times[:, 2] + effect})
    return claims({"other": other}, null)["other"]


@pytest.mark.parametrize("rounds", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROUNDS])
@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["independent", "drifting", "autocorrelated"])
def test_at_most_seven_percent_of_the_nulls_are_claimed(kind: str, rounds: int) -> None:
    random = np.random.default_rng([rounds, len(kind)])
    claimed = excluded = 0
    for _ in range(NULLS):
        drifting, correlation = kind == "drifting", 0.3 if kind == "autocorrelated" else 0.0
        times = _drift(random, rounds) if drifting else _series(random, rounds, 3, correlation)
        claimed += _claimed(times)
        interval = ratio({"": times[:, 0] - times[:, 2]}).rounds
        assert interval is not None
        excluded += interval.excludes_one
    assert claimed <= 0.07 * NULLS
    assert excluded <= 0.08 * NULLS  # the interval alone, without the null arm


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_an_effect_of_five_percent_is_found_within_sixty_rounds(correlation: float) -> None:
    random = np.random.default_rng(5)
    found = sum(_claimed(_series(random, 60, 3, correlation), math.log(1.05)) for _ in range(500))
    assert found >= 0.8 * 500


def test_rounds_that_stop_at_a_precision_hold_the_level_too() -> None:
    random, claimed = np.random.default_rng(6), 0
    for _ in range(NULLS):
        times = _series(random, 60, 3, 0.3) / 2
        rounds = 5
        while rounds < 60 and any(precision({"": times[:rounds, 0] - times[:rounds, arm]}) > 0.02 for arm in (1, 2)):
            rounds += 1
        claimed += _claimed(times[:rounds])
    assert claimed <= 0.07 * NULLS


@pytest.mark.parametrize(
    ("prompts", "rounds"), [(8, 3), (12, 5), (50, 2), pytest.param(100, 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("tries", [400, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.covering(1)
def test_the_two_level_interval_covers_the_mean_of_all_prompts(
    prompts: int, rounds: int, skewed: bool, tries: int
) -> None:
    random, covered = np.random.default_rng([prompts, rounds]), 0
    for _ in range(tries):
        draws = random.gamma(4.0, 0.5, prompts) - 2.0 if skewed else random.normal(size=prompts)
        effects = 0.5 + 0.15 * draws
        runs = _series(random, prompts * rounds, 1, 0.3)[:, 0].reshape(rounds, prompts) + effects
        interval = ratio({str(at): runs[:, at] for at in range(prompts)}).prompts
        assert interval is not None
        covered += interval.low <= math.exp(0.5) <= interval.high
    slack = math.sqrt(0.05 * 0.95 * tries)  # one standard deviation
    assert 0.93 * tries - slack <= covered <= 0.97 * tries + slack


def test_a_ratio_is_the_exponential_of_the_mean_log_ratio() -> None:
    found = ratio({"a": [math.log(2)] * 2, "b": [math.log(8)] * 4})  # every prompt has the same weight
    assert found.value == pytest.approx(4.0)
    assert (found.rounds, found.prompts) == (None, None)
    assert str(found) == "4.00"


def test_few_rounds_and_few_prompts_have_no_interval() -> None:
    logs = [0.1, 0.12, 0.09, 0.11]
    assert ratio({"": logs}).rounds is None
    assert ratio({"": [*logs, 0.1]}).rounds is not None
    assert ratio({str(at): [value, value] for at, value in enumerate(logs)}).prompts is None
    assert ratio({str(at): [value] for at, value in enumerate([*logs, 0.1])}).prompts is not None
    with pytest.raises(ValueError, match="no pair"):
        ratio({})


def test_the_interval_says_which_one_a_claim_uses() -> None:
    both = Ratio(2.0, Interval(1.9, 2.1, 0.001), Interval(1.5, 2.6, 0.01))
    assert both.interval == both.prompts
    assert str(both) == "2.00 [1.50, 2.60]"
    assert Ratio(2.0, both.rounds).interval == both.rounds
    assert Interval(math.exp(-0.02), math.exp(0.02), 0.5).half_width == pytest.approx(0.02)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


NULL = Ratio(1.0, Interval(0.99, 1.01, 0.9))
FASTER = Ratio(1.1, Interval(1.08, 1.12, 1e-4))


def test_a_claim_needs_a_null_arm_that_allows_one_and_is_tighter_than_the_effect() -> None:
    assert claims({"b": FASTER}, NULL) == {"b": True}
    assert claims({"b": FASTER}, Ratio(1.02, Interval(1.01, 1.03, 0.01))) == {"b": False}  # differs from itself
    assert claims({"b": FASTER}, Ratio(1.0, Interval(0.88, 1.13, 0.9))) == {"b": False}  # its spread exceeds the effect
    assert claims({"b": FASTER}, Ratio(1.0)) == {"b": False}  # no interval
    assert claims({"b": Ratio(1.1)}, NULL) == {"b": False}


def test_several_comparisons_are_corrected_and_both_intervals_count() -> None:
    border = Ratio(1.1, Interval(1.01, 1.2, 0.03))
    assert claims({"b": border}, NULL) == {"b": True}
    assert claims({"b": border, "c": border}, NULL) == {"b": False, "c": False}
    prompts_differ = Ratio(1.1, Interval(1.08, 1.12, 1e-4), Interval(0.9, 1.3, 0.4))
    assert claims({"b": prompts_differ}, NULL) == {"b": False}


@pytest.mark.parametrize("count", range(2, 9))
def test_in_a_williams_design_each_variant_follows_each_other_equally_often(count: int) -> None:
    orders = williams(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(pairs) == count * (count - 1)
    assert len(set(pairs.values())) == 1
    for place in range(count):  # and each is in each place equally often
        assert len(set(Counter(order[place] for order in orders).values())) == 1


def test_two_variants_are_mirrored() -> None:
    assert williams(2) == [[0, 1], [1, 0]]


def test_two_runs_that_were_measured_apart() -> None:
    random = np.random.default_rng(1)

    def logs(effect: float) -> dict[str, list[float]]:
        return {str(at): list(0.3 * (at % 3) + effect + 0.01 * random.normal(size=6)) for at in range(12)}

    same, changed = between(logs(0.0), logs(0.0)), between(logs(0.0), logs(0.1))
    assert same.rounds is not None
    assert not same.rounds.excludes_one
    assert changed.value == pytest.approx(math.exp(0.1), rel=0.02)
    assert changed.prompts is not None
    assert changed.prompts.excludes_one
    assert MIN_ROUNDS == 5
