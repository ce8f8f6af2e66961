"""The target's last states of every sequence, which drafters read."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..drafting import Drafter, Outcome
from ..model import Transformer
from ..sequence import Sequence
from ..verify import RandomSource


class StateMemory:
    """Keeps the states [n, F] of the last positions of each sequence, at most `keep` of them.

    The states end one position before the sequence does: its last token was drawn from the state before it, and has not
    been an input of the target yet.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._kept: WeakKeyDictionary[Sequence, Kept] = WeakKeyDictionary()

    def get(self, sequence: Sequence, last: int | None = None) -> Tensor | None:
        """Return the states up to the last position but one, at most the `last` ones; None if they are missing."""
        kept = self._kept.get(sequence)
        if kept is None or kept.end != sequence.length - 1:
            return None
        return kept.last(self.keep if last is None else last)

    def states_from(self, sequence: Sequence) -> int:
        """Return the first position whose state is missing."""
        return self._kept[sequence].end if sequence in self._kept else max(0, sequence.length - self.keep)

    def observe(self, outcome: Outcome) -> None:
        assert outcome.states is not None, "the loop was not asked for states"
        for sequence, states in zip(outcome.sequences, outcome.states, strict=True):
            kept = self._kept.setdefault(sequence, Kept())
            kept.end = sequence.length - 1
            kept.parts.append(states)
            kept.count += len(states)
            while kept.count - len(kept.parts[0]) >= self.keep:
                kept.count -= len(kept.parts.pop(0))


@dataclass
class Kept:
    """The states of one sequence, concatenated only when they are read: after most steps they are not."""

    end: int = 0  # position after the last
    parts: list[Tensor] = field(default_factory=list)
    count: int = 0  # states in the parts

    def last(self, count: int) -> Tensor:
        """Return the last states [n, F], n at most `count`."""
        first, found = len(self.parts), 0
        while first > 0 and found < count:
            first -= 1
            found += len(self.parts[first])
        read = self.parts[first:]
        return (read[0] if len(read) == 1 else torch.cat(read))[max(0, found - count) :]


class StateDrafter(Drafter):
    """A drafter that reads the target's states, and remembers the last `keep` of every sequence."""

    def __init__(self, target: Transformer, source: RandomSource, taps: tuple[int, ...], keep: int) -> None:
        self.target, self.source, self.taps = target, source, taps
        self.memory = StateMemory(keep)

    def states_from(self, sequence: Sequence) -> int:
        return self.memory.states_from(sequence)

    def observe(self, outcome: Outcome) -> None:
        self.memory.observe(outcome)
