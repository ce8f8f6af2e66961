"""The target's last states of every sequence, which drafters read."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from common.philox import Purpose

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
        self._kept: WeakKeyDictionary[Sequence, tuple[int, Tensor]] = WeakKeyDictionary()  # end position, states

    def get(self, sequence: Sequence) -> Tensor | None:
        """Return the states up to the last position but one; None if they are missing."""
        end, states = self._kept.get(sequence, (0, None))
        return states if end == sequence.length - 1 else None

    def states_from(self, sequence: Sequence) -> int:
        """Return the first position whose state is missing."""
        return self._kept[sequence][0] if sequence in self._kept else max(0, sequence.length - self.keep)

    def observe(self, outcome: Outcome) -> None:
        assert outcome.states is not None, "the loop was not asked for states"
        for sequence, states in zip(outcome.sequences, outcome.states, strict=True):
            _, before = self._kept.get(sequence, (0, states[:0]))
            self._kept[sequence] = (sequence.length - 1, torch.cat((before, states))[-self.keep :])


class StateDrafter(Drafter):
    """A drafter that reads the target's states, and remembers the last `keep` of every sequence."""

    def __init__(
        self, target: Transformer, source: RandomSource, noise: Purpose, taps: tuple[int, ...], keep: int
    ) -> None:
        self.target, self.source, self.noise, self.taps = target, source, noise, taps
        self.memory = StateMemory(keep)

    def states_from(self, sequence: Sequence) -> int:
        return self.memory.states_from(sequence)

    def observe(self, outcome: Outcome) -> None:
        self.memory.observe(outcome)
