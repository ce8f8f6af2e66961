"""The cases for what works on caches: `kv_append`, `rope_append`, `decode_attention`, `flash_prefill`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kv_cache import CacheShape, DynamicCache, KVCache, PagedCache, RingCache, StaticCache
from engine.kv_cache.storage import Storage

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
                reference.kv_append(cache, layer, [row], [count], *x)
            cache.keep(row, list(range(count)))
    return cache


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
                for layer in range(2):
                    function(cache, layer, rows, counts, keys[:, :T], values[:, 1:])  # memory with gaps
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
                turned = function(cache, 1, [0, 1], counts, query, key, value, *turn)
                read = [part.float() for row, count in enumerate(counts) for part in cache.read(1, row, count)]
                return [turned, *read] if of.stored != torch.int8 else [turned]  # a level may differ by one

            yield Case(f"{of}{', tables by row' if by_row else ''}", run, of.computed)


# The new tokens of a step: a chain (None), or parents as in engine/tree.py.
BRANCHES = [-1, 0, 0, 1, 1, 2, 5]


def related(parents: list[int]) -> Tensor:
    """bool [n, n]: which of them each sees, itself included."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def mask_of(cache: KVCache, row: int, ancestors: Tensor, window: int | None, like: Tensor) -> Tensor:
    """[W, n], 0 or -inf, as engine/attention.py makes it."""
    held = cache.length(row) - cache.first(row)
    depths = ancestors.sum(1) - 1
    open_ = torch.cat((torch.ones(len(ancestors), held, dtype=torch.bool), ancestors), 1)
    if window is not None:
        at = torch.cat((torch.arange(held), held + depths))
        open_ &= (held + depths)[:, None] - at < window
    return torch.zeros(open_.shape).masked_fill_(~open_, float("-inf")).to(like.device, like.dtype)


def asked(
    device: torch.device, of: Setting, lengths: list[int], ancestors: Tensor, window: int | None = None, seed: int = 9
) -> tuple[KVCache, Tensor, list[int], list[int], list[Tensor | None]]:
    """A cache with new tokens appended in layer 1, and all that attention over them is called with."""
    W = len(ancestors)
    cache = make(device, of, lengths, W)
    rows = list(range(len(lengths)))[::-1]
    for row in rows:
        cache.make_room(row, W)
    counts = [W] * len(rows)
    for start in range(0, len(rows)):
        keys, values = new_tokens(device, of, 1, W, seed=seed)
        reference.kv_append(cache, 1, rows[start : start + 1], [W], keys, values)
    query = poisoned(device, of.computed, 1, W, of.heads + 1, of.head_dim, seed=7)[:, :, 1:]
    masks: list[Tensor | None] = [
        None if W == 1 and window is None else mask_of(cache, row, ancestors, window, query) for row in rows
    ]
    return cache, query.expand(len(rows), -1, -1, -1), rows, counts, masks


def attention_cases(device: torch.device, full: bool, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for of in settings(full, dtypes):
        steps: list[tuple[str, list[int], Tensor]] = [
            ("one token", [0, 75], torch.ones(1, 1, dtype=torch.bool)),
            ("a chain of 5", [60, 1], torch.ones(5, 5, dtype=torch.bool).tril()),
            ("a tree", [64], related(BRANCHES)),
        ]
        if full:
            steps += [
                ("a long text", [1000, 513, 255], torch.ones(16, 16, dtype=torch.bool).tril()),
                ("a tree behind a long text", [510], related(BRANCHES)),
            ]
        for name, lengths, ancestors in steps:
            for window in (None, WINDOW):
                if (of.kind == "ring" and window is None) or (window and of.kind == "paged" and not full):
                    continue

                def run(function: Function, of=of, lengths=lengths, ancestors=ancestors, window=window) -> list[Tensor]:  # type: ignore[no-untyped-def]
                    cache, query, rows, counts, masks = asked(device, of, lengths, ancestors, window)
                    return [function(query, cache, 1, rows, counts, masks)]

                yield Case(f"{of}, {name}{', window' if window else ''}", run, of.computed)

        if not full and (of.kind, of.stored == torch.int8) not in (("static", False), ("paged", True), ("ring", False)):
            continue
        if of.kind == "dynamic":
            continue

        def alone(function: Function, of=of) -> list[Tensor]:  # type: ignore[no-untyped-def]
            """A chain of 16 against its tokens one by one."""
            window = WINDOW if of.kind == "ring" else None
            chain = torch.ones(16, 16, dtype=torch.bool).tril()
            cache, query, rows, counts, masks = asked(device, of, [61], chain, window)
            together = function(query, cache, 1, rows, counts, masks)
            pairs = []
            for w in (0, 2, 3, 9, 15):
                mask = mask_of(cache, 0, chain[: w + 1, : w + 1], window, query)[w:]
                pairs += [function(query[:, w : w + 1], cache, 1, [0], [w + 1], [mask]), together[:, w : w + 1]]
            return pairs

        yield Case(f"{of}, the same bits for 1 and 16 queries", alone, of.computed, invariance=True)
        if of.kind == "ring":
            continue

        def line(function: Function, of=of) -> list[Tensor]:  # type: ignore[no-untyped-def]
            """Every node of a tree against the same tokens in a row."""
            cache, query, rows, counts, masks = asked(device, of, [62], related(BRANCHES))
            together, pairs = function(query, cache, 1, rows, counts, masks), list[Tensor]()
            keys, values = new_tokens(device, of, 1, len(BRANCHES), seed=9)
            for node in range(len(BRANCHES)):
                path = related(BRANCHES)[node].nonzero()[:, 0].tolist()
                other = make(device, of, [62], 7)
                other.make_room(0, len(path))
                reference.kv_append(other, 1, [0], [len(path)], keys[:, path], values[:, path])
                one = function(query[:, node : node + 1], other, 1, [0], [len(path)], [None])
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
                    chain = torch.ones(W, W, dtype=torch.bool).tril()
                    cache, query, rows, counts, masks = asked(device, of, lengths, chain, window)
                    return [function(query, cache, 1, rows, counts, masks)]

                yield Case(f"{of}, {W} tokens behind {lengths}{', window' if window else ''}", run, of.computed)


OPS: dict[str, Cases] = {
    "kv_append": append_cases,
    "rope_append": rope_append_cases,
    "decode_attention": attention_cases,
    "flash_prefill": prefill_cases,
}
