"""What a step costs, by the clock: what drafting a token took, and what verifying k of them.

Without a cache a forward computes the whole text, and a few draft tokens more hardly count. With one it computes the
text's last token and the draft: what that costs depends on k, on the model and on the machine, and it is not known but
measured, for every k that was tried.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .steps import StepStats

START = 64  # positions whose computing takes as long as starting a forward does, until something else was measured
STALE = 64  # steps after which what a plain step took is measured again


def _recent() -> deque[float]:
    return deque(maxlen=9)


def usual(times: Iterable[float]) -> float:
    """The lower quartile: a forward that stalled, or found its weights fallen out of the caches, tells nothing."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4]


@dataclass
class CostModel:
    """Of the machine and the models, not of a text."""

    draft_ms: deque[float] = field(default_factory=_recent)  # of one draft token
    fixed_ms: deque[float] = field(default_factory=_recent)  # of the rule, per step that drafted
    units: dict[int, deque[float]] = field(default_factory=lambda: defaultdict(_recent))  # k -> ms / (START + computed)
    age: int = 0  # steps since the last plain one

    def observe(self, step: StepStats) -> None:
        """A step that prefilled is none to learn from."""
        if step.computed > step.proposed + step.plain:
            return
        self.age = self.age + 1 if step.proposed else 0
        self.units[step.proposed].append(step.verify_ms / (START + step.computed))
        if step.depth:
            self.draft_ms.append(step.draft_ms / step.depth)
            self.fixed_ms.append(step.accept_ms)

    @property
    def known(self) -> bool:
        """Whether anything was drafted often enough to go by."""
        return len(self.draft_ms) >= 2

    @property
    def wants_plain(self) -> bool:
        """Whether a step without a draft would teach more than it costs."""
        return len(self.units[0]) < 2 or self.age > STALE

    def verify_ms(self, k: int, plain: int) -> float:
        """A forward over the `plain` positions that it computes without a draft, and k draft tokens.

        Between two k that were tried on a line; outside on the line through the outermost. Fewer tokens never cost
        more: where they seem to, they were tried when the machine had other things to do.
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
