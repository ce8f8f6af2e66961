"""A cache of token ids by text; texts that are missing are tokenised in one batch.

A service sees the same prompts again and again: templates, retries, the turns of one conversation. The cache evicts the
least recently used entry (LRU). Its limit is in bytes, not in entries, because lengths of prompts differ by a factor of
a thousand.

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

ENTRY = 150  # bytes of an OrderedDict's entry, without the text and the ids


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made. A text that occurs twice in one call counts as a miss and a hit."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int  # of all entries: text, ids (4 bytes each), and ENTRY
    limit: int

    def __str__(self) -> str:
        return (
            f"tokenizer cache: {self.hits} of {self.hits + self.misses} texts were hits, {self.evictions} evicted; "
            f"{self.entries} kept in {self.bytes / MIB:.1f} of {self.limit / MIB:g} MiB"
        )


class TokenizerCache:
    """Caches the ids of recently used texts. A text larger than `limit` (bytes) is encoded, and not kept."""

    def __init__(self, tokenizer: Tokenizer, limit: int = 16 * MIB) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self._store: OrderedDict[str, array[int]] = OrderedDict()  # least recently used first
        self._hits = self._misses = self._evictions = self._bytes = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of every text, equal to the tokenizer's `encode`. UserError if a text is not UTF-8."""
        new = [text for text in dict.fromkeys(texts) if text not in self._store]
        # For a single text the tokenizer's threads are of no use.
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
