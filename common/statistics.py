"""Ratios of times with intervals that hold their level, and the rule by which a difference may be claimed.

A ratio is exp(mean of the paired log ratios). Two intervals go with it. `rounds` is for these prompts: a t interval,
widened for the correlation between neighbouring rounds. `prompts` is for prompts like these: a two-level bootstrap that
resamples prompts, then rounds. A claim needs the interval, Holm's correction if several variants are compared, and a
null arm: the baseline timed twice, whose own ratio has to allow 1.

    python -c "from common.statistics import *; print(ratio({'p': [0.1, 0.12, 0.09, 0.11, 0.1]}))"
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

MIN_ROUNDS = 5  # fewer rounds, or fewer prompts, give a ratio without an interval
LEVEL = 0.05
# Lag-1 autocorrelation of log ratios between neighbouring rounds, measured on shared machines. An estimate from few
# rounds is too noisy alone, so an estimate can only raise this value, and only from ENOUGH pairs on.
AUTOCORRELATION = 0.3
ENOUGH = 20
RESAMPLES = 1000
Logs = Mapping[
    str, Sequence[float] | NDArray[np.float64]
]  # of every prompt: the log ratio of each round, in the order of time


@dataclass(frozen=True)
class Interval:
    """A 95% interval of a ratio, with the p value of "the ratio is 1"."""

    low: float
    high: float
    p: float

    @property
    def half_width(self) -> float:
        """Return half the width of the interval of the log ratio: 0.02 is about 2%."""
        return math.log(self.high / self.low) / 2

    @property
    def excludes_one(self) -> bool:
        return not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Ratio:
    """A ratio with the interval on these prompts and the interval on prompts like these, where there are enough."""

    value: float
    rounds: Interval | None = None
    prompts: Interval | None = None

    @property
    def interval(self) -> Interval | None:
        """Return the interval for claims: `prompts`, or `rounds` if only rounds were varied."""
        return self.prompts or self.rounds

    def __str__(self) -> str:
        found = self.interval
        return f"{self.value:.2f}" + (f" [{found.low:.2f}, {found.high:.2f}]" if found else "")


def _inflation(count: int, correlation: float) -> float:
    """Return the variance of the mean of `count` AR(1) values, as a multiple of that of independent values."""
    lags = np.arange(1, count)
    return float(1 + 2 * ((1 - lags / count) * correlation**lags).sum())


@dataclass(frozen=True)
class _Fit:
    """Prompt means, residuals and the variance of a single pair, from all pairs of one comparison."""

    means: NDArray[np.float64]  # [prompts]
    counts: NDArray[np.int64]  # [prompts], rounds of each
    residuals: list[NDArray[np.float64]]  # of each prompt, [rounds]
    variance: float  # of one pair around its prompt's mean; nan without a second round
    inflation: float  # of the variance of the mean of all pairs
    freedom: int

    @property
    def noise(self) -> float:
        """Return the standard error of the mean log ratio on these prompts."""
        share = float((1 / self.counts).mean()) / len(self.counts)
        return math.sqrt(self.variance * self.inflation * share)


def _fit(logs: Logs) -> _Fit:
    of_prompt = [np.asarray(values, float) for values in logs.values() if len(values)]
    if not of_prompt:
        raise ValueError("no pair of runs to compare")
    means = np.array([values.mean() for values in of_prompt])
    counts = np.array([len(values) for values in of_prompt])
    residuals = [values - values.mean() for values in of_prompt]
    pairs, prompts = int(counts.sum()), len(counts)
    in_time = [each[at] for at in range(counts.max()) for each in residuals if at < len(each)]
    correlation = AUTOCORRELATION
    squares = float(np.square(in_time).sum())
    if pairs >= ENOUGH and squares > 0:
        found = float(np.dot(in_time[1:], in_time[:-1])) / squares
        found = (pairs * found + 1) / (pairs - 3) if prompts == 1 else found  # residuals of one mean: biased low
        correlation = min(max(correlation, found), 0.9)
    # Residuals of correlated rounds understate the variance; rounds of one prompt are `prompts` pairs apart.
    lost = sum(_inflation(int(count), correlation**prompts) for count in counts)
    variance = squares / (pairs - lost) if pairs > prompts else math.nan
    return _Fit(means, counts, residuals, variance, _inflation(pairs, correlation), pairs - prompts)


def _interval(center: float, error: float, freedom: int) -> Interval:
    """Return the t interval of a log ratio, and the p value of 0, as ratios."""
    half = float(special.stdtrit(freedom, 1 - LEVEL / 2)) * error
    p = float(2 * special.stdtr(freedom, -abs(center) / error)) if error > 0 else float(center == 0)
    return Interval(math.exp(center - half), math.exp(center + half), p)


def precision(logs: Logs) -> float:
    """Return the half-width of the 95% interval of the mean log ratio on these prompts, which rounds reduce.

    Infinite without a second round. The prompts' own differences do not count: more rounds do not reduce them.
    """
    fit = _fit(logs)
    return float(special.stdtrit(fit.freedom, 1 - LEVEL / 2)) * fit.noise if fit.freedom > 0 else math.inf


def _bootstrap_error(fit: _Fit, seed: int) -> float:
    """Return the standard deviation of the mean log ratio when prompts, and rounds within each, are resampled.

    The deviations of the prompts' means are shrunk to the prompts' own contribution, without the noise of their rounds,
    and residuals are scaled to the unbiased variance (Davison and Hinkley 1997, section 3.8): resampling both levels
    without this would count the noise twice.
    """
    prompts = len(fit.means)
    between = float(fit.means.var(ddof=1))
    estimated = fit.freedom > 0
    own = max(0.0, between - fit.variance * float((1 / fit.counts).mean())) if estimated else between
    effects = (fit.means - fit.means.mean()) * math.sqrt(own / between * prompts / (prompts - 1) if between else 0.0)
    squares = sum(float(np.square(each).sum()) for each in fit.residuals)
    stretch = math.sqrt(fit.variance * fit.inflation * fit.counts.sum() / squares) if estimated and squares else 0.0
    table = np.zeros((prompts, int(fit.counts.max())))
    for row, each in zip(table, fit.residuals, strict=True):
        row[: len(each)] = each * stretch
    random = np.random.default_rng(seed)
    resampled = random.integers(prompts, size=(RESAMPLES, prompts))
    means = effects[resampled].mean(1)
    for at in range(table.shape[1]):  # one more round of every resampled prompt, [resamples, prompts]
        rounds = (random.random(resampled.shape) * fit.counts[resampled]).astype(int)
        means += np.where(at < fit.counts[resampled], table[resampled, rounds] / fit.counts[resampled], 0.0).mean(1)
    return float(means.std(ddof=1))


def ratio(logs: Logs, seed: int = 0) -> Ratio:
    """Return exp(mean log ratio), every prompt with the same weight, and the intervals that the data allow.

    `logs` holds, for every prompt, the log of (baseline seconds per token / variant seconds per token) of each round.
    Work without prompts is one entry: only `rounds` varies then. Below MIN_ROUNDS rounds of every prompt there is no
    `rounds` interval; below MIN_ROUNDS prompts no `prompts` interval. Raises ValueError without any pair.
    """
    fit = _fit(logs)
    center = float(fit.means.mean())
    rounds = _interval(center, fit.noise, fit.freedom) if fit.counts.min() >= MIN_ROUNDS else None
    prompts = None
    if len(fit.means) >= MIN_ROUNDS:
        prompts = _interval(center, _bootstrap_error(fit, seed), len(fit.means) - 1)
    return Ratio(math.exp(center), rounds, prompts)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p values for several comparisons in one report (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def claims(effects: Mapping[str, Ratio], null: Ratio) -> dict[str, bool]:
    """Decide which effects may be claimed beside a null arm (the baseline timed again under another name).

    An effect is claimed if its p value is below 5% after Holm's correction, on these prompts and on prompts like these
    if both are known; if the null arm's interval includes 1; and if the effect exceeds the null arm's half-width.
    """
    intervals = {name: [i for i in (effect.rounds, effect.prompts) if i] for name, effect in effects.items()}
    tested = {name: max(interval.p for interval in found) for name, found in intervals.items() if found}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    own = [interval for interval in (null.rounds, null.prompts) if interval]
    usable = bool(own) and not any(interval.excludes_one for interval in own)
    spread = max((interval.half_width for interval in own), default=math.inf)
    return {
        name: usable and adjusted.get(name, 1.0) < LEVEL and abs(math.log(effect.value)) > spread
        for name, effect in effects.items()
    }


def williams(count: int) -> list[list[int]]:
    """Return orders of `count` variants in which each follows each other equally often (Williams 1949).

    Two variants give A B, B A. An even count gives `count` orders; an odd one twice as many, the second half mirrored.
    """
    if count < 2:
        return [list(range(count))]
    first = [0]
    for step in range(1, count):
        first.append((first[-1] + (step if step % 2 else -step)) % count)
    square = [[(position + shift) % count for position in first] for shift in range(count)]
    return square if count % 2 == 0 else square + [order[::-1] for order in square]


def between(before: Logs, after: Logs, seed: int = 0) -> Ratio:
    """Return the ratio of two ratios measured apart: after / before, over their common prompts.

    Both intervals combine the two standard errors (Welch's t). `prompts` uses the prompts' differences, in which
    the prompts' own levels cancel.
    """
    shared = [prompt for prompt in before if prompt in after and before[prompt] and after[prompt]]
    one, other = _fit({p: before[p] for p in shared}), _fit({p: after[p] for p in shared})
    change = other.means - one.means
    center = float(change.mean())
    rounds = None
    if min(one.counts.min(), other.counts.min()) >= MIN_ROUNDS:
        error = math.hypot(one.noise, other.noise)
        freedom = error**4 / (one.noise**4 / one.freedom + other.noise**4 / other.freedom) if error else one.freedom
        rounds = _interval(center, error, max(1, int(freedom)))
    prompts = ratio({str(at): [value] for at, value in enumerate(change)}, seed).prompts
    return Ratio(math.exp(center), rounds, prompts)
