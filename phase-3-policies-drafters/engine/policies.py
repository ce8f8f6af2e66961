"""Acceptance policies: which draft tokens are accepted.

Lossless: the output follows the target's distribution exactly, whatever the draft is.
- Rejection (Leviathan et al. 2023; Chen et al. 2023): the rule of verify.py, the one that accepts most.
- SampleMatch, as `longest_prefix`: the target draws its own token at every position, with the noise of plain sampling.
  Draft tokens are accepted while they equal the target's. The output equals plain sampling token for token.
- SampleMatch, as `coupled`: the same, and the drafter draws with that noise too, so target and draft agree as often as
  one shared Gumbel vector allows (Daliri et al. 2025, drafter-invariant speculative decoding; Kolmogorov couplings).

Lossy: a draft token is accepted if the target finds it good enough; the token that follows is drawn from the target.
The text is then no longer a sample of the target's distribution; the README measures the distance.
- ConfThreshold: the target's probability of the token is at least tau.
- TopkAgree: the token is among the target's k most likely.
- Typical (Cai et al. 2024, Medusa): its probability is at least min(epsilon, delta * exp(-entropy)).
They use the probabilities that are sampled from, and at temperature 0 the softmax of the raw logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import UserError
from common.philox import Purpose

from .drafting import Draft
from .sampling import most_likely
from .steps import Path, Trial
from .tree import Tree
from .verify import RandomSource, Verdict, verify

PolicyName = Literal["rejection", "coupled", "longest_prefix", "conf_threshold", "topk_agree", "typical"]
LOSSLESS = ("rejection", "coupled", "longest_prefix")


@dataclass(frozen=True)
class TargetProbs:
    """The target's distributions after each of R sequences and their draft tokens, [R, K+1, V] each."""

    probs: Tensor  # those that are sampled from
    opinion: Tensor  # those that lossy policies go by: the same, or at temperature 0 the softmax of the raw logits


class DraftRows(NamedTuple):
    """What verification needs of R drafts besides their tokens: the counted tokens, and the random numbers."""

    widths: Tensor  # int64 [R]: how many of a row's draft tokens count
    keys: Tensor  # int64 [R, 2]
    positions: Tensor  # int64 [R], of the first draft token
    source: RandomSource

    def only(self, at: slice | Tensor) -> DraftRows:
        """Return these rows."""
        return DraftRows(self.widths[at], self.keys[at], self.positions[at], self.source)


class AcceptancePolicy(Protocol):
    @property
    def lossless(self) -> bool: ...

    @property
    def draft_noise(self) -> Purpose:
        """Return the purpose of the random numbers that a drafter draws its tokens with."""
        ...

    @property
    def draws_children(self) -> bool:
        """True if a static tree's children are drawn; otherwise they are the drafter's likeliest tokens."""
        ...

    def verify(self, draft: Draft, target: TargetProbs, rows: DraftRows) -> Verdict:
        """Decide for R chains how many tokens are accepted, and what follows."""
        ...

    def accept_tree(self, tree: Tree, target: TargetProbs, row: DraftRows) -> Path:
        """Decide for one tree (target [1, N+1, V]) which path is accepted, and the token that follows it."""
        ...


@dataclass(frozen=True)
class Rejection:
    """Accept with probability min(1, target / draft); on rejection draw from the residual."""

    lossless = True
    draft_noise = Purpose.DRAFT
    draws_children = True

    def verify(self, draft: Draft, target: TargetProbs, rows: DraftRows) -> Verdict:
        return verify(draft.tokens, draft.probs, target.probs, *rows)

    def accept_tree(self, tree: Tree, target: TargetProbs, row: DraftRows) -> Path:
        """Drawn children: recursive rejection. Chosen children: sample match, which accepts as many."""
        if tree.probs is None:
            return match_tree(tree, target.probs[0], row)
        return recursive_rejection(tree, target.probs[0], row)


@dataclass(frozen=True)
class SampleMatch:
    """Accept a draft token while the target, with the noise of plain sampling, draws the same one."""

    draft_noise: Purpose  # of the drafter's random numbers; SAMPLE: it draws with that noise as well
    lossless = True

    @property
    def draws_children(self) -> bool:
        return self.draft_noise == Purpose.SAMPLE

    def verify(self, draft: Draft, target: TargetProbs, rows: DraftRows) -> Verdict:
        widths, keys, positions, source = rows
        R, K = draft.tokens.shape
        accepted, own = torch.zeros_like(widths), torch.zeros_like(widths)
        active = torch.arange(R, device=widths.device)  # rows whose draft is accepted so far
        for column in range(K + 1):
            at = positions[active] + column
            own[active] = source.draw(target.probs[active, column], keys[active], at, Purpose.SAMPLE)
            if column == K:
                break
            active = active[(own[active] == draft.tokens[active, column]) & (column < widths[active])]
            accepted[active] += 1
            if not len(active):
                break
        ratios = target.probs[:, :K].gather(-1, draft.tokens[..., None])[..., 0]
        return Verdict(accepted, own, ratios)

    def accept_tree(self, tree: Tree, target: TargetProbs, row: DraftRows) -> Path:
        return match_tree(tree, target.probs[0], row)


class Lossy:
    """Common to all policies that accept good enough tokens; each defines `good`."""

    lossless = False
    draft_noise = Purpose.DRAFT
    draws_children = False

    def good(self, opinion: Tensor) -> Tensor:
        """Return bool [..., V]: which tokens are accepted under target probabilities [..., V]."""
        raise NotImplementedError

    def verify(self, draft: Draft, target: TargetProbs, rows: DraftRows) -> Verdict:
        widths, keys, positions, source = rows
        R, K = draft.tokens.shape
        good = self.good(target.opinion[:, :K]).gather(-1, draft.tokens[..., None])[..., 0]  # [R, K]
        passed = good & (torch.arange(K, device=widths.device) < widths[:, None])
        accepted = passed.long().cumprod(dim=1).sum(dim=1)
        following = target.probs[torch.arange(R, device=widths.device), accepted]
        next_tokens = source.draw(following, keys, positions + accepted, Purpose.SAMPLE)
        return Verdict(accepted, next_tokens, good.to(target.probs.dtype))

    def accept_tree(self, tree: Tree, target: TargetProbs, row: DraftRows) -> Path:
        """Go from every node to its first child that is good enough."""
        good = self.good(target.opinion[0])  # [N+1, V]
        nodes: list[int] = []
        node = -1
        while fitting := [child for child in tree.children(node) if bool(good[node + 1, tree.tokens[child]])]:
            node = fitting[0]
            nodes.append(node)
        return Path(nodes, draw_one(target.probs[0, node + 1], row, len(nodes)))


@dataclass(frozen=True)
class ConfThreshold(Lossy):
    tau: float

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise UserError(f"tau must be in (0, 1], a probability under the target, got {self.tau}")

    def good(self, opinion: Tensor) -> Tensor:
        return opinion >= self.tau


@dataclass(frozen=True)
class TopkAgree(Lossy):
    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"agree_k must be at least 1, a number of the target's most likely tokens, got {self.k}")

    def good(self, opinion: Tensor) -> Tensor:
        flat = opinion.reshape(-1, opinion.shape[-1])
        return most_likely(flat, [min(self.k, flat.shape[-1])] * len(flat)).view_as(opinion)


@dataclass(frozen=True)
class Typical(Lossy):
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1 or not 0 < self.delta <= 1:
            raise UserError(f"epsilon and delta must be in (0, 1], got {self.epsilon} and {self.delta}")

    def good(self, opinion: Tensor) -> Tensor:
        entropy = -torch.xlogy(opinion, opinion).sum(-1, keepdim=True)
        return opinion >= (self.delta * (-entropy).exp()).clamp(max=self.epsilon)


def make_policy(
    name: PolicyName, tau: float = 0.3, agree_k: int = 3, epsilon: float = 0.09, delta: float = 0.3
) -> AcceptancePolicy:
    """Make the policy of this name; it takes of the parameters those that are its own."""
    if name == "rejection":
        return Rejection()
    if name in ("coupled", "longest_prefix"):
        return SampleMatch(Purpose.SAMPLE if name == "coupled" else Purpose.DRAFT)
    if name == "conf_threshold":
        return ConfThreshold(tau)
    return TopkAgree(agree_k) if name == "topk_agree" else Typical(epsilon, delta)


def draw_one(probs: Tensor, row: DraftRows, depth: int, purpose: Purpose = Purpose.SAMPLE) -> int:
    """Draw from probs [V] the token that follows `depth` draft tokens."""
    return int(row.source.draw(probs[None], row.keys, row.positions + depth, purpose))


def match_tree(tree: Tree, probs: Tensor, row: DraftRows) -> Path:
    """Draw the target's token at every node (probs [N+1, V]), as plain sampling would, and follow it to a child."""
    nodes: list[int] = []
    node = -1
    while True:
        token = draw_one(probs[node + 1], row, len(nodes))
        following = [child for child in tree.children(node) if tree.tokens[child] == token]
        if not following:
            return Path(nodes, token)
        node = following[0]
        nodes.append(node)


def recursive_rejection(tree: Tree, probs: Tensor, row: DraftRows) -> Path:
    """Try children that were drawn without replacement, in that order (Chen et al. 2024, Sequoia, Algorithm 2).

    Child x is accepted with probability min(1, target(x) / draft(x)). After a rejection the target becomes its residual
    max(0, target - draft), normalised, and the draft loses x and is normalised: that is the law of the next draw.
    """
    assert tree.probs is not None, "these children were not drawn"
    nodes: list[int] = []
    trials: list[Trial] = []
    node = -1
    while True:
        target, draft = probs[node + 1], tree.probs[node + 1].to(probs.device)
        accepted = None
        for trial, child in enumerate(tree.children(node)):
            trials.append(Trial(child, target, draft))
            token = tree.tokens[child]
            ratio = (target[token] / draft[token]).clamp(max=1).view(1, 1)
            if bool(row.source.decide(ratio, row.keys, row.positions[:, None] + len(nodes), trial)):
                accepted = child
                break
            residual = (target - draft).clamp(min=0)
            mass = residual.sum()
            target = residual / mass if mass > 0 else target  # rounding may leave nothing, as in verify()
            draft = draft.clone()
            draft[token] = 0
            left = draft.sum()
            draft = draft / left if left > 0 else draft
        if accepted is None:
            purpose = Purpose.RESIDUAL if tree.children(node) else Purpose.SAMPLE
            return Path(nodes, draw_one(target, row, len(nodes), purpose), trials)
        node = accepted
        nodes.append(node)
