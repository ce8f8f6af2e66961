"""The arguments of drawing tokens in C++, and the result of a speculative step made there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from common.philox import Purpose

from .sampling import KeyedSampler, Sampler, SamplingParams
from .verify import GreedySource


class Drawing(NamedTuple):
    """Names the distributions that tokens are drawn from, and their random numbers: key, first position, purpose."""

    params: SamplingParams
    source: Sampler
    key: tuple[int, int]
    position: int
    purpose: Purpose
    probs: bool = True  # True if the distributions are wanted
    taps: tuple[int, ...] | None = None  # instead: the target's states, with the outputs of these layers

    @property
    def keyed(self) -> bool:
        """True if the parameters and the key alone decide which tokens are drawn, so that C++ can draw them."""
        certain = self.params.greedy and (isinstance(self.source, GreedySource) or self.purpose == Purpose.SAMPLE)
        return (certain or isinstance(self.source, KeyedSampler)) and not self.params.penalised


class Speculated(NamedTuple):
    """A step of one sequence that was drafted, verified and accepted in one call, or one of several."""

    tokens: Tensor  # int64 [1, K] the draft
    draft_probs: Tensor | None  # [1, K, V] what each was drawn from; None where it was certain
    target_probs: Tensor  # [1, K+1, V] what is sampled from after the sequence and each of them
    ratios: Tensor  # [1, K] the probability with which each was accepted
    draft: list[int]
    accepted: int  # draft tokens
    next_token: int
    computed: int  # tokens that the target computed, without a prefill
    draft_ms: float
    verify_ms: float
    accept_ms: float
