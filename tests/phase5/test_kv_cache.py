"""Caches alone: after any appends, kept entries, truncations and forks, a row equals a plain list."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from phase5.kv_cache import CacheShape, KVCache, KVOptions, OutOfBlocks, make_cache, needed_bytes, storage
from phase5.kv_cache.manager import CacheManager

CPU = torch.device("cpu")
SHAPE = CacheShape(layers=2, kv_heads=2, head_dim=4)
WINDOW = 24
KINDS = [
    pytest.param("static", marks=pytest.mark.about("engine/kv_cache/static.py, InPlaceCache.append")),
    pytest.param("dynamic", marks=pytest.mark.about("engine/kv_cache/dynamic.py, DynamicCache.append")),
    pytest.param("ring", marks=pytest.mark.about("engine/kv_cache/ring.py, RingCache.place")),
    pytest.param("paged", marks=pytest.mark.about("engine/kv_cache/paged.py, PagedCache.append")),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that reads of it are noticed."""

    def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, 99 if dtype == torch.int8 else float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(storage, "reserve", reserve)


def cache_of(kind: str, rows: int = 3, tokens: int = 96, format: str = "auto", pages: int = 0) -> KVCache:
    options = KVOptions(kind, format, pages=pages)  # type: ignore[arg-type]
    return make_cache(options, SHAPE, rows, tokens, torch.float32, CPU, WINDOW)


def entries(tokens: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """Make keys and values [n, kv_heads, head_dim] that encode their row and position."""
    at = torch.tensor(tokens, dtype=torch.float32)[:, None, None]
    keys = at + torch.arange(8).view(2, 4) / 8 + layer / 2
    return keys, -keys


def append(cache: KVCache, row: int, tokens: list[int]) -> None:
    cache.make_room(row, len(tokens))
    for layer in range(SHAPE.layers):
        cache.append(layer, row, *entries(tokens, layer))


def check(cache: KVCache, row: int, held: list[int], new: list[int] = [], within: float = 0.0) -> None:  # noqa: B006
    assert cache.length(row) == len(held)
    first = cache.first(row)
    assert first <= max(0, len(held) + len(new) - WINDOW)
    for layer in range(SHAPE.layers):
        for found, wanted in zip(cache.read(layer, row, len(new)), entries((held + new)[first:], layer), strict=True):
            torch.testing.assert_close(found, wanted.transpose(0, 1), atol=within, rtol=within)


Action = tuple[str, int, int, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "truncate", "fork"]),
        st.integers(0, 2),
        st.integers(0, 16),
        st.integers(0, 2**16 - 1),
    ),
    max_size=24,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS)
def test_a_cache_is_a_list(kind: str, actions: list[Action]) -> None:
    """Append up to 16 tokens and keep some; truncate; fork to another row."""
    cache, rows, number = cache_of(kind), [list[int]() for _ in range(3)], 0
    for what, row, size, chosen in actions:
        held = rows[row]
        if what == "append":
            if len(held) + size > 96:
                continue
            new = list(range(number + 1, number + 1 + size))
            number += size
            append(cache, row, new)
            check(cache, row, held, new)
            kept = [at for at in range(size) if chosen >> at & 1]
            cache.keep(row, kept)
            held += [new[at] for at in kept]
        elif what == "truncate":
            length = max(0, len(held) - size % 5)
            overwritten = length and max(0, length - WINDOW + 1) < cache.first(row)
            assert bool(overwritten) == (0 < length < cache.shortest(row))
            if overwritten:
                with pytest.raises(ValueError, match="overwritten"):
                    cache.truncate(row, length)
                continue
            cache.truncate(row, length)
            del held[length:]
        else:
            into = (row + 1) % 3
            cache.fork(row, into)
            rows[into] = list(held)
        for at, tokens in enumerate(rows):
            check(cache, at, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_within_half_a_step_of_its_scale(kind: str) -> None:
    cache = cache_of(kind, format="int8")
    tokens = list(range(1, 17))
    append(cache, 0, tokens)
    cache.keep(0, list(range(16)))
    for layer in range(SHAPE.layers):
        for found, wanted in zip(cache.read(layer, 0, 0), entries(tokens, layer), strict=True):
            wanted = wanted.transpose(0, 1)
            step = wanted.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)  # scales are bfloat16
            assert bool(((found - wanted).abs() <= step / 2).all())


@pytest.mark.parametrize("kind", KINDS)
def test_int8_moves_with_its_scale(kind: str) -> None:
    """Large tokens into the places of small ones, and into another row."""
    cache = cache_of(kind, format="int8")
    append(cache, 0, [1, 100, 3, 50, 7, 90])
    cache.keep(0, [1, 4, 5])
    check(cache, 0, [100, 7, 90], within=0.01)
    cache.fork(0, 1)
    append(cache, 1, [60])
    check(cache, 1, [100, 7, 90], [60], within=0.01)


@pytest.mark.about("engine/kv_cache/protocol.py, CacheShape.bytes_per_token")
def test_static_bytes_are_those_of_the_formula() -> None:
    for format, size, scale in (("float32", 4, 0), ("float16", 2, 0), ("int8", 1, 2)):
        cache = cache_of("static", rows=3, tokens=96, format=format)
        assert cache.nbytes() == 3 * 96 * SHAPE.bytes_per_token(size, scale)


@pytest.mark.parametrize("kind", ["static", "ring", "paged"])
def test_what_a_cache_will_take_is_known_before(kind: str) -> None:
    for format in ("auto", "float16", "int8"):
        for more in ({}, {"slots": 30} if kind == "static" else {"pages": 9} if kind == "paged" else {}):
            options = KVOptions(kind, format, **more)  # type: ignore[arg-type]
            cache = make_cache(options, SHAPE, 3, 90, torch.float32, CPU, WINDOW)
            assert needed_bytes(options, SHAPE, 3, 90, torch.float32, WINDOW) == cache.nbytes()


@pytest.mark.about("engine/kv_cache/static.py, StaticCache.make_room")
def test_a_full_static_cache_says_how_much_is_needed() -> None:
    cache = make_cache(KVOptions("static", slots=10), SHAPE, 1, 96, torch.float32, CPU, None)
    append(cache, 0, list(range(8)))
    cache.keep(0, list(range(8)))
    cache.make_room(0, 2)  # it may be filled to its last slot
    with pytest.raises(UserError, match=r"holds 10 tokens per text, and 11 are needed: give a larger --kv-slots"):
        cache.make_room(0, 3)
    check(cache, 0, list(range(8)))


@pytest.mark.about("engine/kv_cache/paged.py, PagedCache.make_room")
def test_a_row_that_gets_no_page_harms_no_other() -> None:
    cache = cache_of("paged", pages=3)
    append(cache, 0, list(range(20)))
    cache.keep(0, list(range(20)))
    append(cache, 1, list(range(50, 60)))
    cache.keep(1, list(range(10)))
    with pytest.raises(OutOfBlocks, match=r"1 of 16 tokens are needed and 0 of 3 are free"):
        cache.make_room(1, 7)
    check(cache, 0, list(range(20)))
    check(cache, 1, list(range(50, 60)))
    cache.truncate(0, 3)
    append(cache, 1, list(range(60, 67)))
    check(cache, 1, list(range(50, 60)), list(range(60, 67)))


@pytest.mark.about("engine/kv_cache/paged.py, PagedCache.fork")
def test_forked_rows_share_pages_until_one_writes() -> None:
    cache = cache_of("paged", pages=4)
    append(cache, 0, list(range(20)))
    cache.keep(0, list(range(20)))
    cache.fork(0, 1)
    append(cache, 1, [77])  # copies the second page, which is shared
    cache.keep(1, [0])
    append(cache, 0, [88])
    cache.keep(0, [0])
    check(cache, 0, [*range(20), 88])
    check(cache, 1, [*range(20), 77])
    append(cache, 2, list(range(3)))  # three pages are taken in all


@pytest.mark.about("engine/kv_cache/paged.py, PagedCache.truncate")
def test_a_page_is_free_when_no_row_has_it_any_more() -> None:
    cache = cache_of("paged", pages=4)
    append(cache, 0, list(range(20)))
    cache.keep(0, list(range(20)))
    cache.fork(0, 1)
    cache.truncate(1, 0)  # the first row has them still
    append(cache, 2, list(range(50, 70)))
    cache.keep(2, list(range(20)))
    check(cache, 0, list(range(20)))
    check(cache, 2, list(range(50, 70)))
    cache.fork(0, 2)  # which gives back what it had
    append(cache, 1, list(range(80, 112)))
    check(cache, 1, [], list(range(80, 112)))
    check(cache, 2, list(range(20)))


@pytest.mark.about("engine/kv_cache/ring.py, RingCache.place")
def test_a_ring_stays_as_large_as_it_is() -> None:
    cache = cache_of("ring")
    size, held = cache.nbytes(), list[int]()
    for step in range(2500):
        new = list(range(step * 8, step * 8 + 8))
        append(cache, 0, new)
        cache.keep(0, list(range(8)))
        held += new
    assert len(held) == 20000
    assert cache.nbytes() == size
    check(cache, 0, held)


@pytest.mark.about("engine/kv_cache/static.py, InPlaceCache.keep")
def test_a_ring_that_went_round_keeps_some_of_a_step_and_lends_its_row() -> None:
    """Steps of 8 tokens, of which 4 stand: over the ring's end too. A row that is lent to knows what is overwritten."""
    cache, held = cache_of("ring"), list[int]()
    for step in range(30):
        new = list(range(step * 8, step * 8 + 8))
        append(cache, 0, new)
        cache.keep(0, [0, 2, 5, 7])
        held += [new[at] for at in (0, 2, 5, 7)]
        check(cache, 0, held)
    cache.fork(0, 1)
    append(cache, 1, [777])
    check(cache, 1, held, [777])
    append(cache, 2, [5])
    cache.keep(2, [0])
    cache.fork(2, 0)  # a short text in place of a long one
    append(cache, 0, [6])
    check(cache, 0, [5], [6])


@pytest.mark.about("engine/kv_cache/ring.py, RingCache.shortest")
def test_how_far_a_ring_can_be_cut_back() -> None:
    """A ring keeps the last 40 of 48 tokens: the window of 24 that ends at the 32nd begins at the first of them."""
    cache, held = cache_of("ring"), list(range(48))
    for start in range(0, 48, 16):
        append(cache, 0, held[start : start + 16])
        cache.keep(0, list(range(16)))
    with pytest.raises(ValueError, match="overwritten"):
        cache.truncate(0, 30)
    cache.truncate(0, 31)
    append(cache, 0, [99])
    check(cache, 0, held[:31], [99])
    cache.truncate(0, 0)  # another sequence: nothing of it is overwritten
    append(cache, 0, [7, 8])
    check(cache, 0, [], [7, 8])


def write(texts: CacheManager, owner: str, text: list[int]) -> None:
    """Append what the owner's row lacks of the text, 16 tokens at a time."""
    for end in [*range(16, len(text), 16), len(text)]:
        row = texts.begin(owner, text[:end])
        append(texts.cache, row.number, text[len(row.held) : end])
        texts.appended(row, text[len(row.held) : end])


@pytest.mark.about("engine/kv_cache/manager.py, CacheManager.begin")
def test_a_row_that_forgot_its_beginning_lends_nothing() -> None:
    """It begins like the new text for longest, but cannot be cut back so far; a row that can is borrowed from."""
    cache = cache_of("ring")
    texts, long = CacheManager(cache, 3), list(range(100, 148))
    for owner, text in (("long", long), ("short", [*long[:10], 7]), ("third", [*long[:20], 8])):
        write(texts, owner, text)
        check(cache, texts.rows[owner].number, text)
    assert cache.first(texts.rows["long"].number) > 0
    assert texts.positions == 48 + 11 + 11


@pytest.mark.about("engine/kv_cache/manager.py, CacheManager.begin")
def test_a_ring_that_overwrote_a_changed_text_is_written_again() -> None:
    """The text changes at its 20th token, and the ring holds the last 40 of 48: nothing before can be kept."""
    texts, held = CacheManager(cache_of("ring"), 1), list(range(48))
    write(texts, "a", held)
    row = texts.begin("a", [*held[:20], 99])
    assert row.held == []
    write(texts, "a", [*held[:20], 99])
    check(texts.cache, row.number, [*held[:20], 99])


@pytest.mark.parametrize("kind", ["static", "dynamic", "paged"])
@pytest.mark.about("engine/kv_cache/manager.py, CacheManager.begin")
def test_a_lender_keeps_what_it_lent(kind: str) -> None:
    texts = CacheManager(cache_of(kind), 2)
    write(texts, "a", [1, 2, 3, 4])
    write(texts, "b", [1, 2, 7])
    assert (texts.rows["a"].held, texts.rows["b"].held) == ([1, 2, 3, 4], [1, 2, 7])
    assert texts.positions == 4 + 1
    for owner, text in (("a", [1, 2, 3, 4]), ("b", [1, 2, 7])):
        check(texts.cache, texts.rows[owner].number, text)


@pytest.mark.about("engine/kv_cache/protocol.py, KVCache.truncate")
def test_rolling_back_allocates_nothing_of_the_caches_size() -> None:
    cache = cache_of("static", tokens=4096)
    append(cache, 0, list(range(16)))
    with torch.profiler.profile(profile_memory=True) as profile:
        cache.keep(0, [0, 1, 5, 9])
        cache.truncate(0, 2)
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest < 4096


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_kept_is_overwritten(kind: str) -> None:
    """As after a forward whose tokens nobody wanted."""
    cache = cache_of(kind)
    append(cache, 0, [1, 2])
    cache.keep(0, [0, 1])
    append(cache, 0, [3, 4, 5])
    append(cache, 0, [6])
    check(cache, 0, [1, 2], [6])
    cache.keep(0, [0])
    check(cache, 0, [1, 2, 6])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_can_be_cut_back_to_more_than_there_is(kind: str) -> None:
    cache = cache_of(kind)
    append(cache, 0, [1, 2])
    cache.keep(0, [0, 1])
    with pytest.raises(ValueError, match="cannot truncate a row of 2 tokens to 3"):
        cache.truncate(0, 3)


@pytest.mark.about("engine/kv_cache/__init__.py, make_cache")
def test_ring_is_for_models_with_window_attention() -> None:
    make: Callable[[], KVCache] = lambda: make_cache(KVOptions("ring"), SHAPE, 1, 96, torch.float32, CPU, None)  # noqa: E731
    with pytest.raises(
        UserError, match="--kv ring overwrites tokens before the window, and this model was not trained"
    ):
        make()
