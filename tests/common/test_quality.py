"""Figures of a text: bits by hand, repetition, variety."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.quality import QUALITY, distinct_share, quality


def halves(window: Tensor) -> Tensor:
    """Give token t+1 half of the probability after t, and 4 others the rest in equal parts."""
    probs = torch.full((*window.shape, 5), 0.125)
    return probs.scatter(-1, ((window + 1) % 5)[..., None], 0.5).log()


def test_bits_are_those_of_the_new_tokens_alone() -> None:
    found = quality(halves, prompt=[0, 3], tokens=[4, 0, 2, 3], context=16)
    assert found["bits_per_token"] == pytest.approx((1 + 1 + 3 + 1) / 4)
    assert set(found) == set(QUALITY)
    longer_than_the_context = quality(halves, prompt=[2] * 9, tokens=[3, 4, 0, 2], context=4)
    assert longer_than_the_context["bits_per_token"] == pytest.approx(1.5)


def test_repetition_and_variety() -> None:
    loop = [1, 2, 3] * 8
    assert quality(halves, [0], loop, 64)["loop_share"] == pytest.approx(14 / 24)  # the first 8-gram again at the 11th
    assert distinct_share(loop) == pytest.approx(3 / 21)
    assert distinct_share(list(range(9))) == 1
    assert distinct_share([1, 2, 3]) == 1


def test_nothing_to_judge_is_an_error() -> None:
    for prompt, tokens in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="needed"):
            quality(halves, prompt, tokens, context=8)
