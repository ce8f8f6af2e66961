"""The ledger of kernels that were checked on a GPU is keyed by their source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import phase5
from common.errors import UserError
from phase5.kernels import Kernels, ledger, registry
from tests.support.beside import beside

written = beside(5, "checks.ledger")
TRITON = Path(phase5.__file__).parent / "kernels" / "triton"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ledger.fingerprint.cache_clear()


def test_the_committed_list_can_be_read_and_names_kernels() -> None:
    for hash_, entry in ledger.read().items():
        assert entry["backend"] in registry.FOR_CARDS
        assert entry["op"] in Kernels._fields
        assert len(hash_) == 64


def test_every_kernel_has_its_sources() -> None:
    from phase5.kernels.triton import SOURCES

    assert set(SOURCES) == set(Kernels._fields)
    named = {name for files in SOURCES.values() for name in files if "/" not in name}
    assert named == {file.name for file in TRITON.glob("*.py")} - {"__init__.py"}


def test_all_that_a_kernels_files_import_of_each_other_is_hashed_with_them() -> None:
    from phase5.kernels.triton import SOURCES

    for op, files in SOURCES.items():
        for file in files:
            lines = (TRITON / file).read_text(encoding="utf-8").splitlines()
            modules = [line.split()[1] for line in lines if line.startswith("from .")]
            beside = {f"{module[1:]}.py" for module in modules if module[1:2] not in ("", ".")}
            above = {f"../{module[2:]}.py" for module in modules if module[:2] == ".." and module[2:3] not in ("", ".")}
            assert "/" in file or beside | above <= set(files), (op, file)


@pytest.mark.about("engine/kernels/ledger.py, entry")
def test_a_kernel_is_listed_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = tmp_path / "verified.json"
    assert ledger.entry("triton", "linear", book) is None
    written.record("triton", "linear", "A Card", ["one", "two"], book)
    written.record("triton", "rope", "A Card", ["one"], book)
    entry = ledger.entry("triton", "linear", book)
    assert entry is not None
    assert (entry["device"], entry["checks"]) == ("A Card", ["one", "two"])
    before = ledger.fingerprint("triton", "linear")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b" " if self.name == "linear.py" else b""))
    ledger.fingerprint.cache_clear()
    assert ledger.fingerprint("triton", "linear") != before
    assert ledger.entry("triton", "linear", book) is None
    assert ledger.entry("triton", "rope", book) is not None
    written.record("triton", "linear", "Another", ["one"], book)  # replaces the old version
    assert sorted(e["device"] for e in ledger.read(book).values()) == ["A Card", "Another"]


def test_a_shared_file_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {op: ledger.fingerprint("triton", op) for op in Kernels._fields}
    assert len(set(before.values())) == len(before)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b" " if self.name == "support.py" else b""))
    ledger.fingerprint.cache_clear()
    assert all(ledger.fingerprint("triton", op) != before[op] for op in before)


@pytest.mark.parametrize("text", ["{", "[]", '{"abc": {}}', '{"abc": {"device": "x", "checks": []}}'])
def test_a_damaged_list_is_named(text: str, tmp_path: Path) -> None:
    book = tmp_path / "verified.json"
    book.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"verified.json is damaged"):
        ledger.entry("triton", "linear", book)


def test_nothing_is_listed_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="passed no check"):
        written.record("triton", "linear", "A Card", [], tmp_path / "verified.json")


def test_without_a_card_nothing_is_listed() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="this machine has none"):
        written.main(["--write"])
    with pytest.raises(UserError, match="expected nothing, --write or --list"):
        written.main(["--force"])
    assert written.main(["--list"]) == 0


def test_the_list_is_written_in_order(tmp_path: Path) -> None:
    book = tmp_path / "verified.json"
    for op in ("rope", "linear"):
        written.record("triton", op, "A Card", ["one"], book)
    assert [entry["op"] for entry in json.loads(book.read_text(encoding="utf-8")).values()] == ["linear", "rope"]
