"""Blocks of a paged cache against slow references: what rows read, who uses a block, and which prefixes are known.

The first reference is the tokens themselves: every key that a row reads must be the one of its own prefix. The second
is a list of blocks with their tokens and the time of their last use.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phase6.kv_cache import PAGE, CacheShape, OutOfBlocks, PagedCache
from phase6.kv_cache.block_manager import BlockManager, block_name
from phase6.kv_cache.manager import CacheManager

ROWS, PAGES = 4, 9
STEMS = [[1] * 40, [1] * 20 + [2] * 20, [3] * 40, [1] * 16 + [3] * 16 + [1] * 8]


def key_of(prefix: list[int]) -> float:
    """Return what a model would store for the last token of a prefix: a function of all its tokens."""
    return float(zlib.crc32(bytes(prefix)) % 100_000)


@dataclass
class Block:
    """A block of the second reference."""

    tokens: tuple[int, ...] | None = None  # of its whole prefix, if it is findable
    users: int = 0
    released: int = 0


@dataclass
class SlowBlocks:
    """What block_manager.py does, by search through all blocks."""

    blocks: list[Block] = field(default_factory=lambda: [Block() for _ in range(PAGES)])
    clock: int = 0

    def known(self, tokens: list[int]) -> int:
        count = 0
        while any(block.tokens == tuple(tokens[: (count + 1) * PAGE]) for block in self.blocks) and (
            (count + 1) * PAGE <= len(tokens)
        ):
            count += 1
        return count

    def take(self) -> Block:
        free = [block for block in self.blocks if not block.users]
        block = next((each for each in free if each.tokens is None), None) or min(free, key=lambda each: each.released)
        block.tokens, block.users = None, 1
        return block

    def release(self, block: Block) -> None:
        self.clock += 1
        block.users, block.released = block.users - 1, self.clock


class Rows(RuleBasedStateMachine):
    """Sequences that begin, grow, branch off, are cut, and end, over a cache of few pages."""

    def __init__(self) -> None:
        super().__init__()
        cache = PagedCache(CacheShape(1, 1, 1), ROWS, PAGES, torch.float32, torch.float32, torch.device("cpu"))
        self.cache, self.manager = cache, CacheManager(cache, ROWS)
        self.texts: dict[Hashable, list[int]] = {}
        self.count = 0

    def write(self, owner: Hashable, window: list[int]) -> None:
        """Compute what the row lacks of the window, as a forward does."""
        row = self.manager.begin(owner, window)
        new = window[len(row.held) :]
        try:
            self.cache.make_room(row.number, len(new))
        except OutOfBlocks:
            self.manager.release(owner)
            del self.texts[owner]
            return
        first = len(row.held)
        keys = torch.tensor([key_of(window[: at + 1]) for at in range(first, len(window))]).view(-1, 1, 1)
        self.cache.append(0, row.number, keys, -keys)
        self.manager.appended(row, new)
        self.texts[owner] = list(window)

    @precondition(lambda self: len(self.texts) < ROWS)
    @rule(stem=st.sampled_from(STEMS), length=st.integers(1, 40))
    def begin(self, stem: list[int], length: int) -> None:
        window, owner = stem[:length], self.count
        self.count += 1
        known = self.known_blocks(window[:-1])
        row = self.manager.begin(owner, window)
        assert len(row.held) >= known * PAGE
        self.texts[owner] = window
        self.write(owner, window)

    def known_blocks(self, tokens: list[int]) -> int:
        named, count, name = self.cache.blocks.named, 0, b""
        while (count + 1) * PAGE <= len(tokens):
            name = block_name(name, tokens[count * PAGE : (count + 1) * PAGE])
            if name not in named:
                break
            count += 1
        return count

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.lists(st.integers(1, 3), min_size=1, max_size=20))
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        owner = data.draw(st.sampled_from(sorted(self.texts)))  # type: ignore[type-var]
        if len(self.texts[owner]) + len(tokens) <= 64:
            self.write(owner, self.texts[owner] + tokens)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.lists(st.integers(1, 3), min_size=1, max_size=6), accepted=st.integers(0, 6))
    def draft(self, data: st.DataObject, tokens: list[int], accepted: int) -> None:
        """Append a draft of which some tokens are accepted; the others stay behind the row's length."""
        owner = data.draw(st.sampled_from(sorted(self.texts)))  # type: ignore[type-var]
        row, held = self.manager.rows[owner], self.texts[owner]
        try:
            self.cache.make_room(row.number, len(tokens))
        except OutOfBlocks:
            return
        keys = torch.tensor([key_of(held + tokens[: at + 1]) for at in range(len(tokens))]).view(-1, 1, 1)
        self.cache.append(0, row.number, keys, -keys)
        kept = tokens[:accepted]
        row.text = kept
        self.manager.settle(row, [], [])
        self.texts[owner] = held + kept

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), length=st.integers(1, 30))
    def jump(self, data: st.DataObject, length: int) -> None:
        """Cut the beginning away, as at a jump of the window: a prefix may be the same by chance."""
        owner = data.draw(st.sampled_from(sorted(self.texts)))  # type: ignore[type-var]
        if length < len(self.texts[owner]):
            self.write(owner, self.texts[owner][length:])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.texts)))  # type: ignore[type-var]
        self.manager.release(owner)
        del self.texts[owner]

    @invariant()
    def rows_hold_their_own_keys(self) -> None:
        for owner, text in self.texts.items():
            row = self.manager.rows[owner]
            assert row.held == text
            keys, values = self.cache.read(0, row.number, 0)
            assert keys.flatten().tolist() == [key_of(text[: at + 1]) for at in range(len(text))]
            assert torch.equal(values, -keys)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def rows_lack_as_many_blocks_as_they_take(self, data: st.DataObject) -> None:
        """Rows that grow together take as many blocks as was said, copies of shared ones included, or find too few."""
        owners = data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, unique=True))  # type: ignore[type-var]
        lengths = {owner: len(self.texts[owner]) + data.draw(st.integers(1, 20)) for owner in owners}
        manager = copy.deepcopy(self.manager)
        lacking, free = manager.lacking_blocks(lengths), manager.free_blocks
        found = [manager.reserve(owner, length) for owner, length in lengths.items()]
        assert all(found) == (lacking <= free)
        if all(found):
            assert free - manager.free_blocks == lacking

    @invariant()
    def every_page_has_as_many_users_as_rows_that_hold_it(self) -> None:
        blocks = self.cache.blocks
        held = [sum(page in table for table in self.cache.tables) for page in range(PAGES)]
        assert held == blocks.users
        assert sorted([*blocks.empty, *blocks.cached]) == [page for page in range(PAGES) if not held[page]]
        assert {name: page for page, name in blocks.names.items()} == blocks.named


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEMS), st.integers(1, 40), st.integers(0, 3)), max_size=30))
def test_known_prefixes_and_evictions_are_those_of_the_slow_blocks(work: list[tuple[list[int], int, int]]) -> None:
    """Rows take known blocks and new ones, and the row that is given up is any of the last."""
    fast, slow = BlockManager(PAGES), SlowBlocks()
    rows = list[tuple[list[int], list[Block]]]()
    for stem, length, given_up in work:
        tokens = stem[:length]
        blocks, names = fast.find(tokens, PAGE)
        assert len(blocks) == len(names) == slow.known(tokens)
        theirs = [
            next(block for block in slow.blocks if block.tokens == tuple(tokens[: (at + 1) * PAGE]))
            for at in range(len(blocks))
        ]
        for block, its in zip(blocks, theirs, strict=True):
            fast.share(block)
            its.users += 1
        while len(blocks) < -(-length // PAGE) and fast.free:
            blocks.append(fast.take())
            theirs.append(slow.take())
            end = len(blocks) * PAGE
            if end <= length:
                names.append(block_name(names[-1] if names else b"", tokens[end - PAGE : end]))
                fast.set_name(blocks[-1], names[-1])
                if not any(block.tokens == tuple(tokens[:end]) for block in slow.blocks):
                    theirs[-1].tokens = tuple(tokens[:end])
        rows.append((blocks, theirs))
        if given_up < len(rows):
            blocks, theirs = rows.pop(-1 - given_up)
            for block, its in zip(reversed(blocks), reversed(theirs), strict=True):
                fast.release(block)
                slow.release(its)
        assert fast.free == sum(not block.users for block in slow.blocks)
        assert sorted(fast.users) == sorted(block.users for block in slow.blocks)


def test_a_block_is_released_once() -> None:
    blocks = BlockManager(2)
    block = blocks.take()
    blocks.release(block)
    with pytest.raises(ValueError, match="free already"):
        blocks.release(block)


@pytest.mark.about("engine/kv_cache/block_manager.py, block_name")
def test_names_tell_prefixes_apart() -> None:
    """The same tokens after different blocks are different blocks."""
    assert block_name(block_name(b"", [1]), [2]) != block_name(block_name(b"", [2]), [2])
    assert block_name(b"", [1, 2]) != block_name(b"", [2, 1])


@pytest.mark.about("engine/kv_cache/block_manager.py, BlockManager.take")
def test_the_least_recently_used_block_is_evicted() -> None:
    blocks = BlockManager(3)
    taken = [blocks.take() for _ in range(3)]
    names = [block_name(b"", [at]) for at in range(3)]
    for block, name in zip(taken, names, strict=True):
        blocks.set_name(block, name)
    for at in (1, 0, 2):
        blocks.release(taken[at])
    blocks.share(taken[1])  # used again
    blocks.release(taken[1])
    assert blocks.take() == taken[0]
    assert blocks.find([0], 1)[0] == []
    assert [blocks.find([at], 1)[0] for at in (1, 2)] == [[taken[1]], [taken[2]]]


def test_a_name_stays_with_the_block_that_had_it_first() -> None:
    blocks = BlockManager(2)
    first, second = blocks.take(), blocks.take()
    for block in (first, second):
        blocks.set_name(block, block_name(b"", [1]))
    assert blocks.find([1], 1)[0] == [first]
    blocks.release(second)
    assert blocks.take() == second
    assert blocks.find([1], 1)[0] == [first]


def manager_of(pages: int, rows: int = 2) -> CacheManager:
    cache = PagedCache(CacheShape(1, 1, 1), rows, pages, torch.float32, torch.float32, torch.device("cpu"))
    return CacheManager(cache, rows)


def compute(manager: CacheManager, owner: str, window: list[int]) -> int:
    """Compute what the row of a sequence lacks, as a forward does; return how many tokens it had."""
    row = manager.begin(owner, window)
    first = len(row.held)
    manager.cache.make_room(row.number, len(window) - first)
    keys = torch.tensor([key_of(window[: at + 1]) for at in range(first, len(window))]).view(-1, 1, 1)
    manager.cache.append(0, row.number, keys, -keys)
    manager.appended(row, window[first:])
    return first


@pytest.mark.about("engine/kv_cache/block_manager.py, BlockManager.find")
def test_blocks_that_fill_token_by_token_are_found() -> None:
    manager, text = manager_of(6), list(range(1, 41))
    for end in range(1, 34):
        compute(manager, "first", text[:end])
    manager.release("first")
    assert compute(manager, "second", text) == 2 * PAGE


def test_of_a_shared_block_only_those_that_write_need_a_copy() -> None:
    manager, text = manager_of(6, 3), list(range(1, 9))
    compute(manager, "first", text)
    for owner in ("second", "third"):
        manager.begin(owner, text)  # a fork, without the last token
    assert isinstance(manager.cache, PagedCache)
    assert max(manager.cache.blocks.users) == 3
    writing = ({"second": 8}, {"second": 8, "third": 8}, {"first": 9, "second": 8, "third": 8})
    assert [manager.lacking_blocks(lengths) for lengths in writing] == [1, 2, 2]


def test_blocks_after_a_jump_have_names_of_their_own() -> None:
    """The window B C D of A B C D must not be found as the beginning A B D."""
    manager, (a, b, c, d) = manager_of(8), ([at] * PAGE for at in (1, 2, 3, 4))
    compute(manager, "first", a + b)
    compute(manager, "first", b)
    compute(manager, "first", b + c + d)
    manager.release("first")
    assert compute(manager, "second", a + b + d + [5]) == 2 * PAGE
    keys, _ = manager.cache.read(0, manager.rows["second"].number, 0)
    window = a + b + d + [5]
    assert keys.flatten().tolist() == [key_of(window[: at + 1]) for at in range(len(window))]
