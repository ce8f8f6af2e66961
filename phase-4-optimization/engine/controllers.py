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
from statistics import median_low
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from common.errors import UserError

if TYPE_CHECKING:
    from .speculative import StepStats

ControllerName = Literal["fixed", "adaptive", "confidence", "cost"]


class KController(Protocol):
    """One per sequence: what it has learned of one text does not leak into another."""

    def next_k(self) -> int:
        """How many tokens to draft at most; 0 declines."""
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

    def next_k(self) -> int:
        return self.k

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

    def next_k(self) -> int:
        return self.k

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

    def next_k(self) -> int:
        self.drafted = 0
        return self.bounds.high

    def stop(self, draft_probs: Tensor) -> bool:
        if self.drafted >= self.bounds.low and float(draft_probs.max()) < self.confidence:
            return True
        self.drafted += 1
        return False

    def observe(self, step: StepStats) -> None:
        """Each draft is judged by itself."""


def _recent() -> deque[float]:
    return deque(maxlen=5)


@dataclass
class CostModel:
    """What drafting and verifying took in the last few steps: of the machine and the models, not of a text."""

    draft_ms: deque[float] = field(default_factory=_recent)  # of one draft token
    position_ms: deque[float] = field(default_factory=_recent)  # of the target, per text or draft token
    fixed_ms: deque[float] = field(default_factory=_recent)  # of the rule, per step that drafted


@dataclass
class CostController:
    """The K with the most expected tokens per second; 0 where no K beats plain decoding.

    Expected tokens: 1 + s_1 + ... + s_K, where s_j is the product of the chances a_1 .. a_j that the draft's i-th token
    stands once those before it do. Each a_i is a weighted count of what was seen, older steps counting less; a_1 starts
    from `prior`, each other leans on the one before it, and is that one where nothing was tried yet. Expected time: K
    draft tokens, and a target forward over text and draft, which costs as much as `overhead` positions before it has
    computed any (generate.py, `of_similar_length`); what a draft token and a position of the target cost are medians of
    the last few steps, for the first forward of a process, or a stalled one, is many times slower. While nothing is
    known of costs drafts are short, and so is a text's first. While it declines it looks again after `retry` steps,
    then after twice as many, and so on, with a single token.
    """

    bounds: Bounds
    prior: float = 0.8  # chance that a draft token stands, before any was seen
    prior_weight: float = 0.7  # in steps seen
    lean: float = 4.0  # of a position on the one before it, in steps seen
    decay: float = 0.95  # of the weight of what was seen, per step
    retry: int = 16
    first_k: int = 3
    overhead: int = 64  # of a target forward, in positions
    accepted: int = 0  # of the last draft
    tried: list[float] = field(default_factory=list)
    stood: list[float] = field(default_factory=list)
    costs: CostModel = field(default_factory=CostModel)  # may be known from texts before
    drafts: int = 0  # of this text
    length: int = 0
    declined: int = 0
    wait: int = 0

    def __post_init__(self) -> None:
        self.wait = self.retry
        later = [0.0] * (self.bounds.high - 1)
        self.tried, self.stood = [self.prior_weight, *later], [self.prior * self.prior_weight, *later]

    def next_k(self) -> int:
        known = len(self.costs.draft_ms) >= 2
        if not known or not self.length:
            return self.bounds.clip(self.accepted + 1 if self.drafts else self.first_k)
        if 0 < self.declined < self.wait:  # nothing new was seen since it declined
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
        """0, or the K within the bounds, that promises most tokens per millisecond at the present length."""
        draft, position, fixed = map(median_low, (self.costs.draft_ms, self.costs.position_ms, self.costs.fixed_ms))
        plain = (self.length + self.overhead) * position
        best, most = 0, 1 / plain
        chance, tokens, survives = self.stood[0] / self.tried[0], 1.0, 1.0
        for k in range(1, self.bounds.high + 1):
            if k > 1:
                chance = (self.stood[k - 1] + self.lean * chance) / (self.tried[k - 1] + self.lean)
            survives *= chance
            tokens += survives
            cost = plain + k * (position + draft) + fixed
            if k >= self.bounds.low and tokens / cost > most:
                best, most = k, tokens / cost
        return best

    def stop(self, draft_probs: Tensor) -> bool:
        return False

    def observe(self, step: StepStats) -> None:
        self.length = step.length + step.emitted
        self.costs.position_ms.append(step.verify_ms / (self.overhead + step.length + step.proposed))
        for at in range(self.bounds.high):
            if at or self.tried[at] > 1:  # of the first token, what is known never counts less than one look
                self.tried[at] *= self.decay
                self.stood[at] *= self.decay
        if not step.depth:
            return
        self.accepted = step.accepted
        self.drafts += 1
        self.costs.draft_ms.append(step.draft_ms / step.depth)
        self.costs.fixed_ms.append(step.accept_ms)
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
    costs: CostModel | None = None,
) -> KController:
    """A fresh controller of this name, for one sequence. `cost` may know from other sequences what things cost."""
    if name == "fixed":
        return FixedController(k)
    bounds = Bounds(min_k, max_k)
    if name == "adaptive":
        return AdaptiveController(k, bounds, target_acceptance)
    if name == "confidence":
        return ConfidenceController(bounds, confidence)
    return CostController(bounds, costs=costs or CostModel())
