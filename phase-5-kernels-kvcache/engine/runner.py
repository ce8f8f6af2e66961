"""Runs a model over sequences that grow: without a cache over all tokens, or with one over the new tokens alone.

The loop calls a runner and does not know which kind it is. `owner` identifies a sequence from step to step.

    runner = make_runner(loaded.model, KVOptions(), rows=1, tokens=300)
    runner.forward(["a text"], [loaded.tokenizer.encode("from pathlib import")]).logits
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from common.device import synchronize

from .attention import CachedAttention, beside_padding, seen
from .config import ModelConfig
from .context import window_start
from .kv_cache import CacheShape, KVCache, KVOptions, OutOfBlocks, make_cache
from .kv_cache.manager import CacheEntry, CacheManager
from .kv_cache.ring import SPARE
from .model import Transformer
from .steps import TargetOutput
from .target import target_forward
from .tree import Tree

NO_DRAFT = Tree([], [])
DRAFT_ROOM = 64  # nodes of the largest tree
CHUNK = 512  # tokens of a long text that are prefilled in one forward
Owners = list[Hashable]


class ModelRunner(Protocol):
    """Runs one model over sequences, which it knows by their owner: any hashable, the loop's `Sequence`."""

    model: Transformer
    prefill_ms: float  # spent so far on prompts
    computed: list[int]  # positions of each sequence that the last forward computed

    def plain(self, length: int) -> int:
        """Positions that a forward without a draft computes for a sequence of this length."""
        ...

    def forward(
        self,
        owners: Owners,
        texts: list[list[int]],
        drafts: list[Tree] | None = None,
        known: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        """One forward over texts (token ids of prompt and output) and drafts; known, taps as in target_forward."""
        ...

    def commit(self, owner: Hashable, nodes: list[int]) -> None:
        """Keep these nodes of the last forward's draft: they are accepted and are not computed again."""
        ...

    def release(self, owner: Hashable) -> None:
        """The sequence is finished."""
        ...


class UncachedRunner:
    """`--kv off`: every forward computes all tokens of every sequence."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.prefill_ms = model, 0.0
        self.computed: list[int] = []

    def plain(self, length: int) -> int:
        return length - window_start(length, self.model.config.context)

    def forward(
        self,
        owners: Owners,
        texts: list[list[int]],
        drafts: list[Tree] | None = None,
        known: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        drafts = drafts or [NO_DRAFT] * len(texts)
        self.computed = [
            self.plain(len(text) + draft.depth) - draft.depth + len(draft.tokens)
            for text, draft in zip(texts, drafts, strict=True)
        ]
        return target_forward(self.model, texts, drafts, known, taps)

    def commit(self, owner: Hashable, nodes: list[int]) -> None:
        """Nothing is kept."""

    def release(self, owner: Hashable) -> None:
        """Nothing was kept."""


class CachedRunner:
    """What a text has besides its last token is prefilled in chunks; then every step computes one token and a draft.

    Up to `max_inline` new tokens are computed within the step instead: after a fully accepted draft, the draft model's
    cache is one token behind.
    """

    def __init__(self, model: Transformer, texts: CacheManager, chunk: int = CHUNK, max_inline: int = 16) -> None:
        self.model, self.texts, self.chunk, self.max_inline = model, texts, chunk, max_inline
        self.prefill_ms = 0.0
        self.computed: list[int] = []

    def plain(self, length: int) -> int:
        return 1

    @torch.inference_mode()
    def forward(
        self,
        owners: Owners,
        texts: list[list[int]],
        drafts: list[Tree] | None = None,
        known: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        drafts = drafts or [NO_DRAFT] * len(texts)
        try:
            works = [
                self._begin(owner, text, draft, None if known is None else known[at], taps)
                for at, (owner, text, draft) in enumerate(zip(owners, texts, drafts, strict=True))
            ]
            logits, states = self._verify(works, known is not None, taps)
        except OutOfBlocks as error:
            error.owner = self.texts.owner(error.row)
            raise
        self.computed = [work.prefilled + work.count for work in works]
        for work in works:
            self.texts.appended(work.row, work.new, work.draft.tokens)
        return TargetOutput(logits, states)

    def _verify(
        self, works: list[Work], wants_states: bool, taps: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Logits [R, K+1, V] behind each text and each of its draft tokens; and the states that are asked for."""
        hidden, outputs = self._forward(works, taps)
        states = None
        if wants_states:
            each = zip(works, outputs, strict=True)
            states = [torch.cat((*work.states, of_row[work.skip : work.count])) for work, of_row in each]
        K = max(len(work.draft.tokens) for work in works)
        if len(works) > 1 or hidden.shape[1] > K + 1:  # of a single text all positions may be read as they stand
            read = [[min(len(work.new) - 1 + j, work.count - 1) for j in range(K + 1)] for work in works]
            device = hidden.device
            hidden = hidden[torch.arange(len(works), device=device)[:, None], torch.tensor(read, device=device)]
        return self.model.logits(hidden), states

    def _begin(self, owner: Hashable, text: list[int], draft: Tree, known: int | None, taps: tuple[int, ...]) -> Work:
        """Prefill what a step does not take along, and say what is left to do."""
        start = window_start(len(text) + draft.depth, self.model.config.context)
        window = text[start:]
        row = self.texts.begin(owner, window, borrow=known is None)
        first = len(window) if known is None else min(max(known - start, 0), len(window) - 1)
        states: list[Tensor] = []
        before = len(row.held)
        if len(window) - len(row.held) > self.max_inline:
            began = time.perf_counter()
            while len(row.held) < len(window) - 1:
                held = len(row.held)
                work = Work(row, window[held : min(held + self.chunk, len(window) - 1)], NO_DRAFT, first)
                states += self._prefill(work, first < held + len(work.new), taps)
                self.texts.appended(row, work.new, [])
            synchronize(self.model.embedding.weight.device)
            self.prefill_ms += (time.perf_counter() - began) * 1e3
        return Work(row, window[len(row.held) :], draft, first, states, len(row.held) - before)

    def _prefill(self, work: Work, wants_states: bool, taps: tuple[int, ...]) -> list[Tensor]:
        """Put a chunk of a text through the model; the states [n, F] that are asked for, if any."""
        _, outputs = self._forward([work], taps, last=not wants_states)
        return [outputs[0, work.skip :]] if wants_states else []

    def _forward(self, works: list[Work], taps: tuple[int, ...], last: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states [R, T, D] of new tokens and drafts, and with the tapped layers beside them [R, T, F].

        With `last` of the last position alone: for a prefill, of which nothing is read.
        """
        weight, cache, windows = self.model.embedding.weight, self.texts.cache, set(self.model.config.windows)
        T = max(work.count for work in works)
        masks: dict[int | None, list[Tensor | None]] = {window: [] for window in windows}
        for work in works:
            number, ancestors = work.row.number, None if work.draft.is_chain else work.ancestors().to(weight.device)
            cache.make_room(number, work.count)
            first, held = cache.first(number), cache.length(number)
            for window in windows:
                mask = seen(work.positions, first, held, ancestors, window, weight)
                masks[window].append(mask if mask is None or work.count == T else beside_padding(mask, T, held - first))
        rows, counts = [work.row.number for work in works], [work.count for work in works]
        behind = {window: CachedAttention(cache, rows, counts, masks[window], self.model.kernels) for window in windows}
        wanted = torch.tensor([[T - 1]], device=weight.device) if last else None
        tokens = [work.new + work.draft.tokens + [0] * (T - work.count) for work in works]
        positions: Tensor | range = range(len(works[0].row.held), len(works[0].row.held) + T)
        if len(works) > 1 or not works[0].draft.is_chain:
            places = [[*work.positions, *[0] * (T - work.count)] for work in works]
            positions = torch.tensor(places, device=weight.device)
        hidden, tapped = self.model.states(
            torch.tensor(tokens, device=weight.device), positions, wanted, taps=taps, cached=behind
        )
        return hidden, hidden if tapped is None else torch.cat((hidden, tapped), -1)

    def commit(self, owner: Hashable, nodes: list[int]) -> None:
        self.texts.keep(owner, nodes)

    def release(self, owner: Hashable) -> None:
        self.texts.release(owner)


@dataclass(frozen=True)
class Work:
    """What a forward is to do for one text."""

    row: CacheEntry
    new: list[int]  # of its tokens, those that come behind what the row holds
    draft: Tree
    first: int  # position in the window from which on states are asked for; past the text where none are
    states: list[Tensor] = field(default_factory=list)  # those that a prefill gave
    prefilled: int = 0  # positions

    @cached_property
    def count(self) -> int:
        return len(self.new) + len(self.draft.tokens)

    @property
    def skip(self) -> int:
        return max(0, self.first - len(self.row.held))

    @cached_property
    def positions(self) -> list[int]:
        """In the window; nodes of one level share theirs."""
        start, end = len(self.row.held), len(self.row.held) + len(self.new)
        return [*range(start, end), *(end - 1 + depth for depth in self.draft.depths)]

    @property
    def parents(self) -> list[int]:
        """Of every new token and node: the number of the one that it follows; -1: what the row holds."""
        text = len(self.new)
        return [*range(-1, text - 1), *(text + parent if parent >= 0 else text - 1 for parent in self.draft.parents)]

    def ancestors(self) -> Tensor:
        """bool [count, count]: which of the new tokens each of them sees."""
        text = len(self.new)
        related = torch.ones(self.count, self.count, dtype=torch.bool).tril()
        related[text:, text:] = self.draft.ancestors()
        return related


def cache_shape(config: ModelConfig) -> CacheShape:
    return CacheShape(config.layers, config.kv_heads, config.head_dim)


def room(model: Transformer, options: KVOptions, rows: int, tokens: int, computed: torch.dtype) -> KVCache:
    """An empty cache for so many texts of at most so many tokens, output included. UserError where it cannot be."""
    config, weight = model.config, model.embedding.weight
    longest = min(tokens, config.context) + DRAFT_ROOM
    return make_cache(options, cache_shape(config), rows, longest, computed, weight.device, config.window)


def make_runner(model: Transformer, options: KVOptions, rows: int, tokens: int) -> ModelRunner:
    """A runner for so many texts of at most so many tokens, output included. UserError where the cache cannot be."""
    if options.kind == "off" or not model.has_cache:
        return UncachedRunner(model)
    texts = CacheManager(room(model, options, rows, tokens, model.embedding.weight.dtype), rows)
    if options.kind == "ring":  # takes few tokens at a time
        return CachedRunner(model, texts, chunk=SPARE, max_inline=1)
    return CachedRunner(model, texts)
