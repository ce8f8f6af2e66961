"""The inputs of a forward with a cache: staged by the host in one upload, or formed on the device from the last."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels import Kernels
from .kernels.key_ranges import KeyRanges, paths_of
from .kernels.metadata import AttentionMetadata, attention_metadata
from .kernels.tokens import SamplingMetadata
from .kv_cache import KVCache
from .sequence import Sequence
from .transfers import Staged, Upload
from .tree import Tree
from .verify import RandomSource

if TYPE_CHECKING:
    from .runner import Work


@dataclass(frozen=True)
class Inputs:
    """Of a forward of R rows of T tokens."""

    metadata: AttentionMetadata
    tokens: Staged  # [R, T]; -1 - j is token j of the row's draft, as in the op `embed`
    positions: Staged | range  # [R, T]; a range for a single row
    wanted: Staged | None = None  # [R, W]: the only positions whose output is wanted
    read: Staged | None = None  # [R, K+1]: those that logits are wanted of; None: all

    def read_from(self, hidden: Tensor) -> Tensor:
        """Return the states [R, K+1, D] of [R, T, D] that logits are wanted of."""
        if self.read is None:
            return hidden
        return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], self.read.tensor]


def stage_inputs(
    works: list[Work], cache: KVCache, windows: set[int | None], upload: Upload, last: bool = False
) -> Inputs:
    """Stage all that a forward over these rows needs on the device. The cache has room for it.

    last: of the last position only is the output wanted, for a prefill that is not read.
    """
    R, T, K = len(works), max(work.count for work in works), max(len(work.draft.tokens) for work in works)
    rows, counts = [work.row.number for work in works], [work.count for work in works]
    paths = [None if work.draft.is_chain else paths_of(len(work.row.held), work.parents) for work in works]
    metadata = attention_metadata(cache, rows, counts, upload, T, windows, paths)
    tokens = upload.put_rows([work.new + work.draft.tokens for work in works], T)
    positions: Staged | range = range(len(works[0].row.held), len(works[0].row.held) + T)
    if R > 1 or not works[0].draft.is_chain:
        positions = upload.put_rows([work.positions for work in works], T)
    read = None
    if R > 1 or T > K + 1:  # of a single row all positions are read as they are
        columns = (min(len(work.new) - 1 + j, work.count - 1) for work in works for j in range(K + 1))
        read = upload.put(columns, R, K + 1)
    return Inputs(metadata, tokens, positions, upload.put([T - 1], 1, 1) if last else None, read)


def sampling_metadata(upload: Upload, sequences: list[Sequence], source: RandomSource) -> SamplingMetadata:
    """Stage how the sequences choose their next tokens."""
    params, keys, lengths = zip(*((s.params, s.key, s.length) for s in sequences), strict=True)
    return SamplingMetadata.of(upload, params, source, keys, lengths, [(s.prompt, s.tokens) for s in sequences])


def on_device(width: int) -> Tree:
    """Return a chain of draft tokens that only the device knows."""
    return Tree.chain([-1 - j for j in range(width)])


def following(kernels: Kernels, inputs: Inputs, j: int, counts: Tensor, known: list[int], windows: Tensor) -> Inputs:
    """Return the inputs of the next forward: token j - 1 of the draft, in rows with counts[r] = known[r] = 1.

    windows: int32, those of the metadata's ranges.
    """
    metadata = inputs.metadata
    at, positions, end, lo = kernels.advance(metadata.at.tensor, counts, 1, windows)
    ranges = {
        window: KeyRanges(Staged(of_window), Staged(end), simple=[False] * len(known))
        for window, of_window in zip(metadata.ranges, lo, strict=True)
    }
    after = dataclasses.replace(metadata, starts=metadata.ends, counts=known, at=Staged(at), ranges=ranges)
    return Inputs(after, Staged(torch.full_like(positions, -j)), Staged(positions))
