"""At temperature 0 only the most likely tokens count: which stand is read straight from the logits.

One-hot distributions of vocabulary size are made where somebody reads them (a recording does), and nowhere else.

    python generate.py --prompt "from pathlib import" --json
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .drafting import Draft
from .kernels import Kernels
from .policies import Judged
from .verify import Verdict


class Greedy(Judged):
    """What the target said, as logits: for lossless policies, and for chains whose tokens were certain."""

    scores: Tensor

    def __init__(self, scores: Tensor) -> None:
        """scores [R, K+1, V]: penalties taken off."""
        self.__dict__["scores"] = scores  # frozen, like what it stands for

    @cached_property
    def probs(self) -> Tensor:
        wide = self.scores if self.scores.dtype == torch.float64 else self.scores.float()
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)

    @property
    def opinion(self) -> Tensor:
        return self.probs

    def verdict(self, kernels: Kernels, draft: Draft, widths: Tensor) -> Verdict:
        """The longest prefix of the draft that the target would have written itself, and its token after that."""
        return LongestPrefix(*kernels.verify_greedy(draft.tokens, self.scores, widths), self, draft.tokens)


class LongestPrefix(Verdict):
    """Whose ratios, all 0 or 1, are made from the distributions where somebody reads them."""

    tokens: Tensor
    judged: Greedy

    def __init__(self, accepted: Tensor, next_tokens: Tensor, judged: Greedy, tokens: Tensor) -> None:
        self.__dict__.update(accepted=accepted, next_tokens=next_tokens, judged=judged, tokens=tokens)

    @cached_property
    def ratios(self) -> Tensor:
        return self.judged.probs[:, : self.tokens.shape[1]].gather(-1, self.tokens[..., None])[..., 0]
