"""What a drafter is, and the first one: a smaller model that writes ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.philox import Purpose

from .forward import next_logits
from .model import Transformer
from .sampling import Sampler, probabilities
from .sequence import Sequence


@dataclass(frozen=True)
class Draft:
    """Guesses for the next K tokens of R sequences.

    `probs` are the distributions that the tokens were drawn from, float [R, K, V]; None where each token was certain
    (one-hot), as a greedy draft's is. Verification is exact only with the very distributions that were used.
    """

    tokens: Tensor  # int64 [R, K]
    probs: Tensor | None


class Drafter(Protocol):
    """Proposes tokens; what was accepted is told to it afterwards."""

    def propose(self, sequences: list[Sequence], k: int) -> Draft:
        """Draft k tokens for every sequence."""
        ...

    def observe(self, accepted: list[int]) -> None:
        """Take the number of accepted tokens of the last proposal, for every sequence of it."""
        ...


class ModelDrafter:
    """A model of the same vocabulary, asked k times, with the sampling parameters of each sequence."""

    def __init__(self, model: Transformer, sampler: Sampler) -> None:
        self.model, self.sampler = model, sampler

    def propose(self, sequences: list[Sequence], k: int) -> Draft:
        drafted: list[list[int]] = [[] for _ in sequences]
        prompts = [sequence.prompt for sequence in sequences]
        params = [sequence.params for sequence in sequences]
        keys = torch.tensor([sequence.key for sequence in sequences])
        lengths = torch.tensor([sequence.length for sequence in sequences])
        used: list[Tensor] = []
        for j in range(k):
            outputs = [s.tokens + new for s, new in zip(sequences, drafted, strict=True)]
            logits = next_logits(self.model, [p + o for p, o in zip(prompts, outputs, strict=True)])
            probs = probabilities(logits, params, prompts, outputs)  # [R, V]
            tokens = self.sampler.draw(probs, keys.to(probs.device), (lengths + j).to(probs.device), Purpose.DRAFT)
            used.append(probs)
            for new, token in zip(drafted, tokens.tolist(), strict=True):
                new.append(token)
        greedy = all(mine.greedy for mine in params) or not used
        return Draft(torch.tensor(drafted, dtype=torch.long), None if greedy else torch.stack(used, dim=1))

    def observe(self, accepted: list[int]) -> None:
        """Do nothing: no state is kept between steps, so none is rolled back."""
