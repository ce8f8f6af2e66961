"""The runner without a cache: every forward computes all tokens of every sequence."""

from __future__ import annotations

from collections.abc import Hashable

from .context import window_start
from .model import Transformer
from .steps import TargetOutput
from .target import target_forward
from .transfers import Upload
from .tree import Tree


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
        owners: list[Hashable],
        token_ids: list[list[int]],
        drafts: list[Tree] | None = None,
        states_from: list[int] | None = None,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        drafts = drafts or [Tree([], [])] * len(token_ids)
        self.computed = [
            self.plain(len(text) + draft.depth) - draft.depth + len(draft.tokens)
            for text, draft in zip(token_ids, drafts, strict=True)
        ]
        return target_forward(self.model, token_ids, drafts, states_from, taps)

    def missing(self, owner: Hashable, length: int) -> int:
        return 1  # all are computed, in every step alike

    def commit(self, owner: Hashable, nodes: list[int], tokens: list[int]) -> None:
        """Do nothing: no state is kept."""

    def release(self, owner: Hashable) -> None:
        """Do nothing: no state is kept."""
