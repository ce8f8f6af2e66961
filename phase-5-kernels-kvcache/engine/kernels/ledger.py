"""Which kernels for graphics cards have been checked on one: by the hash of their source, in verified.json.

A card is not always at hand, and a kernel that was changed is another kernel. So `--kernels auto` takes one only where
this file lists its very source. `make gpu` checks the kernels on the card and writes the list (checks/ledger.py).

    python -c "from engine.kernels import ledger; print(ledger.entry('triton', 'rope'))"
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import UserError

BOOK = Path(__file__).with_name("verified.json")
SUFFIXES = {"triton": (".py",), "cuda": (".cu", ".cuh", ".h", ".cpp", ".py")}
Entry = dict[str, Any]


@lru_cache(maxsize=64)
def fingerprint(backend: str, op: str) -> str:
    """sha256 over the files that make a kernel, by name and content.

    A backend's SOURCES names them for every op; without it, all in its folder (folders in it not).
    """
    folder = Path(__file__).parent / backend
    sources: dict[str, tuple[str, ...]] = {}
    if importlib.util.find_spec(f".{backend}", __package__) is not None:
        sources = getattr(importlib.import_module(f".{backend}", __package__), "SOURCES", {})
    files = [folder / name for name in sources.get(op, ())]
    files = files or [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES[backend]]
    digest = hashlib.sha256(f"{backend} {op}".encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def read(book: Path | None = None) -> dict[str, Entry]:
    """The entries by hash; none where there is no file. UserError where it is damaged."""
    file = book or BOOK
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        good = isinstance(entries, dict) and all(isinstance(e["device"], str) and e["checks"] for e in entries.values())
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{file} is damaged: take it from the repository again, or write it anew with `make gpu`")
    known: dict[str, Entry] = entries
    return known


def entry(backend: str, op: str, book: Path | None = None) -> Entry | None:
    """What is known of a kernel as its source is now; None if it was never checked on a card."""
    found = read(book)
    return found.get(fingerprint(backend, op)) if found else None
