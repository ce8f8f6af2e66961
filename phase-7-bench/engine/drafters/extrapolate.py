"""Extrapolation without training: continue the target's last hidden state in a straight line.

h_next = h + alpha (h - h_previous), read by the target's own output matrix. Some public labs ship this under the name
of EAGLE. It is here as a contrast: hidden states of a transformer do not move in straight lines, so acceptance is low.
"""

from __future__ import annotations

import torch

from ..drafting import Draft, Stop
from ..model import Transformer
from ..sequence import Sequence
from ..verify import RandomSource
from .chains import ChainBuilder
from .memory import StateDrafter


class ExtrapolateDrafter(StateDrafter):
    """Reads the j-th draft token from h + j alpha (h - h_previous)."""

    def __init__(self, target: Transformer, source: RandomSource, alpha: float = 1.0) -> None:
        super().__init__(target, source, taps=(), keep=2)
        self.alpha = alpha

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft chains. The first step of a sequence drafts nothing: its forward gives the first states."""
        chains = ChainBuilder(sequences, widths, self.source, stop)
        for row, (sequence, width) in enumerate(zip(sequences, widths, strict=True)):
            states = self.memory.get(sequence)
            if states is None or len(states) < 2:
                continue
            steps = torch.arange(1, width + 1, device=states.device)[:, None] * self.alpha
            logits = self.target.logits((states[-1] + steps * (states[-1] - states[-2])).to(states.dtype))
            for at in range(width):
                if not chains.draw(row, logits[at]):
                    break
        return chains.draft()
