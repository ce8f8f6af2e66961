"""Who uses which block of a paged cache, and which blocks hold the beginning of a new prompt (a prefix cache).

Keys and values of a token depend on the tokens up to it, and on nothing else. So a full block is named by its tokens
and by the name of the block before it, and blocks with one name have the same contents. A block that nobody uses keeps
its name until its memory is needed; the least recently used one is evicted first.

    blocks = BlockManager(4); block = blocks.take()
    blocks.set_name(block, block_name(b"", [1, 2])); blocks.release(block)
"""

from __future__ import annotations

import hashlib
from array import array


def block_name(before: bytes, tokens: list[int]) -> bytes:
    """Name a full block of these tokens; `before` is the name of the block before it, or empty."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Reference counts and names of the blocks 0, 1, ..., without their memory."""

    def __init__(self, blocks: int) -> None:
        self.users = [0] * blocks  # reference count: rows that hold the block
        self.empty = list(range(blocks))[::-1]  # unused, without a name
        self.cached: dict[int, None] = {}  # unused, with a name; the least recently used first
        self.names: dict[int, bytes] = {}
        self.named: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Return how many blocks can be taken."""
        return len(self.empty) + len(self.cached)

    def take(self) -> int:
        """Return a free block, which now has one user: one without a name, or else the least recently used."""
        if self.empty:
            block = self.empty.pop()
        else:
            block = next(iter(self.cached))
            del self.cached[block]
            self.forget(block)
        self.users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a user to a block that is used, or free with a name."""
        if not self.users[block]:
            del self.cached[block]
        self.users[block] += 1

    def release(self, block: int) -> None:
        """Remove a user. ValueError if there is none."""
        if not self.users[block]:
            raise ValueError(f"block {block} is free already")
        self.users[block] -= 1
        if not self.users[block]:
            if block in self.names:
                self.cached[block] = None
            else:
                self.empty.append(block)

    def set_name(self, block: int, name: bytes) -> None:
        """Make a used, full block findable. If another block has the name already, that one stays the one to find."""
        if name not in self.named:
            self.names[block], self.named[name] = name, block

    def forget(self, block: int) -> None:
        """Drop the block's name, if it has one: its contents are about to change."""
        if (name := self.names.pop(block, None)) is not None:
            del self.named[name]

    def find(self, tokens: list[int], size: int) -> tuple[list[int], list[bytes]]:
        """Return the blocks, and their names, that hold the longest known beginning of these tokens."""
        blocks, names = list[int](), list[bytes]()
        for start in range(0, len(tokens) - size + 1, size):
            name = block_name(names[-1] if names else b"", tokens[start : start + size])
            if name not in self.named:
                break
            blocks.append(self.named[name])
            names.append(name)
        return blocks, names
