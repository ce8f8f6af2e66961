"""Medusa's heads in C++: the drafts of all sequences in one call.

python generate.py --kernels cpp --drafter medusa --prompt "from pathlib import"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cpp_runner import drawable
from ..drafting import Draft, Stop
from ..kernels.cpp import library
from ..kernels.cpp.ops import sampling_of
from ..model import Transformer
from ..sequence import Sequence
from ..verify import RandomSource
from .chains import ChainBuilder
from .medusa import MedusaDrafter, MedusaHeads, last_token

if TYPE_CHECKING:
    from ..kernels.cpp import CppMedusa


class FastMedusaDrafter(MedusaDrafter):
    """A MedusaDrafter in C++; its drafts differ by rounding only."""

    def __init__(self, fast: CppMedusa, target: Transformer, heads: MedusaHeads, source: RandomSource) -> None:
        super().__init__(target, heads, source)
        self.fast = fast

    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains in C++ if no `stop` may end them and random numbers are keyed; otherwise as MedusaDrafter."""
        if stop is not None or not drawable(sequences, self.source):
            return super().propose(sequences, widths, stop)
        counts = [min(width, self.deepest) if self.ready(s) else 0 for s, width in zip(sequences, widths, strict=True)]
        chains = ChainBuilder(sequences, counts, self.source, stop)
        if rows := chains.open():
            asked, counts = [sequences[row] for row in rows], [counts[row] for row in rows]
            chains.take(rows, *self.fast.beside.propose(self.start(asked, counts, [n + 1 for n in counts]), counts))
        return chains.draft()

    def start(self, sequences: list[Sequence], counts: list[int], limits: list[int]) -> Any:
        """Return a drafter of the library for drafts of counts[r] tokens, at most one per head."""
        nowhere = library().Row(None, [], 0)  # heads have no cache
        batch = [
            library().Sequence(nowhere, [last_token(each)], sampling_of(each.params), each.key[1], each.length)
            for each in sequences
        ]
        noises = [each.policy.draft_noise for each in sequences]
        return self.fast.drafter(batch, self._states(sequences, counts), noises)

    def _states(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        """Return the states [R, F] to draft from; zeros for a sequence without a draft, which may have none yet."""
        nothing = torch.zeros(1, self.target.config.width * (1 + len(self.heads.taps)))
        return torch.cat([self._state(each) if n else nothing for each, n in zip(sequences, counts, strict=True)])

    def finish(self, counts: list[int], gained: list[list[list[int]]]) -> None:
        """Record nothing: the heads keep no state."""

    @torch.inference_mode()
    def level_logits(self, sequences: list[Sequence]) -> Tensor:
        states = torch.cat([self._state(sequence) for sequence in sequences])
        return self.fast.logits(states, [last_token(sequence) for sequence in sequences])
