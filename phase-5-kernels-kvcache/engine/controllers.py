"""K controllers: how many tokens to draft.

A controller chooses K before a draft, may end the draft early, and observes the result. It may read a draft
distribution only BEFORE a token is drawn from it. Ending a draft because of the token just drawn, and dropping that
token, would select drafts with a bias, and the output would no longer follow the target's law. For the same reason a
controller that ends drafts early must not learn from their lengths: a length depends on the tokens after the first
rejected one, and the next draft is drawn with the same noise as those.

- fixed: always K.
- adaptive: raise or lower K by one, comparing a moving acceptance with a target rate (as in transformers' assisted
  generation, but by rate instead of by single steps).
- confidence: draft while the drafter's most likely token is likely enough (Kangaroo, Liu et al. 2024; EAGLE-2's
  observation that draft confidence predicts acceptance).
- cost: the K with the most expected tokens per second, for all rows of a batch; see CostController.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from common.errors import UserError

from .cost_model import ALLOWANCE, LOOK, STALE, START, Acceptance, CostModel

if TYPE_CHECKING:
    from .steps import StepStats

ControllerName = Literal["fixed", "adaptive", "confidence", "cost"]
SETTLED = 16  # steps for which an answer of CostController holds once it has seen a text
FIRST = 4  # steps for which the first answers hold
PROBE = 6  # plain steps that measure anew what one costs
MARGIN = 1.05  # expected gain from which drafts are made: lower quartiles of a step's parts leave out its delays
LOOKS = 4  # steps of a test: in the first, the drafter reads what it missed
ALWAYS = 64  # steps for which the answer holds that no draft can pay; plain steps between tests at least


class KController(ABC):
    """Chooses K for one sequence; every sequence has its own."""

    ends_early: ClassVar = False  # True if `stop` may ever return True

    @abstractmethod
    def next_k(self) -> int:
        """Return the largest number of tokens to draft; 0 means no draft in this step."""

    def stop(self, draft_probs: Tensor) -> bool:
        """Return True to end the draft before a token is drawn from draft_probs [V]."""
        return False

    def observe(self, step: StepStats) -> None:  # noqa: B027
        """Learn from a finished step; by default nothing."""

    def observe_plain(self, steps: int) -> None:  # noqa: B027
        """Learn from so many steps without a draft that one call made."""


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest K a controller may choose."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise UserError(f"min_k must be at least 1 and at most max_k, got {self.low} and {self.high}")

    def clip(self, k: int) -> int:
        return min(max(k, self.low), self.high)


@dataclass
class FixedController(KController):
    k: int

    def next_k(self) -> int:
        return self.k


@dataclass
class AdaptiveController(KController):
    """Raises K while more than the target share of the draft tokens of the last `window` steps was accepted."""

    k: int
    bounds: Bounds
    target_acceptance: float = 0.7
    window: int = 4
    step: int = 1
    recent: deque[tuple[int, int]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if not 0 < self.target_acceptance < 1:
            raise UserError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")
        self.k, self.recent = self.bounds.clip(self.k), deque(maxlen=self.window)

    def next_k(self) -> int:
        return self.k

    def observe(self, step: StepStats) -> None:
        if not step.proposed:
            return
        self.recent.append((step.accepted, step.proposed))
        accepted, proposed = map(sum, zip(*self.recent, strict=True))
        if accepted > self.target_acceptance * proposed:
            self.k = self.bounds.clip(self.k + self.step)
        elif accepted < self.target_acceptance * proposed:
            self.k = self.bounds.clip(self.k - self.step)


@dataclass
class ConfidenceController(KController):
    """Drafts min_k tokens, then on to max_k while the likeliest token's probability is at least `confidence`."""

    ends_early: ClassVar = True
    bounds: Bounds
    confidence: float = 0.4
    drafted: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise UserError(f"confidence must be in [0, 1], a probability under the draft, got {self.confidence}")

    def next_k(self) -> int:
        self.drafted = 0
        return self.bounds.high

    def stop(self, draft_probs: Tensor) -> bool:
        if self.drafted >= self.bounds.low and float(draft_probs.max()) < self.confidence:
            return True
        self.drafted += 1
        return False


@dataclass
class CostController(KController):
    """Chooses the K with the most expected tokens per second; 0 where no K beats plain decoding by MARGIN.

    Rows of a batch share a step, so one K is chosen for all of them (Leviathan et al. 2023, section 3.5, for one row):

        expected tokens(K) = sum over rows r of 1 + s_r1 + ... + s_rK
        expected time(K)   = K draft positions, a forward over all rows and drafts, the acceptance rule

    s_rj is the product a_r1 ... a_rj, where a_ri is the probability that the i-th draft token of row r is accepted if
    those before it were: a share of accepted tokens with less weight on older drafts. Its prior is the acceptance of
    earlier texts. Times are measured (cost_model.py).

    While no K pays, a draft is made now and then as a test, unless it would lose if all of it were accepted. Tests may
    cost 0.5% of the time. Expectations can be wrong, because times are noisy and texts differ. So no draft is made
    while the drafts so far, by their measured times and tokens, have lost more than ALLOWANCE plain steps; a loss is
    forgiven at 0.5% of the time.
    """

    bounds: Bounds
    cost_model: CostModel = field(default_factory=CostModel)  # shared with other sequences
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(0.95))
    prior_weight: float = 4.0  # of earlier texts, in observations
    first_k: int = 3  # before anything was measured
    drafts: int = 0  # of this sequence
    drafted: bool = False  # whether its last step did
    holds: int = 1  # steps for which the last answer holds
    declined: int = 0  # of them, those that are left, if the answer was to draft nothing

    def next_k(self) -> int:
        return choose([self], [self.bounds.high])[0]

    def tokens(self, chances: list[float]) -> list[float]:
        """Return the expected tokens of a step with 0, 1, ... draft tokens; chances: acceptance in earlier texts."""
        expected, survives = [1.0], 1.0
        for at, prior in enumerate(chances):
            survives *= self.acceptance.estimate(at, prior, self.prior_weight)
            expected.append(expected[-1] + survives)
        return expected

    def observe(self, step: StepStats) -> None:
        """Record the acceptance; the times of a step belong to all of its rows: see `observe` below."""
        if not step.depth:
            self.observe_plain(1)
            return
        self.drafted = True
        self.drafts += 1
        self.acceptance.observe(step.depth, step.accepted)

    def observe_plain(self, steps: int) -> None:
        self.drafted = False
        self.declined -= steps


def choose(controllers: Sequence[CostController], limits: list[int]) -> list[int]:
    """Return how many tokens each row drafts, at most limits[r], and set for how many steps that holds."""
    widths, holds = _choose(controllers, limits)
    for controller in controllers:
        controller.holds, controller.declined = holds, 0 if any(widths) else holds
    return widths


def _choose(controllers: Sequence[CostController], limits: list[int]) -> tuple[list[int], int]:
    cost_model, bounds, rows = controllers[0].cost_model, controllers[0].bounds, len(limits)
    none = [0] * rows
    cost_model.looking = False
    if not cost_model.known:  # not even by prices.py
        unmeasured = not cost_model.draft.recent
        return [min(limit, controllers[0].first_k) if unmeasured else 0 for limit in limits], 1
    if not any(limits):  # a lookup found nothing; another interrupts plain decoding
        return none, 2 * SETTLED
    if cost_model.age > STALE:
        return none, PROBE
    chances = cost_model.chances(min(bounds.high, max(limits)))
    expected = [controller.tokens(chances) for controller in controllers]
    plain = rows / cost_model.time(none)
    best, most, may_pay = none, 0.0, False
    for k in range(bounds.low, min(bounds.high, max(limits)) + 1):
        widths = [min(k, limit) for limit in limits]
        took = cost_model.time(widths)
        rate = sum(of_row[width] for of_row, width in zip(expected, widths, strict=True)) / took
        may_pay |= (rows + sum(widths)) / took > plain
        if rate > most:
            best, most = widths, rate
    enough = plain * MARGIN
    if most <= enough and cost_model.age:  # the machine may have become slower since the last plain step
        return none, PROBE
    gained = LOOK * cost_model.time(none)  # by a plain step, for tests and losses
    if most > enough:
        if (debt := -cost_model.balance - ALLOWANCE * cost_model.time(none)) > 0:
            return none, max(SETTLED, min(math.ceil(debt / gained), ALWAYS))
        return best, SETTLED if all(controller.drafts > 1 for controller in controllers) else FIRST
    if not may_pay:
        return none, ALWAYS
    loss = cost_model.time(best) * max(1 - most / plain, 1 - 1 / MARGIN)
    if cost_model.credit >= loss:
        cost_model.credit, cost_model.looking = loss, True
        return best, LOOKS
    return none, max(ALWAYS, math.ceil((loss - cost_model.credit) / gained))


def observe(
    controllers: Sequence[KController], stats: Sequence[StepStats], alone: bool = True, spared_ms: float = 0.0
) -> None:
    """Tell each row's controller its part of a step, and the cost model the whole of it, once.

    alone: the times are those of these rows and of their drafts. spared_ms: see CostModel.observe.
    """
    leader = controllers[0]
    if alone and isinstance(leader, CostController):
        steady = all(isinstance(each, CostController) and each.drafted for each in controllers)
        leader.cost_model.observe(stats, steady, spared_ms)
    for controller, of_row in zip(controllers, stats, strict=True):
        controller.observe(of_row)


def observe_plain(controllers: Sequence[KController], steps: int, took: float | None, warm: bool = True) -> None:
    """Tell the controllers of so many steps without drafts in one call.

    took: milliseconds of a step, None if a prompt was computed as well. warm: see CostModel.observe_plain.
    """
    leader = controllers[0]
    if isinstance(leader, CostController):
        if took is not None:
            leader.cost_model.observe_plain(len(controllers), took / START, steps, warm)
        leader.cost_model.age = 0
    for controller in controllers:
        controller.observe_plain(steps)


def make_controller(
    name: ControllerName,
    k: int = 4,
    min_k: int = 1,
    max_k: int = 8,
    target_acceptance: float = 0.7,
    confidence: float = 0.4,
    cost_model: CostModel | None = None,
) -> KController:
    """Make a controller for one sequence. `cost_model` holds measurements from other sequences, for `cost`."""
    if name == "fixed":
        return FixedController(k)
    bounds = Bounds(min_k, max_k)
    if name == "adaptive":
        return AdaptiveController(k, bounds, target_acceptance)
    if name == "confidence":
        return ConfidenceController(bounds, confidence)
    return CostController(bounds, cost_model=cost_model or CostModel())
