"""Environment variables as options, and their conflicts."""

from __future__ import annotations

from pathlib import Path

import pytest

import phase5
from common.errors import UserError
from common.options import parse_options


@pytest.mark.no_exercise
def test_appending_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("0", "false", "OFF"):
        monkeypatch.setenv("SPECDEC_ENABLE_KV_APPEND", word)
        assert phase5.Options().kv_options().kind == "off"
        assert phase5.Options(kv="off").kv_options().kind == "off"
    for word in ("1", "true", ""):
        monkeypatch.setenv("SPECDEC_ENABLE_KV_APPEND", word)
        assert phase5.Options().kv_options().kind == "static"


@pytest.mark.no_exercise
def test_appending_that_is_switched_off_contradicts_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("kv: ring\n")
    monkeypatch.setenv("SPECDEC_ENABLE_KV_APPEND", "0")
    assert parse_options(phase5.Options, ["--config", str(file)], "generate.py").kv == "off"  # before a file
    with pytest.raises(UserError, match="SPECDEC_ENABLE_KV_APPEND=0 keeps no cache, and --kv static asks for one"):
        parse_options(phase5.Options, ["--kv", "static"], "generate.py")
    monkeypatch.setenv("SPECDEC_KV", "paged")
    with pytest.raises(UserError, match="SPECDEC_ENABLE_KV_APPEND=0 keeps no cache, and --kv paged"):
        parse_options(phase5.Options, [], "generate.py")
    monkeypatch.setenv("SPECDEC_ENABLE_KV_APPEND", "sometimes")
    with pytest.raises(UserError, match="SPECDEC_ENABLE_KV_APPEND: expected 1 or 0"):
        parse_options(phase5.Options, [], "generate.py")
