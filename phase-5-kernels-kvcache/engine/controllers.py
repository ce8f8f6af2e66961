"""How many tokens to draft: K controllers.

A controller is asked for K before a draft, may end a draft early, and is told what became of it. It may look at draft
distributions only BEFORE a token is drawn from them: a draft that ends because of the token it has just drawn, and
drops it, would leave a biased selection of drafts behind, and the output would no longer follow the target's law. For
the same reason one that ends drafts early must not learn from how far they got: that tells of tokens behind one that
fell, and the next draft draws with their noise again.

- fixed: always K.
- adaptive: K up or down by a step, by comparing a moving acceptance with a target rate (as in transformers' assisted
  generation, but by rate instead of by single steps).
- confidence: draft on while the drafter's most likely token is likely enough (Kangaroo, Liu et al. 2024; EAGLE-2's
  observation that draft confidence predicts acceptance).
- cost: the K with the most expected tokens per second, from measured costs and survival; see CostController.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from common.errors import UserError

from .cost_model import CostModel, usual

if TYPE_CHECKING:
    from .steps import StepStats

AHEAD = 4  # steps that are decided together

ControllerName = Literal["fixed", "adaptive", "confidence", "cost"]


class KController(Protocol):
    """One per sequence: what it has learned of one text does not leak into another."""

    @property
    def ends_early(self) -> bool:
        """Whether `stop` may ever say yes."""
        ...

    def next_k(self) -> int:
        """How many tokens to draft at most; 0 declines."""
        ...

    @property
    def holds(self) -> int:
        """For how many steps that answer stands, where a runner can make several in one call."""
        ...

    def stop(self, draft_probs: Tensor) -> bool:
        """Whether to end the draft before a token is drawn from draft_probs [V]."""
        ...

    def observe(self, step: StepStats) -> None: ...


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
class FixedController:
    k: int

    @property
    def ends_early(self) -> bool:
        return False

    def next_k(self) -> int:
        return self.k

    @property
    def holds(self) -> int:
        return AHEAD

    def stop(self, draft_probs: Tensor) -> bool:
        return False

    def observe(self, step: StepStats) -> None:
        """Nothing changes its mind."""


@dataclass
class AdaptiveController:
    """K + step while more than the target share of the last `window` steps' draft tokens stands; else K - step."""

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

    @property
    def ends_early(self) -> bool:
        return False

    def next_k(self) -> int:
        return self.k

    @property
    def holds(self) -> int:
        return 1

    def stop(self, draft_probs: Tensor) -> bool:
        return False

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
class ConfidenceController:
    """Up to max_k tokens, while the drafter gives its favourite at least `confidence`; the first min_k regardless."""

    bounds: Bounds
    confidence: float = 0.4
    drafted: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise UserError(f"confidence must be in [0, 1], a probability under the draft, got {self.confidence}")

    @property
    def ends_early(self) -> bool:
        return True

    def next_k(self) -> int:
        self.drafted = 0
        return self.bounds.high

    @property
    def holds(self) -> int:
        return 1

    def stop(self, draft_probs: Tensor) -> bool:
        if self.drafted >= self.bounds.low and float(draft_probs.max()) < self.confidence:
            return True
        self.drafted += 1
        return False

    def observe(self, step: StepStats) -> None:
        """Each draft is judged by itself."""


@dataclass
class CostController:
    """The K with the most expected tokens per second; 0 where no K beats plain decoding.

    Expected tokens: 1 + s_1 + ... + s_K, where s_j is the product of the chances a_1 .. a_j that the draft's i-th token
    stands once those before it do. Each a_i is a weighted count of what was seen, older steps counting less; a_1 starts
    from `prior`, each other leans on the one before it, and is that one where nothing was tried yet. Expected time: K
    draft tokens, and a target forward with them, at the cost of the last few steps (cost_model.py). Without
    measurements drafts are short, and so is a sequence's first. While it declines it tries again after `retry` steps,
    then after twice as many, and so on, for a few steps: in the first, the draft's weights are not in the CPU's caches.
    """

    bounds: Bounds
    prior: float = 0.8  # chance that a draft token stands, before any was seen
    prior_weight: float = 0.7  # in steps seen
    lean: float = 4.0  # of a position on the one before it, in steps seen
    decay: float = 0.95  # of the weight of what was seen, per step
    retry: int = 16
    look: int = 2  # draft tokens of the first step that looks again, and steps behind it
    first_k: int = 3
    accepted: int = 0  # of the last draft
    tried: list[float] = field(default_factory=list)
    stood: list[float] = field(default_factory=list)
    cost_model: CostModel = field(default_factory=CostModel)  # may be known from texts before
    drafts: int = 0  # of this text
    plain: int = 0  # positions that the target computes in a step without a draft
    declined: int = 0
    looking: int = 0
    wait: int = 0
    declining: bool = False  # whether the last answer was 0 because no K would pay

    def __post_init__(self) -> None:
        self.wait = self.retry
        later = [0.0] * (self.bounds.high - 1)
        self.tried, self.stood = [self.prior_weight, *later], [self.prior * self.prior_weight, *later]

    @property
    def ends_early(self) -> bool:
        return False

    def next_k(self) -> int:
        self.declining = False
        if not self.cost_model.known or not self.plain:
            return self.bounds.clip(self.accepted + 1 if self.drafts else self.first_k)
        if self.cost_model.wants_plain:
            return 0
        if self.looking:
            self.looking -= 1
            return self.bounds.clip(self.accepted + 1)
        if self.declined >= self.wait:
            self.declined, self.wait, self.looking = 0, 2 * self.wait, self.look
            return self.bounds.clip(self.look)
        if not self.declined:  # otherwise nothing new was seen since it declined
            k = self.best()
            if k > 0:
                self.wait = self.retry
                return k
        self.declining = True
        return 0

    @property
    def holds(self) -> int:
        if self.declining:
            return self.wait - self.declined
        settled = self.cost_model.known and self.plain and self.drafts > 1 and not self.looking
        return AHEAD if settled else 1

    def best(self) -> int:
        """0, or the K within the bounds, that promises most tokens per millisecond at the present length."""
        cost_model = self.cost_model
        draft, fixed = usual(cost_model.draft_ms), usual(cost_model.fixed_ms)
        best, most = 0, 1 / cost_model.verify_ms(0, self.plain)
        chance, tokens, survives = self.stood[0] / self.tried[0], 1.0, 1.0
        for k in range(1, self.bounds.high + 1):
            if k > 1:
                chance = (self.stood[k - 1] + self.lean * chance) / (self.tried[k - 1] + self.lean)
            survives *= chance
            tokens += survives
            cost = cost_model.verify_ms(k, self.plain) + k * draft + fixed
            if k >= self.bounds.low and tokens / cost > most:
                best, most = k, tokens / cost
        return best

    def stop(self, draft_probs: Tensor) -> bool:
        return False

    def observe(self, step: StepStats) -> None:
        self.cost_model.observe(step)
        self.plain = step.plain
        self.declined += self.declining
        for at in range(self.bounds.high):
            if at or self.tried[at] > 1:  # of the first token, what is known never counts less than one look
                self.tried[at] *= self.decay
                self.stood[at] *= self.decay
        if not step.depth:
            return
        self.accepted = step.accepted
        self.drafts += 1
        for at in range(min(step.depth, step.accepted + 1, self.bounds.high)):  # the first that fell was looked at too
            self.tried[at] += 1
            self.stood[at] += at < step.accepted


def make_controller(
    name: ControllerName,
    k: int = 4,
    min_k: int = 1,
    max_k: int = 8,
    target_acceptance: float = 0.7,
    confidence: float = 0.4,
    cost_model: CostModel | None = None,
) -> KController:
    """A fresh controller of this name, for one sequence. `cost` may know prices from other sequences."""
    if name == "fixed":
        return FixedController(k)
    bounds = Bounds(min_k, max_k)
    if name == "adaptive":
        return AdaptiveController(k, bounds, target_acceptance)
    if name == "confidence":
        return ConfidenceController(bounds, confidence)
    return CostController(bounds, cost_model=cost_model or CostModel())
