"""The tokenizer cache: ids as without it, each text encoded once, LRU eviction, memory within the limit."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

import phase4
from common.checkpoint import open_checkpoint
from common.errors import UserError
from common.options import run_main
from common.prompts import load_prompts
from common.tokenizer import Tokenizer
from phase4.cli import main
from phase4.tokenizer_cache import CacheStats, TokenizerCache

ODD = ["", " ", "\n\n", "naïve 🙂", "\x00", "a" * 3000, "import os\r\n\tx"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    checkpoint = open_checkpoint("stdlib-1m")
    return Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)


class Counting(Tokenizer):
    """Encodes a text as its code points, and records the calls."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, special: bool = True) -> list[int]:
        self.asked.append(text)
        return list(map(ord, text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def test_ids_are_those_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [prompt.text for prompt in load_prompts("code")[:40]] + ODD
    right = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == right
    cache = TokenizerCache(tokenizer)
    assert cache.encode(texts) == right
    assert cache.encode(texts[::-1]) == right[::-1]
    assert cache.encode(texts[:1]) == right[:1]
    assert cache.encode([]) == []


def test_what_is_given_out_can_be_changed_without_harm() -> None:
    cache = TokenizerCache(Counting())
    first, twin = cache.encode(["ab", "ab"])
    first.append(7)
    assert twin == cache.encode(["ab"])[0] == [97, 98]


def test_a_text_is_encoded_once_however_often_it_is_asked_for() -> None:
    tokenizer = Counting()
    cache = TokenizerCache(tokenizer)
    cache.encode(["a", "b", "a"])
    cache.encode(["b", "c"])
    assert tokenizer.asked == ["a", "b", "c"]
    assert (cache.stats.hits, cache.stats.misses) == (2, 3)


def size_of_one() -> int:
    cache = TokenizerCache(Counting())
    cache.encode(["x"])
    return cache.stats.bytes


@given(calls=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), max_size=12), room=st.integers(0, 5))
def test_the_least_recently_used_go_first(calls: list[list[str]], room: int) -> None:
    """Against a list in order of use; all texts have the same size."""
    one = size_of_one()
    tokenizer = Counting()
    cache = TokenizerCache(tokenizer, room * one + one // 2)
    kept: list[str] = []
    hits = misses = 0
    for texts in calls:
        before = len(tokenizer.asked)
        assert cache.encode(texts) == [[ord(text)] for text in texts]
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        assert tokenizer.asked[before:] == new
        for text in [*[text for text in texts if text not in new], *new]:
            kept = [other for other in kept if other != text] + [text]
            kept = kept[max(0, len(kept) - room) :]
        hits, misses = hits + len(texts) - len(new), misses + len(new)
        stats = cache.stats
        assert (stats.hits, stats.misses, stats.entries) == (hits, misses, len(kept))
        assert stats.bytes == len(kept) * one <= stats.limit


def test_a_text_larger_than_the_store_is_encoded_and_not_kept() -> None:
    tokenizer = Counting()
    cache = TokenizerCache(tokenizer, 4000)
    cache.encode(["a", "b" * 5000])
    assert cache.stats.entries == 1
    cache.encode(["a", "b" * 5000])
    assert tokenizer.asked == ["a", "b" * 5000, "b" * 5000]
    assert cache.stats == CacheStats(hits=1, misses=3, evictions=0, entries=1, bytes=cache.stats.bytes, limit=4000)


def test_the_bytes_are_what_the_store_takes(tokenizer: Tokenizer) -> None:
    cache = TokenizerCache(tokenizer)
    lines = [line for prompt in load_prompts("code") for line in prompt.text.splitlines()]
    texts = list(dict.fromkeys(lines))[:2000]
    tracemalloc.start()
    cache.encode([text + " " for text in texts])  # new strings, held only by the cache
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache.stats.entries == len(texts)
    assert cache.stats.bytes == pytest.approx(taken, rel=0.25)


def test_bytes_that_are_no_text_are_refused_and_not_counted(tokenizer: Tokenizer) -> None:
    cache = TokenizerCache(tokenizer)
    for texts in (["a", "\udcff"], ["\udcff"]):
        with pytest.raises(UserError, match="not UTF-8"):
            cache.encode(texts)
    assert (cache.stats.hits, cache.stats.misses, cache.stats.entries) == (0, 0, 0)


def test_a_session_looks_its_prompts_up() -> None:
    llm = phase4.LLM(phase4.Options(model="fake", max_tokens=3, n=2, temperature=1.0))
    first = [done.tokens for done in llm.generate(["import os", "def f("])]
    assert [done.tokens for done in llm.generate(["import os", "def f("])] == first
    assert (llm.encoder.stats.hits, llm.encoder.stats.misses) == (2, 2)


def test_statistics_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "fake", "--max-tokens", "2", "--prompt", "a b", "--prompt", "a b", "--metrics-detailed"]

    def run(*more: str) -> tuple[str, str]:
        with pytest.raises(SystemExit, match="0"):
            run_main(main, [*arguments, *more])
        return capsys.readouterr()

    out, err = run("--json")
    assert json.loads(out)["tokenizer_cache"].items() >= {"hits": 1, "misses": 1, "evictions": 0, "entries": 1}.items()
    assert "tokenizer cache" not in err
    assert "tokenizer cache: 1 of 2 texts were hits" in run()[1]
