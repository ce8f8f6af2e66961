"""The cases for what works on caches: `kv_append`, `rope_append`, `decode_attention`, `flash_prefill`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.key_ranges import KeyRanges, paths_of
from engine.kernels.metadata import AttentionMetadata, attention_metadata
from engine.kv_cache import CacheShape, DynamicCache, KVCache, PagedCache, RingCache, StaticCache
from engine.kv_cache.storage import Storage
from engine.transfers import Upload

from .cases import Case, Cases, Function, poisoned
from .layers import tables

WINDOW = 48


class Setting(NamedTuple):
    kind: str
    stored: torch.dtype
    computed: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        stored, computed = (str(dtype).removeprefix("torch.") for dtype in (self.stored, self.computed))
        return f"{self.kind} {stored} for {computed}, {self.heads} heads over {self.kv_heads} of {self.head_dim}"


def settings(full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Setting]:
    for dtype in dtypes:
        for kind in ("static", "paged", "ring", "dynamic"):
            yield Setting(kind, dtype, dtype, 6, 2, 8)
            if full or kind in ("static", "paged"):
                yield Setting(kind, torch.int8, dtype, 4, 4, 16)
        yield Setting("static", torch.float16, dtype, 5, 1, 12)
        if full:
            for kind in ("static", "paged"):
                for stored in (dtype, torch.int8):
                    yield Setting(kind, stored, dtype, 32, 8, 128)
                    yield Setting(kind, stored, dtype, 25, 25, 64)


def stores(cache: KVCache) -> list[Storage]:
    assert isinstance(cache, StaticCache | RingCache | PagedCache)
    return [*cache.keys, *cache.values]


def make(device: torch.device, of: Setting, lengths: list[int], new: int) -> KVCache:
    """Rows of some lengths, in two layers; all else is poison."""
    shape = CacheShape(2, of.kv_heads, of.head_dim)
    how = of.stored, of.computed, device
    most, rows = max(lengths, default=0) + new, len(lengths)
    cache: KVCache
    if of.kind == "static":
        cache = StaticCache(shape, rows, most + 3, *how)
    elif of.kind == "ring":
        cache = RingCache(shape, rows, WINDOW, *how)
    elif of.kind == "dynamic":
        cache = DynamicCache(shape, rows, *how)
    else:
        cache = PagedCache(shape, rows, sum(-(-(length + new) // 16) for length in lengths) + 2, *how)
        cache.free = cache.free[1::2] + cache.free[::2]  # pages of a row are seldom neighbours
    if of.kind != "dynamic":
        for storage in stores(cache):
            storage.values.fill_(float("nan") if storage.values.is_floating_point() else 99)
            if storage.scales is not None:
                storage.scales.fill_(float("nan"))
    for row, length in enumerate(lengths):
        for start in range(0, length, 16):  # a ring takes no more at once
            count = min(16, length - start)
            cache.make_room(row, count)
            for layer in range(2):
                x = new_tokens(device, of, 1, count, seed=1000 * row + start + layer)
                reference.kv_append(metadata_of(cache, [row], [count]), layer, *x)
            cache.keep(row, list(range(count)))
    return cache


def metadata_of(cache: KVCache, rows: list[int], counts: list[int], T: int | None = None) -> AttentionMetadata:
    device = next(each.device for each in contents(cache))
    return attention_metadata(cache, rows, counts, Upload(device), T)


def new_tokens(device: torch.device, of: Setting, rows: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    return (
        poisoned(device, of.computed, rows, count, of.kv_heads, of.head_dim, seed=seed),
        poisoned(device, of.computed, rows, count, of.kv_heads, of.head_dim, seed=seed + 500),
    )


def contents(cache: KVCache) -> list[Tensor]:
    """All that a cache holds, poison included."""
    if isinstance(cache, DynamicCache):
        each = [storage for of_layer in (*cache.keys, *cache.values) for storage in of_layer]
    else:
        each = stores(cache)
    return [tensor for storage in each for tensor in (storage.values, storage.scales) if tensor is not None]


def append_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for of in settings(full, dtypes):
        for lengths, rows, counts in (([0], [0], [1]), ([70, 0, 33], [2, 0, 1], [3, 0, 5]), ([47], [0], [16])):

            def run(function: Function, of=of, lengths=lengths, rows=rows, counts=counts) -> list[Tensor]:  # type: ignore[no-untyped-def]
                cache, T = make(device, of, lengths, 16), max(counts)
                for row, count in zip(rows, counts, strict=True):
                    cache.make_room(row, count)
                keys, values = new_tokens(device, of, len(rows), T + 1, seed=9)
                metadata = metadata_of(cache, rows, counts)
                for layer in range(2):
                    function(metadata, layer, keys[:, :T], values[:, 1:])  # memory with gaps
                return contents(cache)

            yield Case(f"{of}, lengths {lengths}, {counts} more", run, of.computed)


def rope_append_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for of in settings(full, dtypes):
        for by_row in (False, True):

            def run(function: Function, of=of, by_row=by_row) -> list[Tensor]:  # type: ignore[no-untyped-def]
                cache, counts = make(device, of, [0, 35], 4), [2, 3]
                for row, count in enumerate(counts):
                    cache.make_room(row, count)
                query = poisoned(device, of.computed, 2, 3, of.heads, of.head_dim, seed=4)
                key, value = new_tokens(device, of, 2, 3, seed=9)
                turn = tables(device, of.computed, *([2] if by_row else []), 3, 1, of.head_dim)
                turned = function(metadata_of(cache, [0, 1], counts), 1, query, key, value, *turn)
                read = [part.float() for row, count in enumerate(counts) for part in cache.read(1, row, count)]
                return [turned, *read] if of.stored != torch.int8 else [turned]  # a level may differ by one

            yield Case(f"{of}{', tables by row' if by_row else ''}", run, of.computed)


# The new tokens of a step: parents as in engine/tree.py.
BRANCHES = [-1, 0, 0, 1, 1, 2, 5]


def chain(count: int) -> list[int]:
    return list(range(-1, count - 1))


class Asked(NamedTuple):
    """What attention is called with."""

    query: Tensor
    metadata: AttentionMetadata
    layer: int
    ranges: KeyRanges


def asked(
    device: torch.device, of: Setting, lengths: list[int], parents: list[int], window: int | None = None, seed: int = 9
) -> Asked:
    """A cache with new tokens appended in layer 1, and all that attention over them is called with."""
    W = len(parents)
    cache = make(device, of, lengths, W)
    rows = list(range(len(lengths)))[::-1]
    for row in rows:
        cache.make_room(row, W)
    for row in rows:
        reference.kv_append(metadata_of(cache, [row], [W]), 1, *new_tokens(device, of, 1, W, seed=seed))
    query = poisoned(device, of.computed, 1, W, of.heads + 1, of.head_dim, seed=7)[:, :, 1:]
    return Asked(query.expand(len(rows), -1, -1, -1), *seen(cache, rows, parents, window, device))


def seen(
    cache: KVCache, rows: list[int], parents: list[int], window: int | None, device: torch.device
) -> tuple[AttentionMetadata, int, KeyRanges]:
    """The metadata of the same new tokens behind some rows, the layer, and what each token sees."""
    paths = [paths_of(cache.length(row), parents) for row in rows]
    metadata = attention_metadata(
        cache, rows, [len(parents)] * len(rows), Upload(device), windows={window}, paths=paths
    )
    return metadata, 1, metadata.ranges[window]


def attention_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for of in settings(full, dtypes):
        steps: list[tuple[str, list[int], list[int]]] = [
            ("one token", [0, 75], chain(1)),
            ("a chain of 5", [60, 1], chain(5)),
            ("a tree", [64], BRANCHES),
        ]
        if full:
            steps += [
                ("a long text", [1000, 513, 255], chain(16)),
                ("a tree behind a long text", [510], BRANCHES),
            ]
        for name, lengths, parents in steps:
            for window in (None, WINDOW):
                if (of.kind == "ring" and window is None) or (window and of.kind == "paged" and not full):
                    continue

                def run(function: Function, of=of, lengths=lengths, parents=parents, window=window) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    return [function(*asked(device, of, lengths, parents, window))]

                yield Case(f"{of}, {name}{', window' if window else ''}", run, of.computed)

        if not full and (of.kind, of.stored == torch.int8) not in (("static", False), ("paged", True), ("ring", False)):
            continue
        if of.kind == "dynamic":
            continue

        def alone(function: Function, of=of) -> list[Tensor]:  # type: ignore[no-untyped-def]
            """A chain of 16 against its tokens one by one."""
            window = WINDOW if of.kind == "ring" else None
            query, metadata, *rest = asked(device, of, [61], chain(16), window)
            together = function(query, metadata, *rest)
            pairs = []
            for w in (0, 2, 3, 9, 15):
                fewer, layer, ranges = seen(metadata.cache, [0], chain(w + 1), window, device)
                last = ranges.only(torch.tensor([[w]], device=device))
                pairs += [function(query[:, w : w + 1], fewer, layer, last), together[:, w : w + 1]]
            return pairs

        yield Case(f"{of}, the same bits for 1 and 16 queries", alone, of.computed, invariance=True)
        if of.kind == "ring":
            continue

        def line(function: Function, of=of) -> list[Tensor]:  # type: ignore[no-untyped-def]
            """Every node of a tree against the same tokens in a row."""
            whole, pairs = asked(device, of, [62], BRANCHES), list[Tensor]()
            together, paths = function(*whole), paths_of(0, BRANCHES)
            assert paths is not None
            keys, values = new_tokens(device, of, 1, len(BRANCHES), seed=9)
            for node, path in enumerate(paths[1]):
                other = make(device, of, [62], 7)
                other.make_room(0, len(path))
                metadata, layer, ranges = seen(other, [0], chain(len(path)), None, device)
                reference.kv_append(metadata, 1, keys[:, path], values[:, path])
                last = ranges.only(torch.tensor([[len(path) - 1]], device=device))
                one = function(whole.query[:, node : node + 1], metadata, layer, last)
                pairs += [one, together[:, node : node + 1]]
            return pairs

        yield Case(f"{of}, the same bits in a tree and in a row", line, of.computed, invariance=True)


def prefill_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for of in settings(full, dtypes):
        for lengths, W in (([0], 1), ([3, 40], 16), *([([0, 70], 130), ([300], 512)] if full else [([5], 70)])):
            for window in (None, WINDOW):
                if of.kind == "ring" and (W > 16 or window is None):
                    continue
                if window and of.kind in ("paged", "dynamic") and not full:
                    continue

                def run(function: Function, of=of, lengths=lengths, W=W, window=window) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    return [function(*asked(device, of, lengths, chain(W), window))]

                yield Case(f"{of}, {W} tokens behind {lengths}{', window' if window else ''}", run, of.computed)


OPS: dict[str, Cases] = {
    "kv_append": append_cases,
    "rope_append": rope_append_cases,
    "decode_attention": attention_cases,
    "flash_prefill": prefill_cases,
}
