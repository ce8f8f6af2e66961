"""The acceptance rule of speculative sampling, alone: which draft tokens are accepted, and which token follows.

Leviathan et al. 2023 (Algorithm 1) and Chen et al. 2023 (Algorithm 2). From left to right, draft token x is accepted
with probability min(1, target_probs[x] / draft_probs[x]). The first rejected token is replaced by a draw from the
residual, max(0, target_probs - draft_probs) normalised; if all are accepted, a bonus token is drawn from the target's
last distribution. The output follows the target's distribution exactly, whatever the draft is:

    P(x) = draft(x) min(1, target(x) / draft(x))  +  P(rejected) residual(x)  =  min(draft, target)(x)
           + (1 - sum min(draft, target)) max(0, target - draft)(x) / sum max(0, target - draft)  =  target(x)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common import philox
from common.philox import Purpose

from .sampling import KeyedSampler, Sampler, SamplingParams, ranked


class RandomSource(Sampler, Protocol):
    """The random decisions of verification. Tests replace it to walk every possible outcome."""

    def decide(self, probability: Tensor, keys: Tensor, positions: Tensor, trial: int = 0) -> Tensor:
        """Draw True with the given probability [R, K], each at its own position (int64 [R, K]); keys int64 [R, 2].

        In a tree several tokens are tried at one position; `trial` numbers them.
        """
        ...

    def draw_several(self, probs: Tensor, count: int, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        """Draw `count` different tokens per row of probs [R, V], without replacement, in order; int64 [R, count]."""
        ...


class KeyedSource(KeyedSampler):
    """Draws and decides by keyed random numbers (common/philox.py): every decision has a key of its own.

    | decision                                       | purpose  | words of the key                      |
    |------------------------------------------------|----------|---------------------------------------|
    | a token of the target: plain, or after a draft | SAMPLE   | one per token id                      |
    | a draft token                                  | DRAFT    | the first                             |
    | the children of a node, where they are drawn   | DRAFT    | one per token id                      |
    | accept or reject a draft token                 | ACCEPT   | that of its number among its siblings |
    | the token in place of a rejected one           | RESIDUAL | the first                             |

    The key's position is the token's own, counted from the start of the prompt. A draft token after a rejected one
    decides nothing: the next step draws at its position again, with the same key. Nodes of one level share their
    numbers, for the walk comes to one of them. The policy `coupled` drafts with SAMPLE, the target's own noise.
    """

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        """Draw by Gumbel-max for plain sampling; for drafts and residuals by a uniform and the inverse distribution."""
        if purpose == Purpose.SAMPLE:
            return super().draw(probs, keys, positions, purpose)
        uniform = philox.uniforms(keys[:, 0], keys[:, 1], positions, purpose, 1).double()  # [R, 1]
        cumulative = probs.double().cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
        return tokens.clamp(max=probs.shape[-1] - 1)

    def draw_several(self, probs: Tensor, count: int, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        """Take the largest of log p plus Gumbel noise: a draw without replacement, in order (Kool et al. 2019)."""
        noise = philox.gumbel(keys[:, 0], keys[:, 1], positions, purpose, probs.shape[-1])
        return ranked(probs.log() + noise, count)

    def decide(self, probability: Tensor, keys: Tensor, positions: Tensor, trial: int = 0) -> Tensor:
        rows, columns = probability.shape
        each = keys[:, None].expand(rows, columns, 2).flatten(0, 1)
        uniform = philox.uniforms(each[:, 0], each[:, 1], positions.reshape(-1), Purpose.ACCEPT, trial + 1)[:, trial]
        return uniform.view(rows, columns).to(probability.dtype) < probability


class GreedySource:
    """Temperature 0: distributions are one-hot, so nothing is left to chance."""

    def draw(self, probs: Tensor, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        return probs.argmax(-1)

    def draw_several(self, probs: Tensor, count: int, keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        return ranked(probs, count)

    def decide(self, probability: Tensor, keys: Tensor, positions: Tensor, trial: int = 0) -> Tensor:
        return probability > 0.5


def random_source(params: Iterable[SamplingParams]) -> RandomSource:
    """Return the source for sequences with these parameters. A keyed one serves greedy rows too, at a cost."""
    return GreedySource() if all(mine.greedy for mine in params) else KeyedSource()


@dataclass(frozen=True)
class Verdict:
    """For each of R rows: how many draft tokens are accepted, and the token that follows them."""

    accepted: Tensor  # int64 [R]
    next_tokens: Tensor  # int64 [R]
    ratios: Tensor  # [R, K] the probability with which each draft token is accepted


def verify(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    widths: Tensor,
    keys: Tensor,
    positions: Tensor,
    source: RandomSource,
) -> Verdict:
    """Apply the rule to R rows at once, in float32 or better.

    draft_tokens int64 [R, K]; draft_probs [R, K, V], None for one-hot; target_probs [R, K+1, V]; widths int64 [R], how
    many of a row's K tokens count; keys int64 [R, 2]; positions int64 [R], of the first draft token.
    """
    R, K = draft_tokens.shape
    rows, columns = torch.arange(R, device=widths.device), torch.arange(K, device=widths.device)
    target_of = target_probs[:, :K].gather(-1, draft_tokens[..., None])[..., 0]  # [R, K]
    if draft_probs is None:
        ratios = target_of
    else:
        ratios = (target_of / draft_probs.gather(-1, draft_tokens[..., None])[..., 0]).clamp(max=1)
    passed = source.decide(ratios, keys, positions[:, None] + columns) & (columns < widths[:, None])
    accepted = passed.long().cumprod(dim=1).sum(dim=1)  # up to the first rejected token

    following = target_probs[rows, accepted]  # [R, V]
    rejected = accepted < widths
    next_tokens = torch.empty_like(accepted)
    if bool((~rejected).any()):
        full = rows[~rejected]
        at = positions[full] + accepted[full]
        next_tokens[full] = source.draw(following[full], keys[full], at, Purpose.SAMPLE)
    if bool(rejected.any()):
        cut = rows[rejected]
        first = accepted[cut]
        if draft_probs is None:
            residual = following[cut].scatter(-1, draft_tokens[cut, first][:, None], 0.0)
        else:
            residual = (following[cut] - draft_probs[cut, first]).clamp(min=0)
        mass = residual.sum(-1, keepdim=True)
        # Rounding can reject a token whose ratio is 1 but for the last bit; the residual is then empty.
        residual = torch.where(mass > 0, residual / mass, following[cut])
        next_tokens[cut] = source.draw(residual, keys[cut], positions[cut] + first, Purpose.RESIDUAL)
    return Verdict(accepted, next_tokens, ratios)
