"""Log-probabilities of tokens: those of the model itself, before temperature, penalties and filters.

So they are the same numbers for every sampling parameter, and those of a prompt sum to the likelihood of a text.

    of_tokens(logits, [17, 4], top=5)[0].logprob
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import check_finite, ranked


@dataclass(frozen=True)
class TokenLogprob:
    """What the model thought of one token, in nats."""

    token: int
    logprob: float
    rank: int  # 1: the likeliest
    top: list[tuple[int, float]]  # the likeliest tokens and theirs, likeliest first


def of_tokens(logits: Tensor, tokens: Rows[int], top: int) -> list[TokenLogprob]:
    """Return those of tokens[n] after logits [N, V], each with the `top` likeliest. UserError if not finite."""
    check_finite(logits)
    logprobs = logits.float().log_softmax(-1)
    V = logprobs.shape[-1]
    mine = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logprobs > mine).sum(-1) + 1).tolist()
    best = ranked(logprobs, min(top, V)) if top else torch.empty(len(tokens), 0, dtype=torch.long, device=logits.device)
    each = zip(tokens, mine[:, 0].tolist(), ranks, best.tolist(), logprobs.gather(-1, best).tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, rank, list(zip(ids, theirs, strict=True)))
        for token, logprob, rank, ids, theirs in each
    ]
