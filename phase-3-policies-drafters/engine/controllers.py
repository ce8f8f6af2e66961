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
- cost: the K with the most expected tokens per second, from measured costs and survival; see CostController.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from statistics import median_low
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from common.errors import UserError

if TYPE_CHECKING:
    from .steps import StepStats

ControllerName = Literal["fixed", "adaptive", "confidence", "cost"]


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


def _recent() -> deque[float]:
    return deque(maxlen=5)


@dataclass
class CostModel:
    """Measured times of the last few steps, shared by all sequences."""

    draft_ms: deque[float] = field(default_factory=_recent)  # of one draft token
    position_ms: deque[float] = field(default_factory=_recent)  # of the target's forward, per position
    fixed_ms: deque[float] = field(default_factory=_recent)  # of the acceptance policy, per step with a draft


@dataclass
class CostController(KController):
    """Chooses the K with the most expected tokens per second; 0 where no K beats plain decoding.

    Expected tokens: 1 + s_1 + ... + s_K. s_j is the product a_1 ... a_j, where a_i is the probability that the i-th
    draft token is accepted if those before it were. Each a_i is a weighted share of accepted tokens, with less weight
    on older steps. a_1 starts from `prior`; a later a_i is smoothed towards a_(i-1), and equals it until it has data.

    Expected time: K draft tokens, and a target forward over sequence and draft. A forward has a fixed cost of
    `overhead` positions (forward.py, `of_similar_length`). The costs of a draft token and of a position are medians of
    the last few steps, because the first forward of a process, or a stalled one, is many times slower.

    Drafts are short until costs are measured, and so is the first draft of a sequence. After K = 0 one token is drafted
    as a test after `retry` steps, then after twice as many, and so on.
    """

    bounds: Bounds
    prior: float = 0.8  # acceptance probability before any observation
    prior_weight: float = 0.7  # in observations
    lean: float = 4.0  # weight of a_(i-1) in the estimate of a_i, in observations
    decay: float = 0.95  # factor on the weight of old observations, per step
    retry: int = 16
    first_k: int = 3
    overhead: int = 64  # fixed cost of a target forward, in positions
    accepted: int = 0  # of the last draft
    tried: list[float] = field(default_factory=list)  # weighted number of i-th draft tokens that were compared
    passed: list[float] = field(default_factory=list)  # likewise, that were accepted
    costs: CostModel = field(default_factory=CostModel)  # may hold measurements from other sequences
    drafts: int = 0  # of this sequence
    length: int = 0
    declined: int = 0
    wait: int = 0

    def __post_init__(self) -> None:
        self.wait = self.retry
        later = [0.0] * (self.bounds.high - 1)
        self.tried, self.passed = [self.prior_weight, *later], [self.prior * self.prior_weight, *later]

    def next_k(self) -> int:
        measured = len(self.costs.draft_ms) >= 2
        if not measured or not self.length:
            return self.bounds.clip(self.accepted + 1 if self.drafts else self.first_k)
        if 0 < self.declined < self.wait:  # no draft was observed since, so best() would be 0 again
            self.declined += 1
            return 0
        k = self.best()
        if k > 0:
            self.declined, self.wait = 0, self.retry
            return k
        self.declined += 1
        if self.declined <= self.wait:
            return 0
        self.declined, self.wait = 0, 2 * self.wait
        return self.bounds.low

    def best(self) -> int:
        """Return the K with the most expected tokens per millisecond at the present length: 0, or within the bounds."""
        draft, position, fixed = map(median_low, (self.costs.draft_ms, self.costs.position_ms, self.costs.fixed_ms))
        plain = (self.length + self.overhead) * position
        best, most = 0, 1 / plain
        chance, tokens, survives = self.passed[0] / self.tried[0], 1.0, 1.0
        for k in range(1, self.bounds.high + 1):
            if k > 1:
                chance = (self.passed[k - 1] + self.lean * chance) / (self.tried[k - 1] + self.lean)
            survives *= chance
            tokens += survives
            cost = plain + k * (position + draft) + fixed
            if k >= self.bounds.low and tokens / cost > most:
                best, most = k, tokens / cost
        return best

    def observe(self, step: StepStats) -> None:
        self.length = step.length + step.emitted
        self.costs.position_ms.append(step.verify_ms / (self.overhead + step.length + step.proposed))
        for at in range(self.bounds.high):
            if at or self.tried[at] > 1:  # the first token's weight stays at least one observation
                self.tried[at] *= self.decay
                self.passed[at] *= self.decay
        if not step.depth:
            return
        self.accepted = step.accepted
        self.drafts += 1
        self.costs.draft_ms.append(step.draft_ms / step.depth)
        self.costs.fixed_ms.append(step.accept_ms)
        for at in range(min(step.depth, step.accepted + 1, self.bounds.high)):  # the first rejected one counts as tried
            self.tried[at] += 1
            self.passed[at] += at < step.accepted


def make_controller(
    name: ControllerName,
    k: int = 4,
    min_k: int = 1,
    max_k: int = 8,
    target_acceptance: float = 0.7,
    confidence: float = 0.4,
    costs: CostModel | None = None,
) -> KController:
    """Make a controller for one sequence. `costs` holds measurements from other sequences, for `cost`."""
    if name == "fixed":
        return FixedController(k)
    bounds = Bounds(min_k, max_k)
    if name == "adaptive":
        return AdaptiveController(k, bounds, target_acceptance)
    if name == "confidence":
        return ConfidenceController(bounds, confidence)
    return CostController(bounds, costs=costs or CostModel())
