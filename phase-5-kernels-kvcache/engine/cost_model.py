"""Measures the cost of a step: the time to draft one token, and the time to verify k of them.

Without a cache, a forward pass computes the whole sequence, and a few more draft tokens cost little. With a cache, it
computes the last token and the draft. Its cost then depends on k, the model and the machine, and is measured for every
k that was tried.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .steps import StepStats

START = 64  # assumed overhead of a forward pass, in positions, until it was measured
STALE = 64  # steps after which a plain step is measured again


def _recent() -> deque[float]:
    return deque(maxlen=9)


def usual(times: Iterable[float]) -> float:
    """Return the lower quartile: forward passes that stalled, or found their weights evicted, do not count."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4]


@dataclass
class CostModel:
    """Times on this machine with these models; all sequences share them."""

    draft_ms: deque[float] = field(default_factory=_recent)  # per draft token
    fixed_ms: deque[float] = field(default_factory=_recent)  # of the acceptance rule, per step with a draft
    units: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(_recent))  # k -> ms / (START + computed)
    age: int = 0  # steps since the last plain one

    def observe(self, step: StepStats) -> None:
        """Record the times of a step; skip steps with a prefill."""
        if step.computed > step.proposed + step.plain:
            return
        self.age = self.age + 1 if step.proposed else 0
        self.units[step.proposed].append(step.verify_ms / (START + step.computed))
        if step.depth:
            self.draft_ms.append(step.draft_ms / step.depth)
            self.fixed_ms.append(step.accept_ms)

    @property
    def known(self) -> bool:
        """Return True if drafting was measured at least twice."""
        return len(self.draft_ms) >= 2

    @property
    def wants_plain(self) -> bool:
        """Return True if the time of a plain step is missing or stale."""
        return len(self.units[0]) < 2 or self.age > STALE

    def verify_ms(self, k: int, plain: int) -> float:
        """Predict the time of a forward pass over `plain` positions and k draft tokens.

        Interpolates linearly between measured k, and extrapolates beyond them. Fewer tokens never cost more: a larger
        measured time is noise.
        """
        tried = sorted(each for each, units in self.units.items() if units)
        at = [usual(self.units[each]) * (START + plain + each) for each in tried]
        at = [min(at[number:]) for number in range(len(at))]
        slope = at[0] / (START + plain + tried[0])
        if len(tried) > 1:
            slope = (at[-1] - at[0]) / (tried[-1] - tried[0])
        if k <= tried[0]:
            return at[0] - slope * (tried[0] - k)
        if k >= tried[-1]:
            return at[-1] + slope * (k - tried[-1])
        above = next(number for number, each in enumerate(tried) if each >= k)
        low, high = tried[above - 1], tried[above]
        return at[above - 1] + (at[above] - at[above - 1]) * (k - low) / (high - low)
