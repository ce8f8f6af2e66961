"""Figures of generated text: its likelihood under a model, its share of loops, and its variety.

quality(lambda window: model(window), prompt_ids, new_ids, context=1024)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.loops import loop_share
from common.perplexity import token_nll

# The definitions of the figures below, for a bench's results.
QUALITY = {
    "bits_per_token": "-log2 of the probability that the model gives a text's tokens at temperature 1, mean of tokens",
    "loop_share": "share of the tokens that end an 8-gram which the same text held before",
    "distinct": "different 4-grams / 4-grams of one text",
}


def distinct_share(tokens: Sequence[int], n: int = 4) -> float:
    """Return different n-grams / n-grams (Li et al. 2016, distinct-n); 1 for a text too short to repeat one."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def quality(
    logits_of: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    tokens: Sequence[int],
    context: int,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compute the figures that QUALITY defines, of `tokens` after `prompt`.

    `logits_of` as in common.perplexity.token_nll. Raises ValueError without a prompt or without tokens.
    """
    if not prompt or not tokens:
        raise ValueError(f"a prompt and tokens are needed; got {len(prompt)} and {len(tokens)}")
    text = torch.tensor([*prompt, *tokens], device=device)
    nats = token_nll(logits_of, text, context, stride=max(1, context // 2))[-len(tokens) :]
    return {
        "bits_per_token": nats.mean().item() / math.log(2),
        "loop_share": loop_share(tokens),
        "distinct": distinct_share(tokens),
    }
