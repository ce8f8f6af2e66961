"""Predicts the time of a step of a batch, and the acceptance of its draft, from measurements.

The expected speed-up of speculative decoding follows from two measured quantities (Leviathan et al. 2023, section 3.5):
the acceptance of draft tokens, and the cost of drafting and verifying them in plain steps. Both depend on the machine,
the models, the number format and the number of rows, so both are measured. Four tables of times are enough:

- plain: a step without drafts, by rows;
- verify: the target's forward, by all its tokens, those of the rows and the draft's;
- draft: one position of the drafts, by the rows that draft there;
- accept: the acceptance rule and the bookkeeping, by rows.

Without a cache a forward computes whole sequences. All times are therefore divided by START + the positions that the
target computes besides one per row, which is a constant with a cache.

prices.py measures the tables before the first draft; every step refreshes them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .steps import StepStats

START = 64  # assumed overhead of a forward pass without a cache, in positions
STALE = 128  # steps with drafts after which plain steps are made again
PLAIN = 3  # times of plain steps that count: while drafts are made, a new one comes only every STALE steps
LOOK = 0.005  # share of the time that may be lost by drafting as a test
ALLOWANCE = 64  # plain steps that drafts may lose to plain decoding
STALL = 2.0  # a step longer than this multiple of its expected time was interrupted, and is capped at it
PRIOR, PRIOR_WEIGHT = 0.8, 4.0  # acceptance before any observation, and its weight in observations
LEAN = 4.0  # weight of position i - 1 in the estimate of position i, in observations


def usual(times: Iterable[float]) -> float:
    """Return the lower quartile: forward passes that stalled, or found their weights evicted, do not count."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4]


class Table:
    """The last `keep` times by size. Linear between measured sizes, and beyond them with the mean slope."""

    def __init__(self, keep: int = 9) -> None:
        self.keep = keep
        self.recent: dict[int, deque[float]] = {}
        self._usual: dict[int, float] = {}  # of every size that was observed
        self._line: tuple[list[int], list[float]] | None = None

    def observe(self, size: int, time: float) -> None:
        recent = self.recent.setdefault(size, deque(maxlen=self.keep))
        recent.append(time)
        self._usual[size] = usual(recent)
        self._line = None

    def line(self) -> tuple[list[int], list[float]]:
        """Return the sizes and their usual times. Smaller sizes never cost more: a larger measured time is noise."""
        if self._line is None:
            sizes = sorted(self.recent)
            times = [self._usual[size] for size in sizes]
            for at in range(len(times) - 1, 0, -1):
                if times[at - 1] > times[at]:
                    times[at - 1] = times[at]
            self._line = sizes, times
        return self._line

    def usual(self) -> dict[int, float]:
        """Return the usual time by size."""
        return dict(zip(*self.line(), strict=True))

    def mean(self, size: int) -> float:
        """Return the mean time of this size, each capped at STALL times `at`; `at` if it was not measured."""
        limit, recent = STALL * self.at(size), self.recent.get(size)
        return sum(min(time, limit) for time in recent) / len(recent) if recent else self.at(size)

    def at(self, size: int) -> float:
        """Return the time of this size; the table must not be empty."""
        sizes, times = self.line()
        if size <= sizes[0]:
            return times[0]
        if size >= sizes[-1]:
            slope = (times[-1] - times[0]) / (sizes[-1] - sizes[0]) if len(sizes) > 1 else 0.0
            return times[-1] + slope * (size - sizes[-1])
        above = bisect_left(sizes, size)
        share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
        return times[above - 1] + share * (times[above] - times[above - 1])


class Acceptance:
    """Estimates the probability that the i-th draft token is accepted if those before it were, from decaying counts."""

    def __init__(self, decay: float) -> None:
        self.decay = decay  # factor on the weight of old observations, per draft
        self.tried, self.passed = list[float](), list[float]()

    def observe(self, depth: int, accepted: int) -> None:
        """Count a draft; the first rejected token counts as tried, those after it do not."""
        for at in range(len(self.tried)):
            self.tried[at] *= self.decay
            self.passed[at] *= self.decay
        for at in range(min(depth, accepted + 1)):
            if at == len(self.tried):
                self.tried.append(0.0)
                self.passed.append(0.0)
            self.tried[at] += 1
            self.passed[at] += at < accepted

    def estimate(self, at: int, prior: float, weight: float) -> float:
        """Return the probability at a position, if `prior` counts as so many observations."""
        if at >= len(self.tried):
            return prior
        return (self.passed[at] + weight * prior) / (self.tried[at] + weight)


@dataclass
class CostModel:
    """Times on this machine with these models, and the acceptance so far; all sequences of an LLM share them."""

    plain: Table = field(default_factory=lambda: Table(PLAIN))
    verify: Table = field(default_factory=Table)
    draft: Table = field(default_factory=Table)
    accept: Table = field(default_factory=Table)
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(0.98))
    nodes: dict[int, int] = field(default_factory=dict)  # of a tree with so many levels
    age: int = 0  # steps with drafts since the last plain one
    credit: float = 0.0  # time that may be lost by a draft that is a test
    looking: bool = False  # whether the present draft is one
    balance: float = 0.0  # time that drafts lost to plain decoding, below 0; gains make up for losses before them
    spent: float = 0.0  # time of all steps that were observed

    @property
    def tables(self) -> dict[str, Table]:
        return {"plain": self.plain, "verify": self.verify, "draft": self.draft, "accept": self.accept}

    @property
    def known(self) -> bool:
        """Return True if every part of a step was measured."""
        return all(table.recent for table in self.tables.values())

    def time(self, widths: Sequence[int]) -> float:
        """Predict the time of a step that drafts widths[r] tokens for row r."""
        rows, drafts, level = len(widths), 0.0, 0
        for at, width in enumerate(sorted(widths)):  # at the levels between two widths all but `at` rows draft
            if width > level:
                drafts += (width - level) * self.draft.at(rows - at)
                level = width
        if not level:  # a measured plain step that costs more than a larger step is noise
            return min(self.plain.at(rows), self.verify.at(rows) + self.accept.at(rows))
        nodes = sum(map(self.nodes.get, widths, widths))
        return drafts + self.verify.at(rows + nodes) + self.accept.at(rows)

    def chances(self, count: int) -> list[float]:
        """Return the acceptance of each position in the texts so far."""
        found, chance, weight = list[float](), PRIOR, PRIOR_WEIGHT
        for at in range(count):
            chance, weight = self.acceptance.estimate(at, chance, weight), LEAN
            found.append(chance)
        return found

    def observe(self, stats: Sequence[StepStats], steady: bool = True, spared_ms: float = 0.0) -> None:
        """Record a step of all rows. Of a step with a prefill only the time for drafting counts.

        steady: the step before drafted as well. Otherwise the drafter has also read the tokens in between.
        spared_ms: of the step's time, what a call of as many steps as possible would not have cost it. It is no part of
        the price of a step, but it was spent.
        """
        rows, step = len(stats), stats[0]
        load, drafted, deepest, prefilled = START - rows, 0, 0, False
        for each in stats:
            if each.depth:
                self.acceptance.observe(each.depth, each.accepted)
                drafted, deepest = drafted + each.proposed, max(deepest, each.depth)
            load += each.plain
            prefilled |= each.computed > each.proposed + each.plain
        took = (step.draft_ms + step.verify_ms + step.accept_ms) / load
        if deepest and self.known:
            plain, drafting = self.plain.mean(rows), step.draft_ms / load
            most = STALL * self.time([each.depth for each in stats]) + (0.0 if steady else drafting)
            cost = min(took, most)
            if prefilled:  # the target's prefill is not the draft's cost
                cost = drafting + self.verify.at(rows + drafted) + self.accept.at(rows)
            gain = plain * sum(each.emitted for each in stats) / rows - cost
            self.credit += gain if self.looking else 0.0
            self.balance += gain
        if prefilled:
            return
        if not deepest:
            self.observe_plain(rows, took)
            return
        self._forgive(took)
        self.age += 1
        self.nodes.update((each.depth, each.proposed) for each in stats if each.proposed > each.depth)
        self.verify.observe(rows + drafted, step.verify_ms / load)
        self.accept.observe(rows, (step.accept_ms - spared_ms) / load)
        if steady or not self.draft.recent:
            drafting_rows = sum(each.depth for each in stats) / deepest
            self.draft.observe(max(1, round(drafting_rows)), step.draft_ms / deepest / load)

    def observe_plain(self, rows: int, took: float, steps: int = 1, warm: bool = True) -> None:
        """Record so many steps without drafts. One entry for all: those of a long call would replace all others.

        took: of a step, as in the middle of a long call. warm: False if the call was too short to tell; then it only
        passes the time.
        """
        if warm:
            self.plain.observe(rows, took)
        self._forgive(took * steps)
        self.age = 0

    def _forgive(self, took: float) -> None:
        self.spent += took
        self.credit += LOOK * took
        self.balance = min(0.0, self.balance + LOOK * took)
