"""Checks, before anything is decoded, that a request fits the KV cache and the memory.

python generate.py --kv static --kv-slots 8 --prompt "from pathlib import"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from common.device import available_memory
from common.errors import UserError

from .config import ModelConfig
from .cost import forward_bytes, ranking_bytes
from .kv_cache import PAGE, KVOptions, PagedCache, StaticCache, needed_bytes
from .kv_cache.manager import CacheManager
from .load import LoadedModel
from .model import Transformer
from .runner import CHUNK, DRAFT_ROOM, CachedRunner, ModelRunner, cache_shape
from .sequence import Sequence

SEQUENCE = 4096  # bytes of a waiting sequence, without its tokens
POOL = 0.5  # share of the free memory that the pages of all caches take at most, if --kv-pages does not say how many


def check_capacity(
    loaded: LoadedModel,
    firsts: list[Sequence],
    options: KVOptions,
    tree: int,
    n: int,
    beams: int,
    batch: int,
    caches: Collection[CacheManager],
) -> None:
    """Raise UserError if n samples of each of these sequences, `batch` of them at once, do not fit.

    tree: nodes of a draft tree. caches: those that are allocated already, which this run uses or frees. A beam search
    has no cache.
    """
    config, weight = loaded.config, loaded.model.embedding.weight
    lengths = [min(each.length + each.params.max_new_tokens, config.context) for each in firsts]
    rows, longest = min(len(firsts) * n, batch) * beams, max(lengths)
    if options.kind == "off" or beams > 1 or not loaded.model.has_cache:
        needed = forward_bytes(config, rows, longest, weight.itemsize) + ranking_bytes(config, beams)
    else:
        check_slots(options, [length + tree for length in lengths], bool(tree))
        if caches and all(manager.fits(rows, longest) for manager in caches):
            return  # as large a run was checked; to ask the system takes as long as a few steps of a small model
        needed = cached_bytes(config, options, rows, longest, weight.dtype)
    free = available_memory(weight.device) + sum(manager.cache.nbytes() for manager in caches if manager.idle)
    completions = len(firsts) * n * beams
    needed += completions * (SEQUENCE + 8 * longest)
    if needed > free:
        raise UserError(
            f"{completions} completions of up to {longest} tokens, {rows} at once, need {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free: give fewer prompts, or a smaller --n, --batch-size, --beams or "
            "--max-tokens"
        )


def fitted(
    options: KVOptions,
    models: dict[Transformer, torch.dtype],
    caches: dict[Transformer, CacheManager],
    rows: int,
    tokens: int,
) -> KVOptions:
    """Return the options for caches of so many rows and tokens that fit in memory; UserError if they do not.

    models: with the dtypes that their attention reads. caches: those that are allocated already. If they suffice, the
    system is not asked for its free memory, which takes as long as a few steps of a small model. Pages suffice for all
    rows at full length, if these take at most POOL of the memory; otherwise there are as many as that holds, and
    sequences wait or are preempted.
    """

    def needed(of: KVOptions) -> int:
        each = ((m.config, dtype, min(tokens, m.config.context) + DRAFT_ROOM) for m, dtype in models.items())
        return sum(needed_bytes(of, cache_shape(c), rows, length, dtype, c.window) for c, dtype, length in each)

    if options.kind in ("off", "dynamic") or all(m in caches and caches[m].fits(rows, tokens) for m in models):
        return options
    free = available_memory(next(iter(models)).embedding.weight.device)
    free += sum(manager.cache.nbytes() for manager in caches.values() if manager.idle)
    if options.kind == "paged" and not options.pages and needed(options) > POOL * free:
        options = dataclasses.replace(
            options, pages=max(1, int(POOL * free / needed(KVOptions("paged", options.format, 0, 1))))
        )
    if needed(options) > free:
        raise UserError(
            f"KV caches for {rows} sequences of up to {tokens} tokens need {needed(options) / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free: give a smaller --batch-size, --kv-slots or --kv-pages, or --kv paged"
        )
    return options


def check_caches(sequence: Sequence, target: ModelRunner) -> None:
    """Raise UserError if the caches of the target and of the sequence's draft model can never hold it."""
    length = min(len(sequence.prompt) + sequence.params.max_new_tokens, target.model.config.context)
    length += sequence.reach if sequence.branches else 0
    for runner in (target, sequence.draft):
        if not isinstance(runner, CachedRunner):
            continue
        cache = runner.manager.cache
        if isinstance(cache, PagedCache):
            if cache.pages(length) > len(cache.blocks.users):
                raise UserError(
                    f"out of pages: there are {len(cache.blocks.users)} of {PAGE} tokens, and {cache.pages(length)} "
                    "are needed (prompt and new tokens): give more --kv-pages, or a smaller --max-tokens"
                )
        elif isinstance(cache, StaticCache) and length > cache.capacity:
            raise UserError(f"the KV cache holds {cache.capacity} tokens per text, and {length} are needed")


def check_slots(options: KVOptions, lengths: list[int], tree: bool) -> None:
    """Fail before decoding: `static` needs slots for the longest sequence, `paged` at least pages for the shortest."""
    what = "prompt, new tokens and a tree" if tree else "prompt and new tokens"
    if 0 < options.slots < max(lengths):
        raise UserError(
            f"the KV cache holds {options.slots} tokens per text, and {max(lengths)} are needed ({what}): give "
            "a larger --kv-slots, or 0 for as many as the request can need"
        )
    if 0 < options.pages < (pages := -(-min(lengths) // PAGE)):
        raise UserError(
            f"out of pages: there are {options.pages} of {PAGE} tokens, and {pages} are needed ({what}): give "
            "more --kv-pages, or 0 for as many as the request can need"
        )


def cached_bytes(config: ModelConfig, options: KVOptions, rows: int, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of the cache, of a chunk of a prompt and of a step. Pages for one sequence suffice."""
    waits = options.kind == "paged" and not options.pages  # other sequences wait for pages: see `fitted`
    cache = needed_bytes(options, cache_shape(config), 1 if waits else rows, length + DRAFT_ROOM, dtype, config.window)
    chunk = forward_bytes(config, 1, length, dtype.itemsize) * min(CHUNK, length) // length
    return cache + chunk + forward_bytes(config, rows, 1, dtype.itemsize)
