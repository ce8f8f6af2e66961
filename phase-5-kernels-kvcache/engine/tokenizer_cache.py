"""Texts that were tokenised before are looked up, and those that were not are tokenised together.

A service sees the same prompts again and again: templates, retries, the turns of one conversation. The store forgets
what was not asked for the longest (LRU). Its limit is in bytes, not in entries, because prompts differ by a factor of a
thousand in length: a limit of entries would say nothing about memory.

    cache = TokenizerCache(loaded.tokenizer)
    cache.encode(["import os", "import re", "import os"])
    cache.stats  # CacheStats(hits=1, misses=2, ...)
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from common.device import MIB
from common.tokenizer import Tokenizer

ENTRY = 150  # bytes that an OrderedDict takes for an entry, besides the text and the ids


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made. A text that comes twice in one call is encoded once: a miss, then a hit."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int  # of all entries: text, ids (4 bytes each), and the store's own
    limit: int

    def __str__(self) -> str:
        return (
            f"tokenizer cache: {self.hits} of {self.hits + self.misses} texts were known, {self.evictions} forgotten; "
            f"{self.entries} kept in {self.bytes / MIB:.1f} of {self.limit / MIB:g} MiB"
        )


class TokenizerCache:
    """The encodings of the texts that came last. One text larger than `limit` (bytes) is encoded, and not kept."""

    def __init__(self, tokenizer: Tokenizer, limit: int = 16 * MIB) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self._store: OrderedDict[str, array[int]] = OrderedDict()  # the longest unused first
        self._hits = self._misses = self._evictions = self._bytes = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of every text, as the tokenizer's own `encode` gives them. UserError where one is not UTF-8."""
        new = [text for text in dict.fromkeys(texts) if text not in self._store]
        # One text has nobody to share the cores with, and the tokenizer need not start its threads.
        encoded = [self.tokenizer.encode(text) for text in new] if len(new) == 1 else self.tokenizer.encode_batch(new)
        found = {text: array("I", ids) for text, ids in zip(new, encoded, strict=True)}
        for text in texts:
            if text in self._store:
                found[text] = self._store[text]
                self._store.move_to_end(text)
        self._misses += len(new)
        self._hits += len(texts) - len(new)
        for text in new:
            self._keep(text, found[text])
        return [found[text].tolist() for text in texts]

    def _keep(self, text: str, ids: array[int]) -> None:
        size = _size(text, ids)
        if size > self.limit:
            return
        self._store[text] = ids
        self._bytes += size
        while self._bytes > self.limit:
            self._bytes -= _size(*self._store.popitem(last=False))
            self._evictions += 1

    @property
    def stats(self) -> CacheStats:
        return CacheStats(self._hits, self._misses, self._evictions, len(self._store), self._bytes, self.limit)


def _size(text: str, ids: array[int]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids) + ENTRY
