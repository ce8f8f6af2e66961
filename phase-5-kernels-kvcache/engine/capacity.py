"""Checks, before anything is decoded, that a request fits the KV cache and the memory.

python generate.py --kv static --kv-slots 8 --prompt "from pathlib import"
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from common.device import available_memory
from common.errors import UserError

from .config import ModelConfig
from .cost import forward_bytes, ranking_bytes
from .kv_cache import PAGE, KVOptions, needed_bytes
from .kv_cache.manager import CacheManager
from .load import LoadedModel
from .runner import CHUNK, DRAFT_ROOM, cache_shape
from .sequence import Sequence


def check_capacity(
    loaded: LoadedModel,
    firsts: list[Sequence],
    options: KVOptions,
    tree: int,
    n: int,
    beams: int,
    caches: Collection[CacheManager],
) -> None:
    """Raise UserError if n samples of each of these sequences, decoded together, do not fit.

    tree: nodes of a draft tree. caches: those that are allocated already, which this run uses or frees. A beam search
    has no cache.
    """
    config, weight = loaded.config, loaded.model.embedding.weight
    lengths = [min(each.length + each.params.max_new_tokens, config.context) for each in firsts]
    rows, longest = len(firsts) * n * beams, max(lengths)
    if options.kind == "off" or beams > 1 or not loaded.model.has_cache:
        needed = forward_bytes(config, rows, longest, weight.itemsize) + ranking_bytes(config, beams)
    else:
        check_slots(options, [length + tree for length in lengths], bool(tree))
        if caches and all(manager.fits(rows, longest) for manager in caches):
            return  # as large a run was checked; to ask the system takes as long as a few steps of a small model
        needed = cached_bytes(config, options, rows, longest, weight.dtype)
    free = available_memory(weight.device) + sum(manager.cache.nbytes() for manager in caches if manager.idle)
    if needed > free:
        raise UserError(
            f"{rows} completions of up to {longest} tokens need about {needed / 2**30:.1f} GiB at once, and "
            f"{free / 2**30:.1f} GiB are free: give fewer prompts, or a smaller --n, --beams or --max-tokens"
        )


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
    """Return the bytes of the cache, of a chunk of a prompt and of a step."""
    cache = needed_bytes(options, cache_shape(config), rows, length + DRAFT_ROOM, dtype, config.window)
    chunk = forward_bytes(config, 1, length, dtype.itemsize) * min(CHUNK, length) // length
    return cache + chunk + forward_bytes(config, rows, 1, dtype.itemsize)
