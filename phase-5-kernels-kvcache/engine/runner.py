"""Runs a model over sequences that grow: without a cache over all tokens, or with one over the new tokens alone.

The loop calls a runner and does not know which kind it is. `owner` identifies a sequence from step to step.

    runner = make_runner(loaded.model, KVOptions(), rows=1, tokens=300)
    runner.forward(["a text"], [loaded.tokenizer.encode("from pathlib import")]).logits
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from common.device import synchronize

from .attention import CachedAttention
from .config import ModelConfig
from .context import window_start
from .inputs import Inputs, stage_inputs
from .kv_cache import CacheShape, KVOptions, OutOfBlocks, RingCache, make_cache
from .kv_cache.manager import CacheEntry, CacheManager
from .kv_cache.ring import SPARE
from .model import Transformer
from .steps import TargetOutput
from .target import target_forward
from .transfers import Upload
from .tree import Tree

NO_DRAFT = Tree([], [])
DRAFT_ROOM = 64  # nodes of the largest tree
CHUNK = 512  # tokens of a prompt that are prefilled in one forward
INLINE = 16  # new tokens that a step computes itself
Owners = list[Hashable]


class ModelRunner(Protocol):
    """Runs one model over sequences, which it knows by their owner: any hashable, the loop's `Sequence`."""

    model: Transformer
    upload: Upload  # of all that a step needs on the device; a draft's runner has the target's
    prefill_ms: float  # spent so far on prompts
    computed: list[int]  # positions of each sequence that the last forward computed

    def plain(self, length: int) -> int:
        """Count the positions that a forward without a draft computes for a sequence of this length."""
        ...

    def forward(
        self,
        owners: Owners,
        token_ids: list[list[int]],
        drafts: list[Tree] | None = None,
        states_from: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        """Run one forward over the rows' tokens (prompt and output) and their drafts.

        states_from, taps: as in target_forward.
        """
        ...

    def commit(self, owner: Hashable, nodes: list[int], tokens: list[int]) -> None:
        """Keep these nodes of the last forward's draft, with these tokens: they are not computed again."""
        ...

    def release(self, owner: Hashable) -> None:
        """Free what is kept of a finished sequence."""
        ...


class UncachedRunner:
    """`--kv off`: every forward computes all tokens of every sequence."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.prefill_ms = model, 0.0
        self.upload = Upload(model.embedding.weight.device)
        self.computed: list[int] = []

    def plain(self, length: int) -> int:
        return length - window_start(length, self.model.config.context)

    def forward(
        self,
        owners: Owners,
        token_ids: list[list[int]],
        drafts: list[Tree] | None = None,
        states_from: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        drafts = drafts or [NO_DRAFT] * len(token_ids)
        self.computed = [
            self.plain(len(text) + draft.depth) - draft.depth + len(draft.tokens)
            for text, draft in zip(token_ids, drafts, strict=True)
        ]
        return target_forward(self.model, token_ids, drafts, states_from, taps)

    def commit(self, owner: Hashable, nodes: list[int], tokens: list[int]) -> None:
        """Do nothing: no state is kept."""

    def release(self, owner: Hashable) -> None:
        """Do nothing: no state is kept."""


class CachedRunner:
    """Prefills a sequence in chunks, but for its last token; then every step computes one token and a draft.

    Up to INLINE new tokens are computed within the step instead: after a fully accepted draft, the draft model's
    cache is one token behind.
    """

    def __init__(self, model: Transformer, manager: CacheManager, upload: Upload | None = None) -> None:
        self.model, self.manager = model, manager
        ring = isinstance(manager.cache, RingCache)  # takes few tokens at a time
        self.chunk, self.max_inline = (SPARE, 1) if ring else (CHUNK, INLINE)
        self.upload, self.prefill_ms = upload or Upload(model.embedding.weight.device), 0.0
        self.computed: list[int] = []

    def plain(self, length: int) -> int:
        return 1

    @torch.inference_mode()
    def forward(
        self,
        owners: Owners,
        token_ids: list[list[int]],
        drafts: list[Tree] | None = None,
        states_from: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        drafts = drafts or [NO_DRAFT] * len(token_ids)
        with self._naming_owner():
            works = [
                self._begin(owner, text, draft, None if states_from is None else states_from[at], taps)
                for at, (owner, text, draft) in enumerate(zip(owners, token_ids, drafts, strict=True))
            ]
            logits, states = self._verify(works, states_from is not None, taps)
        return self._done(works, logits, states)

    @contextmanager
    def _naming_owner(self) -> Iterator[None]:
        try:
            yield
        except OutOfBlocks as error:
            error.owner = self.manager.owner(error.row)
            raise

    def _done(self, works: list[Work], logits: Tensor, states: list[Tensor] | None) -> TargetOutput:
        self.computed = [work.prefilled + work.count for work in works]
        for work in works:
            self.manager.appended(work.row, work.new, len(work.draft.tokens))
            work.row.states = []
        return TargetOutput(logits, states)

    def _verify(
        self, works: list[Work], wants_states: bool, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Return logits [R, K+1, V] after each sequence and each draft token, and the states that are wanted."""
        inputs = self._inputs(works)
        hidden, outputs = self.run(inputs, taps)
        states = None
        if wants_states:
            each = zip(works, outputs, strict=True)
            states = [torch.cat((*work.states, of_row[work.skip : work.count])) for work, of_row in each]
        return self.model.logits(inputs.read_from(hidden)), states

    def _begin(
        self, owner: Hashable, text: list[int], draft: Tree, states_from: int | None, taps: tuple[int, ...]
    ) -> Work:
        """Prefill all but the tokens that the step itself computes, and return those."""
        start = window_start(len(text) + draft.depth, self.model.config.context)
        window = text[start:]
        row = self.manager.begin(owner, window, borrow=states_from is None)
        first = len(window) if states_from is None else min(max(states_from - start, 0), len(window) - 1)
        before = len(row.held)
        if len(window) - len(row.held) > self.max_inline:
            began = time.perf_counter()
            while len(row.held) < len(window) - 1:
                held = len(row.held)
                work = Work(row, window[held : min(held + self.chunk, len(window) - 1)], NO_DRAFT, max(0, first - held))
                row.states += self._prefill(work, first < held + len(work.new), taps)
                self.manager.appended(row, work.new)
            synchronize(self.model.embedding.weight.device)
            self.prefill_ms += (time.perf_counter() - began) * 1e3
        held = len(row.held)
        return Work(row, window[held:], draft, max(0, first - held), row.states, held - before)

    def _prefill(self, work: Work, wants_states: bool, taps: tuple[int, ...]) -> list[Tensor]:
        """Run a chunk of a prompt through the model; return the states [n, F] that are wanted, if any."""
        _, outputs = self.run(self._inputs([work], last=not wants_states), taps)
        return [outputs[0, work.skip :]] if wants_states else []

    def _inputs(self, works: list[Work], last: bool = False) -> Inputs:
        for work in works:
            self.manager.cache.make_room(work.row.number, work.count)
        return stage_inputs(works, self.manager.cache, set(self.model.config.windows), self.upload, last)

    def run(self, inputs: Inputs, taps: tuple[int, ...] = (), draft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return hidden states [R, T, D] of new tokens and drafts, and these with the tapped layers [R, T, F].

        draft: int64 [R, K] on the device, its tokens that the inputs name.
        """
        metadata, wanted = inputs.metadata, inputs.wanted
        hidden, tapped = self.model.states(
            inputs.tokens.tensor,
            inputs.positions if isinstance(inputs.positions, range) else inputs.positions.tensor,
            None if wanted is None else wanted.tensor,
            taps=taps,
            cached={
                window: CachedAttention(metadata, ranges, self.model.kernels)
                for window, ranges in metadata.ranges.items()
            },
            draft=draft,
        )
        return hidden, hidden if tapped is None else torch.cat((hidden, tapped), -1)

    def commit(self, owner: Hashable, nodes: list[int], tokens: list[int]) -> None:
        self.manager.keep(owner, nodes, tokens)

    def release(self, owner: Hashable) -> None:
        self.manager.release(owner)


@dataclass(frozen=True)
class Work:
    """What a forward computes for one sequence."""

    row: CacheEntry
    new: list[int]  # its tokens that the cache's row lacks
    draft: Tree
    skip: int  # positions, from the first new one on, whose states are not wanted
    states: list[Tensor] = field(default_factory=list)  # those that a prefill gave
    prefilled: int = 0  # positions

    @cached_property
    def count(self) -> int:
        return len(self.new) + len(self.draft.tokens)

    @cached_property
    def positions(self) -> list[int]:
        """List the positions in the window; nodes of one level share theirs."""
        start, end = len(self.row.held), len(self.row.held) + len(self.new)
        return [*range(start, end), *(end - 1 + depth for depth in self.draft.depths)]

    @property
    def parents(self) -> list[int]:
        """List, for every new token and node, the number of the one that it follows; -1 for the row's last entry."""
        text = len(self.new)
        return [*range(-1, text - 1), *(text + parent if parent >= 0 else text - 1 for parent in self.draft.parents)]


def cache_shape(config: ModelConfig) -> CacheShape:
    return CacheShape(config.layers, config.kv_heads, config.head_dim)


def make_manager(
    model: Transformer, options: KVOptions, rows: int, tokens: int, computed: torch.dtype | None = None
) -> CacheManager:
    """Make an empty cache for `rows` sequences of at most `tokens` tokens, output included.

    computed: the dtype that attention reads, by default the model's. UserError if there can be no such cache.
    """
    config, weight = model.config, model.embedding.weight
    longest = min(tokens, config.context) + DRAFT_ROOM
    cache = make_cache(
        options, cache_shape(config), rows, longest, computed or weight.dtype, weight.device, config.window
    )
    return CacheManager(cache, rows, tokens)


def make_runner(model: Transformer, options: KVOptions, rows: int, tokens: int) -> ModelRunner:
    """Make a runner, with a cache of its own as in make_manager."""
    if options.kind == "off" or not model.has_cache:
        return UncachedRunner(model)
    return CachedRunner(model, make_manager(model, options, rows, tokens))
