"""A runner whose forwards are one call into C++: all layers of a step, or several steps of several sequences.

The bookkeeping of sequences and cache rows is that of runner.py; only the computation differs.

    python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels.cpp import CppModel
from .kernels.cpp.model import Cache
from .kv_cache import OutOfBlocks
from .kv_cache.manager import CacheManager
from .model import Transformer
from .runner import NO_DRAFT, CachedRunner, Work
from .sampling import KeyedSampler
from .sequence import Sequence
from .verify import GreedySource, RandomSource


class CppRunner(CachedRunner):
    """Over a static, ring or paged cache, into which the kernels write."""

    def __init__(self, model: Transformer, fast: CppModel, manager: CacheManager) -> None:
        super().__init__(model, manager)
        self.fast = fast
        assert isinstance(manager.cache, Cache)
        self.cache = manager.cache

    def _verify(
        self, works: list[Work], wants_states: bool, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor] | None]:
        wanted, counts, start = list[int](), list[int](), 0
        for work in works:
            self.cache.make_room(work.row.number, work.count)
            first = work.skip if wants_states else len(work.new) - 1
            wanted += range(start + first, start + work.count)
            counts.append(work.count - first)
            start += work.count
        done = self.fast.step(
            self.cache,
            [work.new + work.draft.tokens for work in works],
            rows=[work.row.number for work in works],
            parents=None if all(work.draft.is_chain for work in works) else [work.parents for work in works],
            wanted=wanted,
            taps=taps,
            hidden=wants_states,
        )
        assert done.logits is not None
        K = max(len(work.draft.tokens) for work in works)
        logits = done.logits
        if len(works) == 1:
            logits = logits[-1 - K :][None]
        else:
            ends = torch.tensor(counts).cumsum(0).tolist()
            read = [
                [min(end - 1 - len(work.draft.tokens) + j, end - 1) for j in range(K + 1)]
                for work, end in zip(works, ends, strict=True)
            ]
            logits = logits[torch.tensor(read)]
        if not wants_states:
            return logits, None
        outputs = states_of(done.hidden, done.tapped).split(counts)
        return logits, [torch.cat((*work.states, mine)) for work, mine in zip(works, outputs, strict=True)]

    def _prefill(self, work: Work, wants_states: bool, taps: tuple[int, ...]) -> list[Tensor]:
        self.cache.make_room(work.row.number, work.count)
        done = self.fast.step(
            self.cache,
            [work.new],
            rows=[work.row.number],
            wanted=range(work.skip, work.count) if wants_states else [],
            taps=taps if wants_states else (),
            logits=False,
            hidden=wants_states,
        )
        return [states_of(done.hidden, done.tapped)] if wants_states else []

    def begin(
        self,
        sequences: list[Sequence],
        more: list[int],
        states_from: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[list[Work], list[Any]]:
        """Return the rows of the sequences, and the sequences as C++ takes them.

        The rows have room for more[r] tokens after the new ones of sequence r. UserError if the cache has none.
        states_from, taps: as in target_forward. States of what is prefilled here are in Work.states, and Work.skip
        counts the new positions whose states are not wanted.
        """
        wanted: list[int | None] = [None] * len(sequences)
        if states_from is not None:
            wanted[:] = states_from
        try:
            works = [
                self._begin(each, each.prompt + each.tokens, NO_DRAFT, first, taps)
                for each, first in zip(sequences, wanted, strict=True)
            ]
            for work, count in zip(works, more, strict=True):
                self.cache.make_room(work.row.number, len(work.new) + count)
        except OutOfBlocks as error:
            error.owner = self.manager.owner(error.row)
            for each in sequences:  # fewer steps may do: what the others took is free again
                if (row := self.manager.rows.get(each)) is not None:
                    self.cache.truncate(row.number, self.cache.length(row.number))
            raise
        parts = zip(sequences, works, strict=True)
        return works, [
            self.fast.sequence(self.cache, work.row.number, work.new, each.params, each.key[1], each.length)
            for each, work in parts
        ]

    def appended(self, works: list[Work], gained: list[list[int]], rejected: int) -> None:
        """Record what a call has appended to the rows: the new tokens, and gained[r]."""
        for work, tokens in zip(works, gained, strict=True):
            self.manager.appended(work.row, work.new + tokens)
            work.row.states = []
        self.manager.positions += rejected


def drawable(sequences: list[Sequence], source: RandomSource) -> bool:
    """Return True if C++ can draw the tokens: the parameters and the key alone decide about them."""
    keyed = isinstance(source, KeyedSampler | GreedySource)
    return keyed and not any(sequence.params.penalised for sequence in sequences)


def states_of(hidden: Tensor | None, tapped: Tensor | None) -> Tensor:
    """Return the states [n, F] that draft heads read: hidden states, and the outputs of tapped layers beside them."""
    assert hidden is not None
    return hidden if tapped is None else torch.cat((hidden, tapped), -1)
