"""The interface of drafters: propose tokens, and observe how many of them were accepted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sequence import Sequence
from .tree import Tree

Stop = Callable[[int, Tensor], bool]
"""Asked before a token is drawn, with the row's number and its draft distribution [V]: does this draft end here?"""


@dataclass(frozen=True)
class Draft:
    """Draft tokens after R sequences: for each a chain of up to K tokens, or a tree.

    `probs` are the distributions that the tokens were drawn from, float [R, K, V]; None where each token was certain
    (one-hot), as a greedy draft's is. Verification is exact only with the very distributions that were used.
    """

    tokens: Tensor  # int64 [R, K]; of row r the first widths[r] count
    probs: Tensor | None
    widths: list[int]
    trees: list[Tree] | None = None  # instead of chains

    @staticmethod
    def nothing(rows: int) -> Draft:
        return Draft(torch.empty(rows, 0, dtype=torch.long), None, [0] * rows)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a draft, for every sequence of it."""

    sequences: list[Sequence]
    accepted: list[int]
    states: list[Tensor] | None
    """The target's states that the drafter reads ([n, F]), at all positions from `Drafter.states_from` on.

    They end at the last accepted draft token; the target has not computed the token that follows it yet.
    """


class Drafter(ABC):
    """Proposes tokens and observes the outcome. Everything it keeps of a sequence is keyed by the sequence."""

    taps: tuple[int, ...] | None = None
    """What it reads of the target: None for nothing, () for the output, and the outputs of these layers besides."""

    @abstractmethod
    def propose(self, sequences: list[Sequence], widths: list[int], stop: Stop | None = None) -> Draft:
        """Draft at most widths[r] tokens (of a tree: levels) for sequence r."""

    def states_from(self, sequence: Sequence) -> int:
        """Return the first position whose target states the drafter needs; asked only if taps is not None."""
        raise NotImplementedError

    def observe(self, outcome: Outcome) -> None:  # noqa: B027
        """Learn from a finished step."""


@dataclass(frozen=True)
class Frontier:
    """Where the tree of one sequence grows next."""

    sequence: Sequence
    tree: Tree  # so far
    nodes: list[int]  # the nodes that get children; -1: the root


class Brancher(Drafter):
    """A drafter that can look past several of its own guesses at once, and so grow a tree."""

    deepest: int  # how many levels its trees can have

    @abstractmethod
    def ready(self, sequence: Sequence) -> bool:
        """Return whether enough of the sequence was seen to draft."""

    @abstractmethod
    def expand(self, frontiers: list[Frontier]) -> list[Tensor]:
        """Compute for every frontier the logits [n, V] of what follows its n nodes.

        The first call of a draft asks for the roots of all its trees, every further call for the next level.
        """
