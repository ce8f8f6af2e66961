"""Switches in environment variables mean the same everywhere, and thread counts have a bound."""

from __future__ import annotations

import os

import pytest
from pydantic import BaseModel, ValidationError

from common.errors import UserError
from common.flags import OFF, ON, Threads, flag, most_threads


@pytest.mark.parametrize(("words", "expected"), [(ON, True), (OFF, False)])
def test_words_for_on_and_off(words: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Switch(BaseModel):
        on: bool

    for word in words:
        for spelled in (word, word.upper()):
            monkeypatch.setenv("SPECDEC_SWITCH", spelled)
            assert flag("SPECDEC_SWITCH", default=not expected) is expected
            assert Switch(on=spelled).on is expected  # type: ignore[arg-type]  # as options take them


def test_an_absent_or_empty_variable_leaves_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_SWITCH", raising=False)
    assert (flag("SPECDEC_SWITCH"), flag("SPECDEC_SWITCH", default=True)) == (False, True)
    monkeypatch.setenv("SPECDEC_SWITCH", "")
    assert (flag("SPECDEC_SWITCH"), flag("SPECDEC_SWITCH", default=True)) == (False, True)


@pytest.mark.parametrize("word", ["maybe", "2", "-1", " 1"])
def test_another_word_is_an_error(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_SWITCH", word)
    with pytest.raises(UserError, match=rf"SPECDEC_SWITCH: expected 1 or 0 .*, got '{word}'"):
        flag("SPECDEC_SWITCH")


def test_threads_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options(BaseModel):
        threads: Threads = 0

    for processors, most in ((None, 64), (2, 64), (16, 64), (17, 68), (128, 512)):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        assert most_threads() == most
        assert Options(threads=most).threads == most
        with pytest.raises(ValidationError, match=f"at most {most} threads"):
            Options(threads=most + 1)
    with pytest.raises(ValidationError):
        Options(threads=-1)
